"""Node-state stores: what a mini-batch knows of the nodes outside it."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vqgnn_kernels as kernels
from vqgnn_kernels import Rows

from .codebook import Codebook

ROW_CODECS = ("fp32", "fp16", "int8", "int4")
_NEVER = -1

# A compiled backward reaches its store by number: torch.compile then sees one opaque op and no state to trace.
_STORES: weakref.WeakValueDictionary[int, NodeStore] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def _record(handle: int, n_id: Tensor, x: Tensor, g: Tensor, softmax: Tensor | None = None) -> Tensor:
    _STORES[handle].push(n_id, x, g, softmax)
    return g.clone()  # an op may not return its argument; using the result keeps the call from being dropped


def _record_fake(handle: int, n_id: Tensor, x: Tensor, g: Tensor, softmax: Tensor | None = None) -> Tensor:
    return torch.empty_like(g)


kernels.register(
    "record(int handle, Tensor n_id, Tensor x, Tensor g, Tensor? softmax=None) -> Tensor", _record, _record_fake
)


@dataclass(frozen=True)
class Codec:
    """How a node's state is kept: rows ("fp32", "fp16", "int8", "int4") or product-VQ codes ("pq:d=4,k=256")."""

    name: str
    branch_dim: int = 4
    num_codes: int = 256

    @classmethod
    def parse(cls, text: str | Codec) -> Codec:
        if isinstance(text, Codec):
            return text
        name, _, rest = text.partition(":")
        try:
            options = {key: int(value) for key, value in (item.split("=") for item in rest.split(",") if item)}
        except ValueError:
            options = {"?": 0}
        if name in ROW_CODECS and not rest:
            return cls(name)
        d, k = options.pop("d", 4), options.pop("k", 256)
        if name != "pq" or options or d < 1 or not 1 <= k <= 32768:
            raise ValueError(
                f"codec={text!r} is unknown; use one of {', '.join(ROW_CODECS)} or pq:d=D,k=K with D >= 1 channels a "
                "branch and K in 1..32768 codewords, e.g. pq:d=4,k=256"
            )
        return cls("pq", d, k)

    def __str__(self) -> str:
        return f"pq:d={self.branch_dim},k={self.num_codes}" if self.name == "pq" else self.name

    def table(self, num_nodes: int, dim: int) -> tuple[Tensor, Tensor | None]:
        """Zeroed `(data, scale)` of a table of rows (or codes) of all nodes."""
        if self.name == "pq":
            kind = torch.uint8 if self.num_codes <= 256 else torch.int16
            return torch.zeros(num_nodes, -(-dim // self.branch_dim), dtype=kind), None
        if self.name in ("fp32", "fp16"):
            return torch.zeros(num_nodes, dim, dtype=torch.float32 if self.name == "fp32" else torch.float16), None
        width = dim if self.name == "int8" else (dim + 1) // 2
        return torch.zeros(num_nodes, width, dtype=torch.uint8), torch.zeros(num_nodes, 2, dtype=torch.bfloat16)


class NodeStore(nn.Module):
    """State of every node at the input of one conv, and (with `grad`) the gradient of its messages.

    One class for every method: "gas" keeps rows, "lmc" rows and gradient rows, "vq" codes that decode to both.

    Args:
        num_nodes: n.
        dim: f, channels of a node state.
        codec: a `Codec` or its text.
        grad: keep gradients too.
        seed: of the codebook.
        heads: with grad, of an attention whose softmax over each node's neighbours is kept too, in 8 bytes a head:
            the log-sum-exp of its scores and <g, M>, the product of its messages with their gradient.
        options: further arguments of `Codebook`.
    """

    def __init__(
        self,
        num_nodes: int,
        dim: int,
        codec: str | Codec = "pq",
        grad: bool = True,
        seed: int = 0,
        heads: int = 0,
        **options,
    ):
        super().__init__()
        self.num_nodes, self.dim, self.codec, self.grad = num_nodes, dim, Codec.parse(codec), grad
        data, scale = self.codec.table(num_nodes, dim)
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.codebook = None
        if self.codec.name == "pq":
            self.codebook = Codebook(dim, self.codec.branch_dim, self.codec.num_codes, grad, seed=seed, **options)
        elif options:
            raise ValueError(f"codebook options {sorted(options)} were given, but codec={self.codec} has no codebook")
        rows_of_gradients = grad and self.codebook is None
        grad_data, grad_scale = self.codec.table(num_nodes, dim) if rows_of_gradients else (None, None)
        self.register_buffer("grad_data", grad_data)
        self.register_buffer("grad_scale", grad_scale)
        softmax = None
        if grad and heads:
            softmax = torch.zeros(num_nodes, 2, heads)
            softmax[:, 0] = torch.inf  # of a node never pushed: exp(score - inf) = 0, so it sends no gradient
        self.register_buffer("softmax", softmax)
        self.register_buffer("written", torch.full((num_nodes,), _NEVER, dtype=torch.int32))  # step of the last push
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._register()

    def _register(self) -> None:
        self.handle = next(_HANDLES)
        _STORES[self.handle] = self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._register()  # a copy records into itself

    def _apply(self, fn, recurse: bool = True):
        """Follow the model to another device, but keep the dtypes: `model.half()` must not change the codec."""
        device = fn(torch.empty(0, device=self.data.device)).device
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    def extra_repr(self) -> str:
        return f"num_nodes={self.num_nodes}, dim={self.dim}, codec={self.codec}, grad={self.grad}"

    @property
    def rows(self) -> Rows:
        """States as `aggregate` reads them in place."""
        return Rows(self.codec.name, self.data, self.scale, self.codebook.x_values if self.codebook else None)

    @property
    def grad_rows(self) -> Rows | None:
        """Gradients as `aggregate`'s backward reads them in place; None without a gradient store."""
        if not self.grad:
            return None
        if self.codebook:
            return Rows("pq", self.data, None, self.codebook.g_values)
        return Rows(self.codec.name, self.grad_data, self.grad_scale, None)

    @torch.no_grad()
    def push(self, n_id: Tensor, x: Tensor, g: Tensor | None = None, softmax: Tensor | None = None) -> None:
        """Write states x [b, dim] and gradients g [b, dim] of nodes n_id [b]; a codebook learns from them.

        With codes, leaving g out keeps the gradient codewords; with gradient rows it keeps those rows. softmax
        [b, 2, heads] goes with g where the store was made with heads.
        """
        row = {"x": (x, (self.dim,)), "g": (g, (self.dim,))}
        if self.softmax is not None:
            row["softmax"] = (softmax, self.softmax.shape[1:])
        for name, (given, shape) in row.items():
            if given is not None and given.shape != (n_id.numel(), *shape):
                raise ValueError(
                    f"{name} has shape {list(given.shape)}, expected {[n_id.numel(), *shape]}: one row an n_id"
                )
        if n_id.numel() == 0:
            return
        value = self.codebook.update(x.float(), None if g is None else g.float()) if self.codebook else x
        kernels.push_rows(self.rows, n_id, value)
        if g is not None and self.grad_data is not None:
            kernels.push_rows(self.grad_rows, n_id, g)
        if self.softmax is not None and softmax is not None:
            self.softmax[n_id] = softmax
        self.step += 1
        self.written[n_id] = self.step.to(torch.int32)

    def pull(self, n_id: Tensor | None = None) -> Tensor:
        """Decoded states [b, dim] fp32 of nodes n_id [b] (None: of all)."""
        return kernels.pull_rows(self.rows, n_id, self.dim)

    @property
    def age(self) -> Tensor:
        """[n] steps since each node's state was written; the number of all steps for one never written."""
        return torch.where(self.written == _NEVER, self.step, self.step - self.written)

    @property
    def nbytes(self) -> int:
        """Bytes of state: everything in this store, ages and codebooks included."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same state as fp32 rows (the histories of GNNAutoScale)."""
        return 4 * self.num_nodes * self.dim

    def stats(self) -> dict[str, float]:
        """Mean staleness in steps and, with a codebook, its health (see `Codebook.stats`)."""
        health = self.codebook.stats() if self.codebook else {}
        return {"staleness": float(self.age.float().mean()), **health}
