"""Give an existing PyG model mini-batches that keep every message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch_geometric.data import Data

from .graph import BatchGraph, Graph
from .inference import call_model, device_of, evaluating, warmup
from .loader import Batch
from .nn import CONVS, INPUTS, StoreConv, StoreUse
from .partitioning import cache_folder
from .places import resolve
from .store import Codec, NodeStore
from .transfer import TransferEngine

# method -> default codec, gradient store
METHODS = {
    "vq": ("pq:d=4,k=256", True),
    "gas": ("fp32", False),
    "lmc": ("fp32", True),
    "drop": (None, False),
    "full": (None, False),
}
_PROBE_NODES = 8


def convert(
    model: nn.Module,
    data: Data,
    method: str = "vq",
    codec: str | Codec | None = None,
    input: str = "auto",
    grad: bool | None = None,
    fill: bool = True,
    seed: int = 0,
    forward: Callable[[nn.Module, object], Tensor] = call_model,
    place: str = "auto",
    folder: str | Path | None = None,
    **codebook,
) -> nn.Module:
    """Swap the convs of a PyG model, in place, for ones that read a node-state store; the weights stay.

    Args:
        model: any module whose message passing is done by PyG's GCNConv, SAGEConv (mean, sum), GINConv or GATConv.
        data: the whole graph; normalisation coefficients come from it. It may stay in RAM for a model on a GPU: give
            BatchLoader the model's device then.
        method: "vq" (product-VQ codes of states and gradients, VQ-GNN), "gas" (rows of states, GNNAutoScale), "lmc"
            (rows of both), "drop" (no out-of-batch messages, Cluster-GCN) or "full" (no store: whole-graph batches).
        codec: how states are kept: "fp32", "fp16", "int8", "int4" or "pq:d=4,k=256". Default: the method's.
        input: how the first conv reads the given features: "precompute" C X once, exact "rows" of the halo, "codes" as
            in the paper, or "auto": C X where the conv gets `batch.x` itself, rows where dropout comes between or the
            conv is an attention.
        grad: whether gradients of out-of-batch nodes are kept and compensated (eq. 7). Default: the method's for fixed
            convolutions; not for attention, where the weights of out-of-batch messages follow a softmax that has gone
            stale, and training diverges (README, limits).
        fill: fill the stores by one exact forward sweep now, so that no batch reads an empty store.
        seed: of the codebooks.
        forward: how to call the model on a batch; default `model(batch.x, batch.graph)`.
        place: where node state lies: "device" (the model's), "host" (RAM, for a model on a GPU and data in RAM), "disk"
            (memory-mapped files), or "auto": the first of them of whose free memory it would take at most half; or
            "pinned" (see `NodeStore`).
        folder: of the scratch files of place="disk", which end with the process. Default: in the user's cache folder.
        codebook: further arguments of `vqgnn.Codebook`, e.g. decay=0.95.

    Returns:
        The model itself.

    Raises:
        ValueError: an unknown option, a conv or an option of one that cannot be converted, or a model without convs.
        OSError: the disk is too full for place="disk".
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    if input not in INPUTS:
        raise ValueError(f"input={input!r} is unknown; choose one of {', '.join(INPUTS)}")
    default_codec, default_grad = METHODS[method]
    if default_codec is None and (codec is not None or grad):
        raise ValueError(f"codec={codec!r}, grad={grad!r}: method={method!r} keeps no state; leave them out")
    codec = default_codec if codec is None else Codec.parse(codec)
    if codec is not None and (Codec.parse(codec).name == "pq") != (method == "vq"):
        allowed = "pq:d=D,k=K" if method == "vq" else "fp32, fp16, int8 or int4"
        raise ValueError(f"codec={str(codec)!r} does not go with method={method!r}; use {allowed}, or another method")
    graph, device = Graph.of(data), device_of(model, data)
    convs = _find(model)
    # The same objects with another class, so that parameters, hooks and optimisers stay.
    classes = {conv: type(conv) for conv in convs.values()}
    for conv, cls in classes.items():
        conv.__class__ = CONVS.get(cls, cls)
    try:
        convolutions = {conv: conv.convolution() for conv in convs.values()}
        calls = _probe(model, graph, device, forward)
        uses: dict[StoreConv, StoreUse] = {}
        wanted: dict[StoreConv, dict] = {}  # the convs with a store: its arguments
        for index, (name, conv) in enumerate(convs.items()):
            if conv not in calls:
                raise ValueError(f"conv {name!r} is not reached by the model's forward; remove it or pass forward=")
            dim, sees_features = calls[conv]
            use = uses[conv] = StoreUse(convolutions[conv], whole=method == "full")
            if sees_features and input != "codes":
                if input == "precompute" and not conv.fixed:
                    raise ValueError(
                        f"input='precompute' needs a fixed C, {type(conv).__name__} has none; use input='auto'"
                    )
                use.input = "precompute" if conv.fixed and input != "rows" else "rows"
            elif input == "precompute" and index == 0:
                raise ValueError(f"input='precompute' needs batch.x to reach conv {name!r} unchanged; use input='auto'")
            elif codec is not None:
                keep = default_grad and conv.fixed if grad is None else grad
                wanted[conv] = {
                    "num_nodes": graph.num_nodes,
                    "dim": dim,
                    "codec": codec,
                    "grad": keep,
                    "seed": seed + index,
                    "heads": conv.softmax_heads,
                }
        needed = sum(NodeStore.size_of(**shape) for shape in wanted.values())
        place, folder = resolve(place, needed, device, graph.x.device), Path(folder or cache_folder() / "state")
        where = {"place": place, "folder": folder, "device": device}
        if wanted and place in ("host", "disk"):
            where["engine"] = TransferEngine(device=device)
        for conv, shape in wanted.items():
            uses[conv].store = NodeStore(**shape, **where, **codebook)
    except BaseException:  # a model that cannot be converted stays as it was
        for conv, cls in classes.items():
            conv.__class__ = cls
        raise
    kept = [(use.store, use.convolution) for use in uses.values() if use.store is not None]
    reads = kept if place in ("host", "disk") else []
    graph.halo_wanted |= any(store.in_place for store, _ in kept)
    for conv, use in uses.items():
        conv.store_use, use.reads = use, reads
        inputs = {"precompute": "input_messages", "rows": conv.input_slices}
        graph.wanted[use.convolution, inputs.get(use.input, "csr")] = None
    if fill and stores(model):
        on_disk = graph.folder is not None
        kept = torch.float16 if on_disk else torch.float32  # rows of all nodes, for this sweep only
        kept_in = folder if on_disk or place == "disk" else None
        warmup(model, data, forward, dtype=kept, folder=kept_in, progress=on_disk)
    return model


def stores(model: nn.Module) -> dict[str, NodeStore]:
    """The node-state stores of a converted model by the path of their conv.

    They are modules with a state_dict of their own and not part of the model's, whose keys stay PyG's.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, StoreConv) and module.store_use is not None and module.store_use.store is not None:
            found[name] = module.store_use.store
    return found


def _find(model: nn.Module) -> dict[str, nn.Module]:
    """The model's convs by their path, PyG's or ours; a ValueError where one cannot be converted."""
    convs = {name: m for name, m in model.named_modules() if isinstance(m, pyg.MessagePassing)}
    if not convs:
        raise ValueError(f"model {type(model).__name__} has no PyG convs to convert")
    fresh = [m for m in convs.values() if not isinstance(m, StoreConv)]
    unknown = sorted({type(m).__name__ for m in fresh if type(m) not in CONVS})
    if unknown:
        known = ", ".join(conv.__name__ for conv in CONVS)
        raise ValueError(f"model has convs that cannot be converted yet: {', '.join(unknown)}; supported are {known}")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("model has lazy parameters without a shape yet; run it once on PyG's edge_index, then convert")
    return convs


def _probe(model: nn.Module, graph: Graph, device: torch.device, forward) -> dict[StoreConv, tuple[int, bool]]:
    """What each conv is given: (channels of its messages, whether they are the features themselves)."""
    calls: dict[StoreConv, tuple[int, bool]] = {}

    def note(conv: StoreConv, x: Tensor, batch: BatchGraph) -> Tensor:
        source = conv.message_input(x)
        if conv in calls:
            raise ValueError(f"{type(conv).__name__} is called twice in one forward; give each call a conv of its own")
        calls[conv] = (source.size(1), (source if conv.fixed else x) is batch.x)
        return conv.combine(x, torch.zeros_like(source))

    x = graph.x[:_PROBE_NODES].clone().to(device)
    n_id = torch.arange(x.size(0), device=x.device)
    with evaluating(model), torch.no_grad():
        forward(model, Batch(BatchGraph(graph, n_id, x, run=note), {"x": x}))
    return calls
