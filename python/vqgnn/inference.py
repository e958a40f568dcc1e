"""Inference layer by layer: exact for every node, in bounded memory, without touching the training store."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_geometric.data import Data, HeteroData
from tqdm import tqdm

from vqgnn_kernels import Rows

from . import hetero_inference, tables
from .calling import alike, call_model, device_of, evaluating
from .dependence import Dependence
from .generic import GenericConv
from .graph import BatchEdges, BatchGraph, Convolution, Graph, MovedBatch, node_tensors
from .loader import Batch, BatchLoader
from .store_conv import StoreConv

METHODS = ("exact", "vq", "stale")
_BATCH = 16_384  # nodes at a time: 8 MB an activation of 128 channels, below what malloc takes from the system
_INPUTS = 2**23  # numbers of their features at a time, or 1,024 nodes
_PROBE_NODES = 8


@torch.no_grad()
def layerwise(
    model: nn.Module,
    data: Data | HeteroData,
    batch_size: int | None = None,
    method: str = "exact",
    dtype: torch.dtype = torch.float32,
    folder: str | Path | None = None,
    forward: Callable[[nn.Module, Batch], Tensor] = call_model,
    progress: bool = False,
) -> Tensor | dict[str, Tensor]:
    """The converted model's output for every node of `data`, [n, out_channels]; a dict by type where it returns one.

    One pass over the nodes a conv: pass l computes conv l for every node from exact inputs of every neighbour, and
    records what the next conv is given. Its output is kept, too, where more than the next conv depends on it, as with
    jumping knowledge; a residual, conv(x) + skip(x), needs no more than the recorded x. The result is the whole
    graph's, for any model; memory is O(n f) for the kept rows and O(batch_size f) for the rest.

    Args:
        model: a converted model; it is put in evaluation mode for the time.
        batch_size: nodes at a time, default 16,384, fewer where they have more than 512 features; with method "vq" a
            tenth of the nodes at most: a batch's own rows are exact. All of them at once where the model's own code
            takes statistics over nodes, as GraphNorm, PairNorm or x.mean(0) do: in batches its result would not be the
            whole graph's.
        method: "exact"; "vq" (neighbours by the store's codebooks, codes refreshed layer by layer); or "stale" (one
            pass over mini-batches of batch_size nodes, default a tenth, with the training store's states: the paper's).
        dtype: of the kept rows, float32 or float16 (half the memory, exact to 3 digits).
        folder: keep the rows, and the result, in memory-mapped scratch files in this folder instead of in RAM.
        forward: how to call the model on a batch, which has what one of BatchLoader has; default
            `model(batch.x, batch.graph)`.

    Raises:
        ValueError: an unknown option, a model that is not converted, or a batch_size below the number of nodes for a
            model with statistics over nodes.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype={dtype} is not supported for kept rows; use torch.float32 or torch.float16")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if folder is not None and not isinstance(data, HeteroData) and data.x.is_cuda:
        raise ValueError(f"folder={str(folder)!r} needs data on the CPU, its x is on {data.x.device}; leave folder out")
    convs = [module for module in model.modules() if isinstance(module, StoreConv)]
    if not convs or any(conv.store_use is None for conv in convs):
        raise ValueError(f"model {type(model).__name__} is not converted; call vqgnn.convert(model, data) first")
    if isinstance(data, HeteroData):
        return hetero_inference.layerwise(model, data, batch_size, method, dtype, folder, forward, progress)
    with evaluating(model):
        if method == "stale":
            loader = BatchLoader(data, batch_size, seed=0, device=device_of(model, data))
            outputs = None
            for batch in tqdm(loader, disable=not progress, desc="inference", leave=False):
                out = _node_rows(forward(model, batch), batch)
                if outputs is None:
                    outputs = torch.empty(data.num_nodes, *out.shape[1:], dtype=out.dtype, device=data.x.device)
                outputs[batch.graph.origin.n_id] = out.to(data.x.device)
            return outputs
        return _Sweep(data, batch_size, dtype, folder, forward, progress, quantise=method == "vq").run(model)


@torch.no_grad()
def can_split(model: nn.Module, data: Data, forward: Callable[[nn.Module, Batch], Tensor] = call_model) -> bool:
    """Whether a converted model may compute some nodes without the others; not with statistics over nodes."""
    with evaluating(model):
        sweep = _Sweep(data, None, torch.float32, None, forward, False, quantise=False)
        sweep.device = device_of(model, data)
        return sweep._structure(model).splits


@torch.no_grad()
def warmup(
    model: nn.Module,
    data: Data | HeteroData,
    forward: Callable[[nn.Module, Batch], Tensor] = call_model,
    dtype: torch.dtype = torch.float32,
    folder: str | Path | None = None,
    progress: bool = False,
) -> None:
    """Fill the stores of a converted model by one exact forward sweep, codebooks included.

    `convert` does it; do it again after loading other weights. Gradients that are kept stay as they are.
    dtype, folder and progress are those of `layerwise`.
    """

    if isinstance(data, HeteroData):
        hetero_inference.fill_stores(model, data, forward, dtype, folder, progress)
        return

    def fill(conv: StoreConv, rows: Tensor) -> None:
        conv.store_use.store.fill(rows, progress)

    visit_inputs(model, data, fill, forward, dtype, folder, progress)


@torch.no_grad()
def estimate_norms(model: nn.Module, data: Data, forward: Callable[[nn.Module, Batch], Tensor] = call_model) -> None:
    """Set the running statistics of a converted model's BatchNorms to those of one exact pass over all nodes.

    The pass keeps one layer's rows of all nodes at a time in memory. data: in memory, what `convert` was given.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        try:
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean of all passes: of this one
            for batch in BatchLoader(data, data.num_nodes, device=device_of(model, data)):
                forward(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@torch.no_grad()
def visit_inputs(
    model: nn.Module,
    data: Data,
    visit: Callable[[StoreConv, Tensor], None],
    forward: Callable[[nn.Module, Batch], Tensor] = call_model,
    dtype: torch.dtype = torch.float32,
    folder: str | Path | None = None,
    progress: bool = False,
) -> None:
    """Call `visit(conv, X)` for each conv with a store, with the exact states X [n, f] of all nodes that it is of.

    One exact forward sweep; dtype, folder and progress are those of `layerwise`.
    """
    visited = set()

    def stored(conv: StoreConv, rows: Tensor) -> None:
        if conv.store_use.store is not None:
            visited.add(conv.store_use.store)
            visit(conv, rows)

    with evaluating(model):
        _Sweep(data, None, dtype, folder, forward, progress, on_inputs=stored).run(model)
    for conv in model.modules():  # a store of the first conv's inputs (input="codes") is no conv's output
        if isinstance(conv, StoreConv) and conv.store_use.store not in {None, *visited}:
            visit(conv, conv.state(data.x.to(device_of(model, data))))


class _Edgeless(BatchGraph):
    """A batch without edges: a conv's result for a node is then that node's affair alone."""

    def edges(self, convolution: Convolution, valued: bool = False) -> BatchEdges:
        none = self.n_id[:0]
        return BatchEdges(none.expand(2, 0), none, none)


class _NextConv(Exception):
    """Raised by a conv that is reached before its inputs are known for every node."""


def _node_rows(out: object, batch: Batch) -> Tensor:
    """What a model has returned for a batch, if that is a row a node."""
    if isinstance(out, Tensor) and out.dim() and out.size(0) == batch.num_nodes:
        return out
    came = f"a tensor {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
    raise ValueError(
        f"the model returned {came} for {batch.num_nodes} nodes; inference takes one tensor with a row a node: give "
        "forward=, as lambda model, batch: model(batch.x, batch.graph)[0]"
    )


class _Structure(NamedTuple):
    """What a model does between its convs.

    chain: what follows a conv depends on that conv's input and output alone, of all that convs are given and return;
    and each conv tells neighbours its own x. splits: but for messages, the model computes the same for some nodes with
    and without the others. refilled: the convs whose input, if it is written anew, is so for all that follows.
    """

    num_convs: int
    chain: bool
    splits: bool
    refilled: frozenset[int]


class _Sweep:
    """The passes of layer-wise inference. Set as a batch's `run`, it answers for every conv (see BatchGraph)."""

    def __init__(self, data, batch_size, dtype, folder, forward, progress, quantise=False, on_inputs=None):
        self.graph, self.tensors = Graph.of(data), node_tensors(data)
        self.batch_size = batch_size
        self.dtype, self.folder, self.forward, self.progress = dtype, folder, forward, progress
        self.quantise, self.on_inputs = quantise, on_inputs
        self.of_states = quantise or on_inputs is not None  # what stores keep is recorded, not what neighbours are told
        self.chain = False  # whether a conv's input and output are all that is used of it: it need not be kept then
        self.outputs: list[Tensor | None] = []  # of the convs that are done, in the order of their calls
        self.widths: list[int] = []  # their channels
        self.inputs: Rows | None = None  # what the conv of this pass is given, for every node
        self.recorded: Tensor | None = None  # what the next conv is given, as far as this pass has come
        self.target: StoreConv | None = None

    def run(self, model: nn.Module) -> Tensor | None:
        graph = self.graph
        self.device = device_of(model, graph)
        n = graph.num_nodes
        # Codes are what a batch reads of the nodes outside it: of one batch that is the graph, none would be read.
        few = math.ceil(n / 10) if self.quantise else max(1024, _INPUTS // max(1, graph.x.size(1)))
        batch_size = self.batch_size or min(_BATCH, few)
        num_convs, chain, splits, self.refilled = self._structure(model)
        self.chain = chain and not self.quantise
        if batch_size < n and not splits:
            if self.batch_size is not None:
                raise ValueError(
                    f"batch_size={batch_size} splits the {n} nodes, but {type(model).__name__} takes statistics over "
                    "all nodes that it sees (GraphNorm, PairNorm, LayerNorm(mode='graph'), x.mean(0), ...); leave "
                    "batch_size out, which runs all nodes at once, or use norms of one node (LayerNorm(mode='node')) "
                    "or with running statistics (BatchNorm)"
                )
            batch_size = n
        ranges = [(s, min(s + batch_size, n)) for s in range(0, n, batch_size)]
        result, done = None, False
        while not done:
            self.outputs.append(None)
            self.recorded = None
            self.last = len(self.outputs) == num_convs
            if self.last and self.on_inputs is not None and (self.inputs is not None or num_convs > 1):
                return None  # every conv's inputs are known
            for start, stop in tqdm(ranges, disable=not self.progress, desc=f"pass {len(self.outputs)}", leave=False):
                self.range, self.call = (start, stop), 0
                x = graph.x if stop - start == graph.num_nodes else graph.x[start:stop]
                batch_graph = BatchGraph(graph, torch.arange(start, stop, device=x.device), x, run=self)
                if x.device != self.device:
                    batch_graph = MovedBatch(batch_graph, lambda tensor: tensor.to(self.device))
                batch = Batch.of(batch_graph, self.tensors)
                try:
                    out = self.forward(model, batch)
                except _NextConv:
                    continue
                done = True
                if self.on_inputs is not None:  # nobody asks for the result
                    continue
                out = _node_rows(out, batch)
                if result is None:
                    result = self._rows(*out.shape[1:], dtype=out.dtype)
                result[start:stop] = out
            if len(self.widths) < len(self.outputs):  # this pass met no conv to compute: it only recorded inputs
                self.outputs.pop()
            if self.recorded is not None:
                self._close_inputs()
        return result

    def __call__(self, conv: StoreConv, x: Tensor, batch: BatchGraph, output=None) -> Tensor:
        """What a conv returns for x. `output(table of all nodes' inputs, x)` computes it where PyG's code does."""
        start, stop = self.range
        index, self.call = self.call, self.call + 1
        if index < len(self.outputs) - 1:
            if self.chain:  # nobody will look: the conv of this pass has its x from the recorded inputs
                return x.new_zeros(stop - start, self.widths[index])
            return self.outputs[index][start:stop].to(x)
        if self.chain and self.inputs is not None and index == len(self.outputs) - 1:
            known = self.inputs.data[start:stop]
            x = x.copy_(known) if index in self.refilled else known.to(x)  # refilled: a residual takes x, too
        source = conv.state(x) if self.of_states else conv.message_input(x)
        if index >= len(self.outputs) or (source is not batch.x and self.inputs is None):
            return self._record(conv, source)
        if output is not None:
            out = output(self.graph.features if source is batch.x else self.inputs, x)
        else:
            out = conv.combine(x, self._messages(conv, x, source, batch))
        if len(self.widths) == index:
            self.widths.append(out.size(1))
            if not (self.chain or self.last):
                self.outputs[index] = self._rows(out.size(1))
        if self.outputs[index] is not None:
            self.outputs[index][start:stop] = out
        return out

    def _structure(self, model: nn.Module) -> _Structure:
        """From a few nodes."""
        rows: list[Tensor] = []  # what the model computes between messages
        num_convs, chain, refilled = 0, True, set()
        generator = nodes = None
        count = min(_PROBE_NODES, self.graph.num_nodes)

        def note(conv: StoreConv, x: Tensor, batch: BatchGraph, output=None) -> Tensor:
            nonlocal num_convs, chain
            source = conv.message_input(x)
            chain = chain and conv.chains and source is x and not skips(x)
            given = dependence.cut(x)
            out = conv.combine(given, torch.zeros_like(source)) if output is None else output(None, given)
            rows.extend([given, out])
            # random, as without messages all nodes may be alike, and statistics over them would not show
            out = noise(out)
            dependence.mark(out, num_convs)
            whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes  # no part of something else
            if whole and dependence.of(x):  # not what is given to the model
                dependence.mark(x, num_convs)
                refilled.add(num_convs)
            num_convs += 1
            return out

        def skips(value: Tensor) -> bool:
            """Whether it depends on what a conv before the last one was given or has returned."""
            return not dependence.of(value) <= {num_convs - 1}

        def noise(like: Tensor) -> Tensor:
            """The same for a node, whichever others there are."""
            return torch.rand(count, *like.shape[1:], generator=generator)[nodes].to(like)

        def run(part: slice) -> Tensor:
            nonlocal generator, num_convs, nodes
            generator, num_convs, nodes = torch.Generator().manual_seed(0), 0, part
            x, n_id = self.graph.x[:count][nodes].to(self.device), torch.arange(count, device=self.device)[nodes]
            batch_graph = _Edgeless(self.graph, n_id, x + noise(x) / 2, run=note)
            batch = Batch.of(batch_graph, self.tensors)
            for name in self.tensors:
                value = getattr(batch, name)
                setattr(batch, name, value + noise(value) / 2 if value.is_floating_point() else value)
            out = self.forward(model, batch)
            rows.extend(value for value in tree_leaves(out) if isinstance(value, Tensor) and value.dim())
            return out

        with Dependence() as dependence:
            out = run(slice(count))
        # With what the host reads it may choose what to call, and must read the real values.
        is_chain = chain and not skips(out) and not dependence.read
        together = rows[:]
        rows.clear()
        splits = True
        half = min(count, max(2, count // 2))  # one row alone has no variance
        for part in (slice(half), slice(count - half, count)):  # the largest row of all, or the first, is not in both
            run(part)
            splits &= all(alike(a[part], b) for a, b in zip(together, rows, strict=True))
            rows.clear()
        splits &= all(conv.survey.splits for conv in model.modules() if isinstance(conv, GenericConv))
        return _Structure(num_convs, is_chain, splits, frozenset(refilled))

    def _messages(self, conv: StoreConv, x: Tensor, source: Tensor, batch: BatchGraph) -> Tensor:
        use, dim = conv.store_use, source.size(1)
        if source is batch.x and conv.fixed:
            if use.input == "precompute":
                return self.graph.product(use.convolution)[slice(*self.range)].to(source)
            return self.graph.propagate(use.convolution, self.graph.features, *self.range, dim).to(source)
        if self.quantise or not conv.fixed:
            messages = conv.state_messages if self.of_states else conv.batch_messages
            table = self.graph.features if source is batch.x else self.inputs
            return messages(source, batch.read(table, use.convolution), conv.message_query(x))[0]
        return self.graph.propagate(use.convolution, self.inputs, *self.range, dim).to(source)

    def _record(self, conv: StoreConv, source: Tensor) -> Tensor:
        """Keep what the next conv is given for these nodes and leave the model, until all nodes are known."""
        start, stop = self.range
        self.target = conv
        if self._codes(conv):
            if conv.store_use.store is None or conv.store_use.store.codebook is None:
                raise ValueError("method='vq' needs a model converted with method='vq'; use method='exact'")
            source_codes = conv.store_use.store.codebook.assign(source)
            if self.recorded is None:
                self.recorded = self._rows(source_codes.size(1), dtype=source_codes.dtype)
            self.recorded[start:stop] = source_codes
        else:
            if self.recorded is None:
                self.recorded = self._rows(source.size(1))
            self.recorded[start:stop] = source
        raise _NextConv

    def _codes(self, conv: StoreConv) -> bool:
        """Whether what this conv is given is kept as codes; an input layer that reads exact rows stays exact."""
        return self.quantise and conv.store_use.input is None

    def _close_inputs(self) -> None:
        if self._codes(self.target):
            self.inputs = Rows("pq", self.recorded, None, self.target.store_use.store.codebook.x_values)
        else:
            self.inputs = Rows("fp32" if self.dtype == torch.float32 else "fp16", self.recorded, None, None)
        if self.on_inputs is not None:  # the last layer's rows, [n, f] too, are given up by now
            self.on_inputs(self.target, self.recorded)

    def _rows(self, *dims: int, dtype: torch.dtype | None = None) -> Tensor:
        """An [n, *dims] table in RAM or in a scratch file."""
        size, dtype = (self.graph.num_nodes, *dims), dtype or self.dtype
        if self.folder is None:
            return torch.empty(size, dtype=dtype, device=self.graph.x.device)
        return tables.zeros(self.folder, *size, dtype=dtype)
