"""Give an existing PyG model mini-batches that keep every message."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch_geometric.data import Data, HeteroData

from . import hetero
from .attention import Attention
from .calling import call_model, device_of, evaluating
from .dropout import watch_dropout
from .generic import GenericConv, make_generic
from .graph import BatchGraph, Graph, node_tensors, not_an_edge_index, require_unchanged, version
from .inference import warmup
from .loader import Batch
from .nn import CONVS
from .partitioning import cache_folder
from .places import resolve
from .pyg_code import has_message_hooks
from .relation_conv import RelationConv
from .store import Codec, NodeStore
from .store_conv import INPUTS, StoreConv, StoreUse
from .survey import examine, settle
from .transfer import TransferEngine

# method -> default codec, gradient store
METHODS = {
    "vq": ("pq:d=4,k=256", True),
    "gas": ("fp32", False),
    "lmc": ("fp32", True),
    "drop": (None, False),
    "full": (None, False),
}
ATTENTION_STATES = ("input", "projected")
_PROBE_NODES = 8


def convert(
    model: nn.Module,
    data: Data | HeteroData,
    method: str = "vq",
    codec: str | Codec | None = None,
    input: str = "auto",
    grad: bool | None = None,
    attention_state: str | None = None,
    fill: bool = True,
    seed: int = 0,
    forward: Callable[[nn.Module, object], Tensor] = call_model,
    place: str = "auto",
    folder: str | Path | None = None,
    **codebook,
) -> nn.Module:
    """Swap the convs of a PyG model, in place, for ones that read a node-state store; the weights stay.

    What is stored of a node is its row as it was before the dropout that a conv's input comes from.

    Args:
        model: any module whose message passing is done by PyG's convs. GCNConv, SAGEConv (mean, sum), GINConv, GATConv,
            GATv2Conv (both with edge_dim too), TransformerConv (without) and ChebConv have fused kernels; every other
            `MessagePassing`, and one with hooks on its messages, runs its own code (`vqgnn.paths` tells which does).
        data: the whole graph; normalisation coefficients come from it, and edge_weight, edge_attr and edge_type where
            a conv takes them (call it with None in their place). It may stay in RAM for a model of fused convs on a
            GPU: give BatchLoader the model's device then. With a `HeteroData` each conv of the model, made by PyG's
            `to_hetero` or of its `HeteroConv` layers, serves one edge type: conv((x_source, x_target), graph).
        method: "vq" (product-VQ codes of states and gradients, VQ-GNN), "gas" (rows of states, GNNAutoScale), "lmc"
            (rows of both), "drop" (no out-of-batch messages, Cluster-GCN) or "full" (no store: whole-graph batches).
        codec: how states are kept: "fp32", "fp16", "int8", "int4" or "pq:d=4,k=256" (see `Codec`). Default: the
            method's.
        input: how the first conv reads the given features: "precompute" C X once, exact "rows" of the halo, "codes" as
            in the paper, or "auto": C X where the conv gets `batch.x` itself, rows where dropout comes between (in
            training; `vqgnn.paths` shows C X) or the conv is an attention. Of a HeteroData, "auto" is rows: C X is a
            table for every edge type.
        grad: whether gradients of out-of-batch nodes are kept and compensated (eq. 7). Default: the method's for fixed
            convolutions, for inputs of a fused attention and wherever messages are summed; not for projected states of
            an attention, where the weights of out-of-batch messages follow a softmax that has gone stale, and training
            diverges (docs/why.md); nor for max, mean, std, ..., where it is exact too, but reads the rows of all nodes
            within two hops of a batch.
        attention_state: what is kept for a fused attention: its "input" (default), which reaches full batch's accuracy
            on more graphs, and of which the halo's rows are decoded and projected in every batch; or what it tells
            neighbours, "projected", which is read as it lies, with less memory. Gradients of inputs are left by a batch
            for the next batches of the nodes that it has read (`NodeStore.leave`): on a GPU where the states are, too.
        fill: fill the stores by one exact forward sweep now, so that no batch reads an empty store.
        seed: of the codebooks.
        forward: how to call the model on a batch, which has what one of BatchLoader has; default
            `model(batch.x, batch.graph)`, of a HeteroData `model(batch.x_dict, batch.graph_dict)`.
        place: where node state lies: "device" (the model's), "host" (RAM, for a model on a GPU and data in RAM), "disk"
            (memory-mapped files), or "auto": the first of them of whose free memory it would take at most half; or
            "pinned" (see `NodeStore`). A HeteroData takes "device" and, on the CPU, "disk".
        folder: of the scratch files of place="disk", which end with the process. Default: in the user's cache folder.
        codebook: further arguments of `vqgnn.Codebook`, e.g. decay=0.95.

    Returns:
        The model itself.

    Raises:
        ValueError: an unknown option, a conv or an option of one that cannot be converted, or a model without convs.
        OSError: the disk is too full for place="disk".
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, not a torch.nn.Module; call convert(model, data)")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    if input not in INPUTS:
        raise ValueError(f"input={input!r} is unknown; choose one of {', '.join(INPUTS)}")
    default_codec, default_grad = METHODS[method]
    if default_codec is None and (codec is not None or grad):
        raise ValueError(f"codec={codec!r}, grad={grad!r}: method={method!r} keeps no state; leave them out")
    if attention_state not in (None, *ATTENTION_STATES):
        allowed = ", ".join(ATTENTION_STATES)
        raise ValueError(f"attention_state={attention_state!r} is unknown; choose one of {allowed}, or leave it out")
    codec = default_codec if codec is None else Codec.parse(codec)
    if codec is not None and (Codec.parse(codec).name == "pq") != (method == "vq"):
        allowed = "pq:d=D,k=K" if method == "vq" else "fp32, fp16, int8 or int4"
        raise ValueError(f"codec={str(codec)!r} does not go with method={method!r}; use {allowed}, or another method")
    found = _find(model)
    if isinstance(data, HeteroData):
        if place in ("host", "pinned"):
            raise ValueError(f"place={place!r} is for Data; a HeteroData takes auto, device or, on the CPU, disk")
        if attention_state is not None:
            raise ValueError(f"attention_state={attention_state!r} is for Data; leave it out with a HeteroData")

        def make_stores(wanted: list[tuple[object, str, dict]]) -> None:
            on = device_of(model, data.node_stores[0])
            _make_stores(wanted, on, on, place, folder, codebook)

        options = hetero.Options(method, codec, input, grad, default_grad, seed)
        hetero.convert(model, data, found, options, fill, forward, make_stores)
        watch_dropout(model)
        return model
    graph, device = Graph.of(data), device_of(model, data)
    # The same objects with another class, so that parameters, hooks and optimisers stay.
    before = {conv: (type(conv), conv.__dict__.get("survey")) for conv in found.values()}
    try:
        convs = {}
        for name, conv in found.items():
            _make_store_conv(conv)
            convs |= {name + more: part for more, part in conv.store_parts().items()}
        calls = _probe(model, graph, node_tensors(data), device, forward)
        uses: dict[StoreConv, StoreUse] = {}
        attentive = False  # whether some attention reads stored rows
        wanted: list[tuple[object, str, dict]] = []  # the stores to make: of whom, its attribute, their arguments
        for index, (name, conv) in enumerate(convs.items()):
            if conv not in calls:
                raise ValueError(f"conv {name!r} is not reached by the model's forward; remove it or pass forward=")
            dim, sees_features = calls[conv]
            generic = isinstance(conv, GenericConv)
            use = uses[conv] = StoreUse(conv.survey.edges if generic else conv.convolution(), whole=method == "full")
            graph.edge_features(use.convolution)  # now, as they may not fit
            sees_features |= conv.follows_hop is not None and uses[conv.follows_hop].input is not None
            if sees_features and input != "codes":
                if input == "precompute" and not conv.fixed:
                    raise ValueError(
                        f"input='precompute' needs a fixed C, {type(conv).__name__} has none; use input='auto'"
                    )
                use.input = "precompute" if conv.fixed and input != "rows" else "rows"
            elif input == "precompute" and index == 0:
                raise ValueError(f"input='precompute' needs batch.x to reach conv {name!r} unchanged; use input='auto'")
            shape = {"num_nodes": graph.num_nodes, "codec": codec, "seed": seed + index}
            if not generic:
                keep = default_grad and conv.fixed if grad is None else grad
                if use.input is None:
                    if codec is not None and isinstance(conv, Attention):
                        attentive = True
                        use.inputs = attention_state != "projected"
                    if use.inputs:
                        pending = (default_grad if grad is None else grad) and not sees_features
                        more = {"dim": conv.in_channels, "grad": False, "pending": pending}
                    else:
                        more = {"dim": dim, "grad": keep, "heads": conv.softmax_heads}
                    wanted.append((use, "store", shape | more))
                    if keep and conv.query_channels and not use.inputs:
                        wanted.append((use, "queries", {**shape, "dim": conv.query_channels, "grad": False}))
                continue
            if device != graph.x.device:
                raise ValueError(
                    f"{type(conv).__name__} runs PyG's code, which needs the graph where the model is: data is on "
                    f"{graph.x.device}, the model on {device}; give data.to({str(device)!r})"
                )
            keep = default_grad and conv.survey.additive if grad is None else grad
            for k, hop in enumerate(conv.survey.hops):
                hop.store_use = use if k == 0 else replace(use, input=None)
                if hop.store_use.input is None:
                    wanted.append((hop.store_use, "store", {**shape, "dim": hop.dim, "grad": False}))
                    if keep:
                        wanted.append((hop, "grads", {**shape, "dim": hop.out_dim, "grad": False}))
        if attention_state is not None and not attentive:
            raise ValueError(
                f"attention_state={attention_state!r}: no fused attention of {type(model).__name__} reads stored rows "
                f"with method={method!r}; leave it out"
            )
        if codec is None:
            wanted.clear()
        place, folder = _make_stores(wanted, device, graph.x.device, place, folder, codebook)
    except BaseException:  # a model that cannot be converted stays as it was
        for conv, (cls, survey) in before.items():
            conv.__class__ = cls
            for name in ("survey", "_visitor"):
                conv.__dict__.pop(name, None)
            if not hasattr(cls, "store_parts"):
                conv._modules.pop("hops", None)
            if survey is not None:
                conv.survey = survey
        raise
    watch_dropout(model)
    fused = [use for conv, use in uses.items() if use.store is not None and not isinstance(conv, GenericConv)]
    reads = [(use.store, use.convolution) for use in fused] if place in ("host", "disk") else []
    for conv, use in uses.items():
        conv.store_use, use.reads = use, reads
        graph.wanted.set(conv, *((use.convolution, name) for name in conv.slices()))
    if fill and stores(model):
        on_disk = graph.folder is not None
        kept = torch.float16 if on_disk else torch.float32  # rows of all nodes, for this sweep only
        kept_in = folder if on_disk or place == "disk" else None
        warmup(model, data, forward, dtype=kept, folder=kept_in, progress=on_disk)
    return model


def _make_stores(
    wanted: list[tuple[object, str, dict]],
    device: torch.device,
    graph_device: torch.device,
    place: str,
    folder: str | Path | None,
    codebook: dict,
) -> tuple[str, Path]:
    """Set each owner's attribute to the store with these arguments; returns where they lie."""
    needed = sum(NodeStore.size_of(**shape) for _, _, shape in wanted)
    place, folder = resolve(place, needed, device, graph_device), Path(folder or cache_folder() / "state")
    where = {"place": place, "folder": folder, "device": device}
    if wanted and place in ("host", "disk"):
        where["engine"] = TransferEngine(device=device)
    # what is pending is added up where it is computed
    if device.type != "cpu" and place != "device" and any(shape.get("pending") for _, _, shape in wanted):
        wanted = [(*owner, shape | {"pending": False}) for *owner, shape in wanted]
        warnings.warn(
            f"place={place!r}: gradients of an attention are kept on the model's device alone; it trains without, and "
            "is less accurate. Give place='device', or grad=False",
            RuntimeWarning,
            stacklevel=3,
        )
    for owner, attribute, shape in wanted:
        setattr(owner, attribute, NodeStore(**shape, **where, **codebook))
    return place, folder


def stores(model: nn.Module) -> dict[str, NodeStore]:
    """The node-state stores of a converted model by the path of their conv.

    They are modules with a state_dict of their own and not part of the model's, whose keys stay PyG's. Some convs have
    several: "conv.query" of an attention's queries; "conv.hops.0", ... of the products of a ChebConv; of a conv that
    PyG's code computes "conv.hop1" of its second propagate's inputs and "conv.grad" of gradients. Of a HeteroData, the
    convs of a layer share the states of a node type, which stand at the first of them; gradients are each conv's own.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, StoreConv) and module.store_use is not None:
            found.update({name + more: store for more, store in module.stores().items()})
    return found


class ConvPath(NamedTuple):
    """How a conv of a converted model gets its messages.

    path: "fused" (one kernel reads states in place) or "generic" (PyG's own code on decoded rows). reads: where the
    rows of out-of-batch nodes come from. bytes_per_node: of state, for every node of the graph (of a HeteroData, every
    source of states and target of gradients; shared states count once).
    """

    name: str
    conv: str
    path: str
    reads: str
    bytes_per_node: float


class Paths(list):
    """`ConvPath`s; as text, a table."""

    def __str__(self) -> str:
        rows = [ConvPath._fields, *([*row[:-1], f"{row.bytes_per_node:g}"] for row in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


def paths(model: nn.Module) -> Paths:
    """Which path each conv of a converted model takes, what it reads, and what that costs; print it for a table."""
    convs = {name: m for name, m in model.named_modules() if isinstance(m, StoreConv) and m.store_use is not None}
    if not convs:
        raise ValueError(f"model {type(model).__name__} is not converted; call vqgnn.convert(model, data) first")
    found = Paths()
    for name, conv in convs.items():
        generic = isinstance(conv, GenericConv) or (isinstance(conv, RelationConv) and not conv.fixed)
        held = conv.stores().values()
        nbytes = sum(table.nbytes / store.num_nodes for store in held for table in store.tables.values())
        reads = conv.reads()
        found.append(ConvPath(name, type(conv).__name__, "generic" if generic else "fused", reads, nbytes))
    return found


def _find(model: nn.Module) -> dict[str, nn.Module]:
    """The model's convs by their path, PyG's or ours; a ValueError where one cannot be converted."""
    convs = {name: m for name, m in model.named_modules() if isinstance(m, pyg.MessagePassing)}
    if not convs:
        raise ValueError(f"model {type(model).__name__} has no PyG convs to convert")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("model has lazy parameters without a shape yet; run it once on PyG's edge_index, then convert")
    return convs


def _make_store_conv(conv: nn.Module) -> None:
    """Let a PyG conv read a store: fused where there is such a one for its options, else by its own code."""
    cls = type(conv)
    if cls in CONVS and not has_message_hooks(conv):
        conv.__class__ = CONVS[cls]
        try:
            conv.convolution()
            return
        except ValueError:  # an option that the fused path lacks
            conv.__class__ = cls
    if cls in CONVS.values():
        conv.convolution()  # raises for such an option
    elif not isinstance(conv, StoreConv):
        make_generic(conv)


class _Probe:
    """Stands in for every conv and notes what it tells neighbours: (channels, whether the features themselves)."""

    def __init__(self):
        self.calls: dict[StoreConv, tuple[int, bool]] = {}

    def __call__(self, conv: StoreConv, x: Tensor, batch: BatchGraph) -> Tensor:
        source = conv.message_input(x)
        self._note(conv, source.size(1), (source if conv.fixed else x) is batch.x)
        return conv.combine(x, torch.zeros_like(source))

    def survey(self, conv: GenericConv, given) -> Tensor:
        """For a conv whose own code runs."""
        try:
            out, sees_features = examine(conv, given)
        except ValueError:
            raise
        except Exception as error:
            values = " and ".join(f"data.{name}" for name in given.edge_tensors)
            hint = f"; it was given {values}: delete it from data if the model does not use it" if values else ""
            raise ValueError(
                f"{type(conv).__name__} cannot run on mini-batches: on a graph of a few nodes its own code failed "
                f"with {type(error).__name__}: {error}{hint}"
            ) from error
        self._note(conv, conv.survey.hops[0].dim, sees_features)
        settle(conv, given)
        return out

    def _note(self, conv: StoreConv, dim: int, sees_features: bool) -> None:
        if conv in self.calls:
            raise ValueError(f"{type(conv).__name__} is called twice in one forward; give each call a conv of its own")
        self.calls[conv] = dim, sees_features


def _probe(
    model: nn.Module, graph: Graph, tensors: dict[str, Tensor], device: torch.device, forward: Callable
) -> dict[StoreConv, tuple[int, bool]]:
    probe = _Probe()
    x = graph.x[:_PROBE_NODES].clone().to(device)
    n_id = torch.arange(x.size(0), device=x.device)
    with evaluating(model), torch.no_grad():
        try:
            before = version(x)
            forward(model, Batch.of(BatchGraph(graph, n_id, x, run=probe), tensors))
            require_unchanged("batch.x", x, before)
        except NotImplementedError as error:  # how torch_geometric.utils refuse what is no tensor
            raise not_an_edge_index("a function of torch_geometric.utils") from error
    return probe.calls
