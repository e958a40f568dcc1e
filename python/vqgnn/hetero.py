"""`vqgnn.convert` of a model for a `HeteroData`: made by `to_hetero`, or of `HeteroConv` layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch_geometric.data import HeteroData

from .calling import device_of
from .hetero_graph import HeteroGraph
from .hetero_inference import fill_stores
from .hetero_survey import Call, Structure
from .relation_conv import GIVEN_EDGES, Gradients, RelationConv, RelationUse, make_relation_conv
from .store import Codec

Wanted = tuple[RelationUse | Gradients, str, dict]  # whose store, the attribute that holds it, its arguments
Shared = tuple[RelationUse, str, RelationUse, str]  # an attribute, and whose attribute it is


@dataclass
class Options:
    """Of `vqgnn.convert`, checked. default_grad: of the method."""

    method: str
    codec: Codec | str | None
    input: str
    grad: bool | None
    default_grad: bool
    seed: int


def convert(
    model: nn.Module,
    data: HeteroData,
    convs: dict[str, nn.Module],
    options: Options,
    fill: bool,
    forward: Callable,
    make_stores: Callable[[list[Wanted]], None],
) -> None:
    """Convert the convs of a model, by their paths, in place; `make_stores` gives each use its stores."""
    graph = HeteroGraph.of(data)
    device = device_of(model, next(iter(data.node_stores)))
    if device != graph.device:
        raise ValueError(
            f"a HeteroData must be where the model is: data is on {graph.device}, the model on {device}; give "
            f"data.to({str(device)!r})"
        )
    before = {conv: (type(conv), conv.__dict__.get("form")) for conv in convs.values()}
    try:
        for conv in convs.values():
            make_relation_conv(conv)
        calls = Structure(model, data, forward, examines=True).calls
        missing = [name for name, conv in convs.items() if conv not in calls]
        if missing:
            raise ValueError(
                f"conv {missing[0]!r} is not reached by the model's forward; remove it, pass forward=, or give data "
                "its edge type"
            )
        uses = {conv: _use(conv, call, options) for conv, call in calls.items()}
        if options.codec is not None:
            wanted, shared = _plan(uses, calls, options)
            make_stores(wanted)
            for use, attribute, other, its in shared:
                setattr(use, attribute, getattr(other, its))
    except BaseException:  # a model that cannot be converted stays as it was
        for conv, (cls, form) in before.items():
            conv.__class__ = cls
            conv.__dict__.pop("form", None)
            if form is not None:
                conv.form = form
        raise
    for conv, use in uses.items():
        conv.store_use = use
        slices = "csr" if conv.fixed else "valued_edges" if conv.form.edge_values else "edges"
        slices = "input_messages" if use.input == "precompute" else slices
        calls[conv].relation.wanted.set(conv, (use.convolution, slices))
    if fill and any(use.stores() for use in uses.values()):
        fill_stores(model, data, forward)


def _use(conv: RelationConv, call: Call, options: Options) -> RelationUse:
    convolution = conv.convolution() if conv.fixed else GIVEN_EDGES
    if convolution.kind == "gcn" and not call.relation.square:
        raise ValueError(
            f"{type(conv).__name__} of {call.relation.edge_type} normalises by degrees of one type; between "
            "two types use SAGEConv or GraphConv"
        )
    use = RelationUse(convolution, whole=options.method == "full", edge_type=call.relation.edge_type)
    if call.source_is_x and options.input != "codes":
        if options.input == "precompute" and not conv.fixed:
            raise ValueError(f"input='precompute' needs a fixed C, {type(conv).__name__} has none; use input='auto'")
        # C x of every edge type would be a table each: by default features are read in place
        use.input = "precompute" if options.input == "precompute" else "rows"
    return use


def _plan(
    uses: dict[RelationConv, RelationUse], calls: dict[RelationConv, Call], options: Options
) -> tuple[list[Wanted], list[Shared]]:
    """The stores to make, and those that one use shares with another: once for the same rows."""
    wanted: list[Wanted] = []
    shared: list[Shared] = []
    first: dict[int, tuple[RelationUse, str]] = {}  # by the number of the rows, who keeps them

    def want(use: RelationUse | Gradients, attribute: str, num_nodes: int, dim: int) -> None:
        seed = options.seed + len(wanted)
        shape = {"num_nodes": num_nodes, "dim": dim, "codec": options.codec, "grad": False, "seed": seed}
        wanted.append((use, attribute, shape))

    def keep(use: RelationUse, attribute: str, rows: int, num_nodes: int, dim: int) -> bool:
        """Whether this use is the first to keep these rows, and so the one that pushes them."""
        if rows in first:
            shared.append((use, attribute, *first[rows]))
            return False
        first[rows] = use, attribute
        want(use, attribute, num_nodes, dim)
        return True

    for conv, use in uses.items():
        call = calls[conv]
        if use.input is None:
            use.pushes = keep(use, "store", call.source, call.relation.num_sources, call.source_dim)
    for conv, use in uses.items():
        call, form = calls[conv], conv.form
        grad = options.default_grad and (form is None or form.additive) if options.grad is None else options.grad
        if use.input is not None or not grad or call.relation.num_edges == 0:
            continue
        receivers = call.relation.receivers(use.convolution).numel()
        for dim in [call.source_dim] if form is None else form.out_dims:
            use.grads.append(Gradients())
            want(use.grads[-1], "store", receivers, dim)
        if form is not None and form.reads_targets and not call.target_is_x:
            use.pushes_targets = keep(use, "targets", call.target, call.relation.num_nodes, call.target_dim)
    return wanted, shared
