"""Node-state stores: what a mini-batch knows of the nodes outside it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import vqgnn_kernels as kernels
from vqgnn_kernels import CSR, Rows

from . import tables
from .basis import Basis
from .codebook import Codebook, finite
from .places import PLACES
from .transfer import Ticket, TransferEngine

ROW_CODECS = ("fp32", "fp16", "int8", "int4")
_NEVER = -1
_FILLED = 32_768  # nodes at a time
_PENDING_DECAY = 0.7  # an epoch, of the mean of what is left for a node
_ENCODED = ("data", "scale", "grad_data", "grad_scale")  # the tables that kernels read

# A compiled backward reaches its store by number: torch.compile then sees one opaque op and no state to trace.
_STORES: weakref.WeakValueDictionary[int, NodeStore] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def _record(handle: int, n_id: Tensor, x: Tensor, g: Tensor, softmax: Tensor | None = None) -> Tensor:
    store = _STORES[handle]
    store.push(n_id, x, g if store.grad else None, softmax)
    return g.clone()  # an op may not return its argument; using the result keeps the call from being dropped


def _record_fake(handle: int, n_id: Tensor, x: Tensor, g: Tensor, softmax: Tensor | None = None) -> Tensor:
    return torch.empty_like(g)


def _exchange(handle: int, halo: Tensor, g: Tensor, n_id: Tensor, visit: Tensor | None) -> Tensor:
    store = _STORES[handle]
    new = store.begin(None if visit is None else tuple(visit.tolist()))
    store.leave(halo, g)
    return store.collect(n_id) if new else g.new_zeros(n_id.numel(), g.size(1))


def _exchange_fake(handle: int, halo: Tensor, g: Tensor, n_id: Tensor, visit: Tensor | None) -> Tensor:
    return g.new_empty(n_id.numel(), g.size(1))


kernels.register(
    "exchange(int handle, Tensor halo, Tensor g, Tensor n_id, Tensor? visit) -> Tensor", _exchange, _exchange_fake
)
kernels.register(
    "record(int handle, Tensor n_id, Tensor x, Tensor g, Tensor? softmax=None) -> Tensor", _record, _record_fake
)


def full_precision(device_type: str) -> AbstractContextManager:
    """No autocast."""
    known = torch.amp.is_autocast_available(device_type)  # of the meta device it is not
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def _exact(method: Callable) -> Callable:
    """A store's method without autograd and, where a backward pass runs within autocast, without that."""

    @wraps(method)
    def run(self: NodeStore, *args, **kwargs):
        with torch.no_grad(), full_precision(self.device.type):
            return method(self, *args, **kwargs)

    return run


@dataclass(frozen=True)
class Codec:
    """How a node's state is kept: rows ("fp32", "fp16", "int8", "int4") or product-VQ codes ("pq:d=4,k=256").

    grad_dim: "e=" of product VQ, coordinates of the gradient a branch (see `Codebook`); e = d: the channels themselves.
    None: a quarter of d, rounded up; for an attention's gradients that the kernels read, by channel, d. Of pending
    gradients: see `pending_rank`.
    """

    name: str
    branch_dim: int = 4
    num_codes: int = 256
    grad_dim: int | None = None

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
        d, k, e = options.pop("d", 4), options.pop("k", 256), options.pop("e", None)
        if name != "pq" or options or d < 1 or not 1 <= k <= 32768 or not (e is None or 1 <= e <= d):
            raise ValueError(
                f"codec={text!r} is unknown; use one of {', '.join(ROW_CODECS)} or pq:d=D,k=K with D >= 1 channels a "
                "branch and K in 1..32768 codewords, e.g. pq:d=4,k=256; ,e=E sets how many of the D a gradient has"
            )
        return cls("pq", d, k, e)

    def __str__(self) -> str:
        if self.name != "pq":
            return self.name
        text = f"pq:d={self.branch_dim},k={self.num_codes}"
        return text if self.grad_dim is None else f"{text},e={self.grad_dim}"

    def pending_rank(self, dim: int) -> int:
        """Coordinates of a pending gradient of dim channels, in two tables of bfloat16, beside product-VQ codes.

        7 for 128 channels, so that all is an eighth of fp32 rows: 28 bytes, 32 of codes (d = 4) and an age of 4.
        """
        if self.grad_dim is not None:
            return min(dim, -(-dim // self.branch_dim) * self.grad_dim)
        return max(min(dim, 4), dim // 16 - 1)

    def table(
        self, num_nodes: int, dim: int, zeros: Callable[..., Tensor] = torch.zeros
    ) -> tuple[Tensor, Tensor | None]:
        """Zeroed `(data, scale)` of a table of rows (or codes) of all nodes, made by `zeros(*shape, dtype=)`."""
        if self.name == "pq":
            kind = torch.uint8 if self.num_codes <= 256 else torch.int16
            return zeros(num_nodes, -(-dim // self.branch_dim), dtype=kind), None
        if self.name in ("fp32", "fp16"):
            return zeros(num_nodes, dim, dtype=torch.float32 if self.name == "fp32" else torch.float16), None
        width = dim if self.name == "int8" else (dim + 1) // 2
        return zeros(num_nodes, width, dtype=torch.uint8), zeros(num_nodes, 2, dtype=torch.bfloat16)


class Neighbours(NamedTuple):
    """What a conv reads of its batch: the batch's rows of C and of C^T, and the tables that their halo points into.

    rows, rows_t: states of csr's and of csr_t's halo; grad_rows, softmax [h_t, 2, heads]: gradients of csr_t's, and
    the softmax of an attention. dropout: share of `rows` to be dropped. grad_basis [f, r]: what grad_rows are
    coordinates in. exchange: what decoded rows pass through, so that their gradients reach their nodes.
    """

    csr: CSR
    rows: Rows | None = None
    csr_t: CSR | None = None
    grad_rows: Rows | None = None
    rows_t: Rows | None = None
    softmax: Tensor | None = None
    dropout: float = 0.0
    grad_basis: Tensor | None = None
    exchange: Callable[[Tensor], Tensor] | None = None


class Exchange(torch.autograd.Function):
    """Decoded rows of a batch's halo, as they are.

    In the backward pass their gradients are left in the store for their nodes' next batches, and what other batches
    have left for this one's nodes joins the gradient of their states `own`. visit: a batch's `BatchGraph.visit`.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, own: Tensor, handle: int, halo: Tensor, n_id: Tensor, visit: Tensor | None):
        ctx.handle, ctx.dtype = handle, own.dtype
        ctx.save_for_backward(halo, n_id, visit)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, g: Tensor):
        halo, n_id, visit = ctx.saved_tensors
        own = torch.ops.vqgnn.exchange(ctx.handle, halo, g, n_id, visit)
        return None, own.to(ctx.dtype), None, None, None, None


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
        pending: keep the gradients that a node's state is given by messages to nodes of other batches, of this epoch
            and the last (`leave`, `collect`): of fp32 rows 8 bytes a channel, of other rows 4; with codes coordinates
            in a `Basis`, of 4 bytes: `Codec.pending_rank` of them.
        place: where the tables lie: "device" (the model's), "host" (RAM) or "disk" (memory-mapped scratch files). From
            the last two, batches on a GPU get their halo's rows, encoded, through a `TransferEngine`; on the CPU those
            on disk are read in place, once the engine has read ahead. "pinned" is RAM that a GPU's kernels read and
            write in place over the bus: no copies, for small halos.
        folder: of the scratch files; they have no names and end with the store. Needed for place="disk".
        device: that computes.
        engine: for place="host" and "disk", to share one; default: its own.
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
        pending: bool = False,
        place: str = "device",
        folder: str | Path | None = None,
        device: torch.device | str | None = None,
        engine: TransferEngine | None = None,
        **options,
    ):
        super().__init__()
        if place not in PLACES or (place == "disk" and folder is None):
            raise ValueError(f"place={place!r}, folder={folder!r}: use one of {', '.join(PLACES)}; disk needs a folder")
        if place == "pinned" and not torch.cuda.is_available():
            raise ValueError("place='pinned' is for the kernels of a GPU, and torch sees none; use place='device'")
        self.num_nodes, self.dim, self.codec, self.grad = num_nodes, dim, Codec.parse(codec), grad
        self.place, self._engine = place, engine
        self._device = None if device is None else torch.empty(0, device=device).device
        self._numbers: dict[str, int] = {}  # of the tables that the engine knows
        zeros = partial(tables.zeros, folder) if place == "disk" else torch.zeros
        encoded = partial(torch.zeros, pin_memory=True) if place == "pinned" else zeros
        data, scale = self.codec.table(num_nodes, dim, encoded)
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.codebook = None
        if self.codec.name == "pq":
            d, e = self.codec.branch_dim, self.codec.grad_dim
            if grad and heads and e not in (None, d):
                raise ValueError(f"codec={self.codec}: of an attention gradients are kept by channel; leave e={e} out")
            options["grad_dim"] = d if heads else e or -(-d // 4)
            self.codebook = Codebook(dim, d, self.codec.num_codes, grad, seed=seed, **options)
        elif options:
            raise ValueError(f"codebook options {sorted(options)} were given, but codec={self.codec} has no codebook")
        rows_of_gradients = grad and self.codebook is None
        grad_data, grad_scale = self.codec.table(num_nodes, dim, encoded) if rows_of_gradients else (None, None)
        self.register_buffer("grad_data", grad_data)
        self.register_buffer("grad_scale", grad_scale)
        softmax = None
        if grad and heads:
            softmax = zeros(num_nodes, 2, heads)
            softmax[:, 0] = torch.inf  # of a node never pushed: exp(score - inf) = 0, so it sends no gradient
        self.register_buffer("softmax", softmax)
        pair, self.pending_basis = (None, None), None
        if pending:
            rank = dim if self.codebook is None else self.codec.pending_rank(dim)
            kind = torch.float32 if self.codec.name == "fp32" else torch.bfloat16
            pair = zeros(num_nodes, rank, dtype=kind), zeros(num_nodes, rank, dtype=kind)
            self.pending_basis = Basis(dim, rank) if rank < dim else None
        for name, table in zip(("pending", "pending_next"), pair, strict=True):
            self.register_buffer(name, table)
        share = torch.ones((), dtype=torch.float32) if pending else None  # of it that is handed out
        self.register_buffer("pending_share", share)
        self.register_buffer("handed", None, persistent=False)  # [n] who has been given it, where nodes come again
        self._visits: dict[tuple[int, int, int], None] = {}  # of this epoch's batches that left gradients, in order
        written = zeros(num_nodes, dtype=torch.int32).fill_(_NEVER)
        self.register_buffer("written", written)  # step of the last push
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._register()
        if device is not None:
            self._follow(self._device)

    @classmethod
    def size_of(cls, **options) -> int:
        """`nbytes` of a store with these arguments, which is not made."""
        with torch.device("meta"):
            return cls(**options).nbytes

    def _register(self) -> None:
        self.handle = next(_HANDLES)
        _STORES[self.handle] = self

    def _save_to_state_dict(self, *args) -> None:
        self.flush()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args) -> None:
        self.flush()  # or a push under way would write over what is loaded
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        self.flush()
        return self.__dict__ | {"_engine": None, "_numbers": {}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.place == "pinned":
            for name in _ENCODED:
                table = getattr(self, name)
                setattr(self, name, None if table is None else table.pin_memory())
        self._register()  # a copy records into itself

    def _apply(self, fn, recurse: bool = True):
        """Follow the model to another device, but keep the dtypes: `model.half()` must not change the codec."""
        self._follow(fn(torch.empty(0, device=self.device)).device)
        return self

    def _follow(self, device: torch.device) -> None:
        if self.place == "device":
            super()._apply(lambda tensor: tensor.to(device))
            return
        if device != self.device:
            raise ValueError(
                f"node state on {self.place} serves {self.device} and cannot move to {device}; move the model there, "
                "then convert it"
            )
        if self.codebook is not None:
            self.codebook.to(device)
        if self.place == "pinned":
            for name, table in self.named_buffers(recurse=False):
                if name not in _ENCODED:
                    setattr(self, name, table.to(device))

    def extra_repr(self) -> str:
        return f"num_nodes={self.num_nodes}, dim={self.dim}, codec={self.codec}, grad={self.grad}, place={self.place}"

    @property
    def device(self) -> torch.device:
        """Where pushed states are and pulled ones come."""
        return self.data.device if self.place == "device" else self._device or torch.device("cpu")

    @property
    def in_place(self) -> bool:
        """Whether kernels read and write the tables where they lie."""
        return self.place in ("device", "pinned") or (self.place == "disk" and self.device.type == "cpu")

    @property
    def engine(self) -> TransferEngine:
        """Moves rows of tables that are not on the device; made at the first use."""
        if self._engine is None:
            self._engine = TransferEngine(device=self.device)
        return self._engine

    @property
    def rows(self) -> Rows:
        """States as `aggregate` reads them in place."""
        return Rows(self.codec.name, self.data, self.scale, self.codebook.x_values if self.codebook else None)

    @property
    def grad_rows(self) -> Rows | None:
        """Gradients as `aggregate`'s backward reads them in place, with `grad_basis`; None without a gradient store."""
        if not self.grad:
            return None
        if self.codebook:
            return Rows("pq", self.data, None, self.codebook.g_values)
        return Rows(self.codec.name, self.grad_data, self.grad_scale, None)

    @property
    def grad_basis(self) -> Tensor | None:
        """[f, r]: grad_rows are coordinates of gradients in it; None: they are the gradients."""
        return self.codebook.basis.vectors if self.grad and self.codebook and self.codebook.basis else None

    def start(self, csr: CSR, csr_t: CSR) -> dict[str, Ticket]:
        """Begin to bring what `neighbours` will read of a batch with this halo, whose ids are in host memory.

        It is what pushes so far have written. Read in place from disk, pages are only read ahead.
        """
        if self.place in ("device", "pinned"):
            return {}
        wanted = {"data": csr.halo, "scale": csr.halo}
        if self.grad and torch.is_grad_enabled():
            wanted |= {name: csr_t.halo for name in ("grad_data", "grad_scale", "softmax")}
            if csr_t.halo is not csr.halo and (self.codebook is not None or self.softmax is not None):
                wanted |= {"data_t": csr_t.halo, "scale_t": csr_t.halo}
        tickets = {}
        for name, n_id in wanted.items():
            table = name.removesuffix("_t")
            if getattr(self, table) is not None:
                operation = self.engine.read_ahead if self.in_place else self.engine.pull
                tickets[name] = operation(self._number(table), n_id)
        return tickets

    def neighbours(self, csr: CSR, csr_t: CSR, started: dict[str, Ticket] | None = None) -> Neighbours:
        """What a conv reads of a batch with these matrices; `started` by `start`, unless the tables are in place."""
        rows, grad_rows, rows_t, basis = self.rows, self.grad_rows, self.rows, self.grad_basis
        if self.in_place:
            softmax = None if self.softmax is None else self.softmax[csr_t.halo]
            return Neighbours(csr, rows, csr_t, grad_rows, rows_t, softmax, grad_basis=basis)
        got = {name: ticket.wait() for name, ticket in started.items()}
        rows = rows._replace(data=got["data"], scale=got.get("scale"))
        rows_t = rows._replace(data=got["data_t"], scale=got.get("scale_t")) if "data_t" in got else rows
        if self.codebook is not None and self.grad and torch.is_grad_enabled():
            grad_rows = grad_rows._replace(data=rows_t.data)
        elif "grad_data" in got:
            grad_rows = grad_rows._replace(data=got["grad_data"], scale=got.get("grad_scale"))
        else:
            grad_rows = None
        csr, csr_t = csr._replace(halo=None), csr_t._replace(halo=None)
        return Neighbours(csr, rows, csr_t, grad_rows, rows_t, got.get("softmax"), grad_basis=basis)

    @_exact
    def push(self, n_id: Tensor, x: Tensor, g: Tensor | None = None, softmax: Tensor | None = None) -> None:
        """Write states x [b, dim] and gradients g [b, dim] of nodes n_id [b]; a codebook learns from them.

        With codes, leaving g out keeps the gradient codewords; with gradient rows it keeps those rows. softmax
        [b, 2, heads] goes with g where the store was made with heads. Rows that overflowed count as 0. For
        place="host" and "disk" n_id is in host memory; one on a GPU must be waited for.
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
        n_id = n_id.to(self.written.device)
        if self.codebook is None:
            x, g = finite(x), None if g is None else finite(g)
        if g is not None and softmax is not None:  # the second is <g, M>
            softmax = torch.cat([softmax[:, :1], softmax[:, 1:].nan_to_num(0.0, 0.0, 0.0)], 1)
        value = self.codebook.update(x.float(), None if g is None else g.float()) if self.codebook else x
        self._write("", n_id, value)
        if g is not None and self.grad_data is not None:
            self._write("grad_", n_id, g)
        if self.softmax is not None and softmax is not None:
            if self.in_place:
                self.softmax[n_id] = softmax
            else:
                self._send("softmax", n_id, softmax)
        self.step += 1
        self.written[n_id] = self.step.to(torch.int32)

    def begin(self, visit: tuple[int, int, int] | None) -> bool:
        """Say what the next `leave` and `collect` are of (`BatchGraph.visit`); whether it is another visit than before.

        With another pass than before, or with a batch that comes again after others, an epoch is over. None is not
        known: the epoch goes on. A node that an epoch was broken off before, or that has no batch in it, does not get
        what was left for it in the epoch before.
        """
        if visit is None:
            return True
        last = next(reversed(self._visits), None)
        if visit == last:
            return False
        if last is None or visit[0] != last[0] or visit in self._visits:
            self._turn()
            self._visits = {}
            self.handed = torch.zeros_like(self.written, dtype=torch.bool) if visit[2] else None
        self._visits[visit] = None
        return True

    @_exact
    def leave(self, n_id: Tensor, g: Tensor) -> None:
        """Keep gradients g [h, dim] of states that a batch has read, of different n_id [h], for the next epoch."""
        if n_id.numel() == 0:
            return
        g = finite(g).float()
        if self.pending_basis is not None:
            self.pending_basis.update(g)
            g = g @ self.pending_basis.vectors
        table = self.pending_next
        table[n_id] = (table[n_id].float() + g).to(table.dtype)

    @_exact
    def collect(self, n_id: Tensor) -> Tensor:
        """[b, dim] fp32: what epochs before have left for nodes n_id [b], times `pending_share`; once an epoch.

        Of a whole epoch, in which each node was in a batch, it is what a node's neighbours send, once, but for those
        that were in its own batch. Had it been taken since the node's own last batch, some would send twice and some
        not at all, which does more harm than that it is older.
        """
        g = self.pending[n_id].float() * self.pending_share
        if self.handed is not None:
            g *= ~self.handed[n_id][:, None]
            self.handed[n_id] = True
        return g if self.pending_basis is None else g @ self.pending_basis.vectors.T

    @_exact
    def _turn(self) -> None:
        """An epoch is over: what it has left joins the mean that is handed out in the next.

        Most of what one epoch leaves is noise of its batches and dropout, so that a mean over epochs, an exponential
        one, tells the next epoch's better than the last epoch does. It is weighted by least squares, by how much of it
        came again in this epoch (all nodes and all coordinates together): 1 where weights rest, little where steps are
        large or labels few. In full, the loss of long runs rises.
        """
        products = torch.zeros(2, dtype=torch.float32, device=self.pending.device)
        for mean, new in zip(self.pending.split(_FILLED), self.pending_next.split(_FILLED), strict=True):
            mean, new = mean.float().flatten(), new.float().flatten()
            products += torch.stack([mean @ new, mean @ mean])
        began = products[1] > 0  # else this is the first epoch, and the mean
        self.pending_share.copy_((products[0] / products[1]).clamp(0.0, 1.0).where(began, 1.0))
        weight = torch.where(began, 1 - _PENDING_DECAY, 1.0)
        for mean, new in zip(self.pending.split(_FILLED), self.pending_next.split(_FILLED), strict=True):
            mean.copy_(mean.float().lerp(new.float(), weight))
        self.pending_next.zero_()

    def fill(self, rows: Tensor, progress: bool = False) -> None:
        """Push the states of all nodes, rows [n, dim], in random order."""
        n = rows.size(0)
        if n != self.num_nodes:
            raise ValueError(
                f"the store is of {self.num_nodes} nodes and got rows of {n}; convert the model for this graph"
            )
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(rows.device).split(_FILLED)
        for n_id in tqdm(order, disable=not progress, desc="filling a store", leave=False):
            self.push(n_id, rows[n_id].to(self.device, torch.float32))
        if self.codebook is not None:  # the first codes were given before the codebook had seen all rows
            for n_id in torch.arange(n, device=rows.device).split(_FILLED):
                self.recode(n_id, rows[n_id].to(self.device))

    @torch.no_grad()
    def recode(self, n_id: Tensor, x: Tensor) -> None:
        """Write the codes of states x [b, dim] of nodes n_id [b] by the codebook as it is; it does not learn."""
        self._write("", n_id.to(self.written.device), self.codebook.assign(x.float()))

    def _write(self, prefix: str, n_id: Tensor, value: Tensor) -> None:
        """Encode rows into a pair of tables (data, scale)."""
        names = (f"{prefix}data", f"{prefix}scale")
        pair = [getattr(self, name) for name in names]
        if self.in_place:
            kernels.push_rows(Rows(self.codec.name, *pair), n_id, value)
            return
        block = [None if t is None else value.new_empty(len(value), t.size(1), dtype=t.dtype) for t in pair]
        kernels.push_rows(Rows(self.codec.name, *block), torch.arange(len(value), device=value.device), value)
        for name, rows in zip(names, block, strict=True):
            if rows is not None:
                self._send(name, n_id, rows)

    def _send(self, name: str, n_id: Tensor, rows: Tensor) -> None:
        self.engine.push(self._number(name), n_id, rows.contiguous())

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = self.engine.add_table(getattr(self, name))
        return self._numbers[name]

    def flush(self) -> None:
        """Wait until the tables hold every push."""
        if self._engine is not None:
            self._engine.flush()

    def pull(self, n_id: Tensor | None = None) -> Tensor:
        """Decoded states [b, dim] fp32 of nodes n_id [b] (None: of all)."""
        if self.in_place:
            return kernels.pull_rows(self.rows, n_id, self.dim)
        with torch.no_grad():
            return kernels.pull_rows(self._brought(n_id).rows, None, self.dim)

    def pull_gradients(self) -> Tensor:
        """Decoded gradients [n, dim] fp32 of all nodes; 0 where none are kept."""
        if not self.grad:
            return torch.zeros(self.num_nodes, self.dim, dtype=torch.float32, device=self.device)
        if self.in_place:
            rows = self.grad_rows
        else:
            with torch.enable_grad():  # a forward alone would not bring them
                rows = self._brought(None).grad_rows
        basis = self.grad_basis
        if basis is None:
            return kernels.pull_rows(rows, None, self.dim)
        return kernels.pull_rows(rows, None, basis.size(1)) @ basis.T

    def _brought(self, n_id: Tensor | None) -> Neighbours:
        """The tables' rows of nodes n_id (None: of all), on the device."""
        n_id = torch.arange(self.num_nodes) if n_id is None else n_id
        halo = CSR(n_id, n_id, None, n_id.cpu())
        return self.neighbours(halo, halo, self.start(halo, halo))

    @torch.no_grad()
    def quantised(self, x: Tensor) -> Tensor:
        """States x [b, dim] as a push and a pull would give them back, fp32; a codebook does not learn from them."""
        pair = self.codec.table(x.size(0), self.dim, partial(torch.zeros, device=x.device))
        rows = self.rows._replace(data=pair[0], scale=pair[1])
        n_id = torch.arange(x.size(0), device=x.device)
        kernels.push_rows(rows, n_id, self.codebook.assign(x.float()) if self.codebook else x)
        return kernels.pull_rows(rows, None, self.dim)

    @property
    def age(self) -> Tensor:
        """[n] steps since each node's state was written; the number of all steps for one never written."""
        return torch.where(self.written == _NEVER, self.step, self.step - self.written)

    @property
    def tables(self) -> dict[str, Tensor]:
        """The buffers with a row a node: what lies on disk for place="disk"."""
        self.flush()
        return {name: t for name, t in self.named_buffers(recurse=False) if t.dim() and t.size(0) == self.num_nodes}

    def save_tables(self, path: str | Path, **about: Any) -> None:
        """Write the tables to a snapshot, whole or not at all; `about` (generation, graph, ...) is asked for by `load`.

        The rest of the store is small: its state_dict without the keys of `tables`.
        """
        tables.save(path, self.tables, {**self._about(), **about})

    def load_tables(self, path: str | Path, **about: Any) -> None:
        """Fill the tables from a snapshot; a ValueError says in a line why it is not this store's, or not whole."""
        tables.load(path, self.tables, {**self._about(), **about})

    def _about(self) -> dict[str, Any]:
        kept = "pending" if self.pending is not None else self.grad
        return {"codec": str(self.codec), "nodes": self.num_nodes, "dim": self.dim, "grad": kept}

    @property
    def nbytes(self) -> int:
        """Bytes of state: everything in this store, ages and codebooks included."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same state as fp32 rows (the histories of GNNAutoScale)."""
        return 4 * self.num_nodes * self.dim

    def stats(self) -> dict[str, float]:
        """Mean staleness in steps; with a codebook its health (see `Codebook.stats`); of attention `pending_share`."""
        health = self.codebook.stats() if self.codebook else {}
        if self.pending is not None:
            health["pending_share"] = float(self.pending_share)
        return {"staleness": float(self.age.float().mean()), **health}
