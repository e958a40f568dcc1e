"""What a model does with a heterogeneous graph, found by running it on a few nodes of every type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from .calling import alike, evaluating
from .dependence import Dependence
from .graph import not_an_edge_index, require_unchanged, version
from .hetero_graph import BatchRelation, HeteroGraph, Relation, tensors_by_type
from .pyg_code import flat, has_rows, taken_edge_tensors
from .relation_conv import Form, RelationConv, messages_only, run_code

_PROBE_NODES = 5  # of the smallest type; every other has one more, so that rows tell their type
_Rows = dict[str, slice]  # of the probe's nodes, by type


@dataclass(eq=False)
class Call:
    """A conv's call. source, target: numbers of the rows that it is given, the same where they are the same tensor.

    source_dim: channels of what neighbours are told. needs: the convs whose results these rows come from, with no other
    conv between. level: how many convs, one after the other, lie up to this one's result.
    """

    relation: Relation
    source: int
    target: int
    source_is_x: bool
    target_is_x: bool
    source_dim: int
    target_dim: int
    out: Tensor  # [0, ...] of the result
    needs: set[RelationConv]
    level: int


class Structure:
    """The calls of a model's convs, in their order, and what its result needs of them.

    splits: whether, but for messages, it computes the same for some nodes with and without the others.
    """

    def __init__(self, model: nn.Module, data: HeteroData, forward: Callable, examines: bool = False):
        self.graph, self.tensors, self.examines = HeteroGraph.of(data), tensors_by_type(data), examines
        self.calls: dict[RelationConv, Call] = {}
        self._seen: list[tuple[Tensor, int | None]] = []  # the tensors, as they were, whose place is their number
        counts = self._sizes = self._counts()
        self._dependence = Dependence()
        with evaluating(model), torch.no_grad():
            with self._dependence:
                self._out = self._run(model, forward, {k: slice(n) for k, n in counts.items()})
            self.needs = set(self._dependence.of(_rows_of(self._out)))
            together, self.examines = self._rows, False
            # parts from either end: the largest row of all, or the first one, is not in both
            first = {k: slice(n // 2) for k, n in counts.items()}
            last = {k: slice(n // 2, n) for k, n in counts.items()}
            self.splits = all(conv.form.splits for conv in self.calls if conv.form is not None)
            self.splits &= all(self._alone(model, forward, part, together) for part in (first, last))
        self.levels = max((call.level for call in self.calls.values()), default=0)
        self._seen.clear()
        del self._dependence

    def _alone(self, model: nn.Module, forward: Callable, part: _Rows, together: list[Tensor]) -> bool:
        """Whether these nodes' rows are what they are among all nodes."""
        from_end = any(rows.start for rows in part.values())
        try:
            self._run(model, forward, part)
            pairs = zip(together, self._rows, strict=True)
            return all(alike(a[len(a) - len(b) :] if from_end else a[: len(b)], b) for a, b in pairs)
        except (ValueError, RuntimeError, IndexError):  # of a type without rows it takes a maximum, say
            return False

    def _counts(self) -> dict[str, int]:
        sizes = sorted(self.graph.sizes.items(), key=lambda item: item[1])
        return {node_type: min(n, _PROBE_NODES + k) for k, (node_type, n) in enumerate(sizes)}

    def output_type(self) -> str | None:
        """The node type of what the model returns; None where that is a dict by type."""
        out, counts = self._out, self._sizes
        if isinstance(out, dict):
            return None
        found = [node_type for node_type, n in counts.items() if isinstance(out, Tensor) and has_rows(out, n)]
        if len(found) != 1:
            came = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"the model returned {came} for {counts} nodes, which is not clearly a row for each node of a type; "
                "return a dict {node_type: rows}"
            )
        return found[0]

    def _run(self, model: nn.Module, forward: Callable, part: _Rows) -> Tensor | dict[str, Tensor]:
        self._generator = torch.Generator().manual_seed(0)
        self._rows: list[Tensor] = []  # what the model computes between messages
        self._called: list[RelationConv] = []
        self._part = part
        n_id = {k: torch.arange(self._sizes[k], device=rows.device)[part[k]] for k, rows in self.graph.x_dict.items()}
        x = self._x = {k: self._noisy(rows[part[k]], k) for k, rows in self.graph.x_dict.items()}
        batch = self.graph.batch(n_id, self.tensors, x=x, run=self)
        for node_type, tensors in self.tensors.items():
            for name in tensors:
                batch[node_type][name] = self._noisy(batch[node_type][name], node_type)
        before = {node_type: version(rows) for node_type, rows in x.items()}
        try:
            out = forward(model, batch)
        except NotImplementedError as error:  # how torch_geometric.utils refuse what is no tensor
            raise not_an_edge_index("a function of torch_geometric.utils") from error
        for node_type, rows in x.items():
            require_unchanged(f"batch[{node_type!r}].x", rows, before[node_type])
        self._rows += _rows_of(out)
        return out

    def _noisy(self, rows: Tensor, node_type: str) -> Tensor:
        """Told apart where they are numbers; also a copy, as models may work in place."""
        return rows + self._noise(rows, node_type) / 2 if rows.is_floating_point() else rows.clone()

    def _noise(self, like: Tensor, node_type: str) -> Tensor:
        """The same for a node, whichever others there are."""
        of_all = torch.rand(self._sizes[node_type], *like.shape[1:], generator=self._generator)
        return of_all[self._part[node_type]].to(like)

    def __call__(self, conv: RelationConv, source: Tensor, target: Tensor, graph: BatchRelation) -> Tensor:
        name, relation = type(conv).__name__, graph.graph
        if conv in self._called:
            raise ValueError(f"{name} is called twice in one forward; give each call a conv of its own")
        told = conv.message_input(source)
        rows = self._dependence.cut(source)
        target_rows = rows if target is source else self._dependence.cut(target)
        if self.examines:
            conv.form = None if conv.fixed else _examined(conv, rows, target_rows, relation)
        if conv.fixed:
            out = conv.combine(target_rows, told.new_zeros(len(target), told.size(1)))
        else:
            none = torch.empty(2, 0, dtype=torch.int64, device=source.device)
            values = {key: relation.edge_tensors[key][:0] for key in conv.form.edge_values}
            out = run_code(conv, rows, target_rows, none, values)
        self._rows += [rows, target_rows, out]
        # random, as without messages all nodes may be alike, and statistics over them would not show
        out = self._noise(out, relation.edge_type[2])
        if conv not in self.calls:
            needs = set(self._dependence.of(source, target))
            self.calls[conv] = Call(
                relation, self._number(told), self._number(target), told is graph.x,
                target is self._x[relation.edge_type[2]],
                told.size(1), target.size(1), out[:0], needs, 1 + max((self.calls[c].level for c in needs), default=0),
            )  # fmt: skip
        self._called.append(conv)
        self._dependence.mark(out, conv)
        return out

    def _number(self, tensor: Tensor) -> int:
        for number, (seen, before) in enumerate(self._seen):
            if seen is tensor and version(tensor) == before:
                return number
        self._seen.append((tensor, version(tensor)))
        return len(self._seen) - 1


def _rows_of(out: object) -> list[Tensor]:
    """Of a model's result, by type or not; PyG's models return None of types that they do not update."""
    return [rows for rows in (out.values() if isinstance(out, dict) else [out]) if isinstance(rows, Tensor)]


def _examined(conv: RelationConv, source: Tensor, target: Tensor, relation: Relation) -> Form:
    try:
        return _examine(conv, source, target, relation)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(conv).__name__} of {relation.edge_type} cannot run on mini-batches: called as conv((x_source, "
            f"x_target), edge_index) on a few nodes, its own code failed with {type(error).__name__}: {error}"
        ) from error


@torch.enable_grad()
def _examine(conv: RelationConv, source: Tensor, target: Tensor, relation: Relation) -> Form:
    name, alone = f"{type(conv).__name__} of {relation.edge_type}", source is target
    device, s, t = source.device, len(source), len(target)
    pairs = torch.cartesian_prod(torch.arange(s, device=device), torch.arange(t, device=device)).t()
    if relation.square:
        pairs = pairs[:, pairs[0] != pairs[1]]
    edge_index = pairs.repeat(1, 2)
    values = {key: v.new_full((edge_index.size(1), *v.shape[1:]), v.is_floating_point())
              for key, v in taken_edge_tensors(conv, relation).items()}  # fmt: skip
    source, target = (rows.detach().clone().requires_grad_() for rows in (source, target))
    sent: list[Tensor] = []
    out = run_code(conv, source, target, edge_index, values, sent.append)
    if not sent:
        raise ValueError(f"{name} does not call propagate, so that it cannot read a node-state store")
    if not has_rows(out, t):
        raise ValueError(f"{name} returned {type(out).__name__}; with a batch graph it must return a row a node")
    if alone:
        single = conv.pyg_class.forward(conv, source, edge_index, **values)
        pair = run_code(conv, source, source, edge_index, values)
        if single.shape != pair.shape or not alike(pair, single):
            raise ValueError(f"{name} gives another result for the pair (x, x) than for x; use a conv for such pairs")
    told = read = None
    if any(messages.requires_grad for messages in sent):
        total = sum(messages.sum() for messages in sent)
        told, read = torch.autograd.grad(total, [source, target], allow_unused=True)
    if told is None:
        raise ValueError(f"{name} tells targets nothing of its sources' x; it can run without a batch graph")

    def sent_to(source: Tensor, target: Tensor, edge_index: Tensor, kept: Tensor | slice) -> Tensor:
        its = {key: value[kept] for key, value in values.items()}
        visit = messages_only(conv, len(sent))
        return run_code(conv, source, target, edge_index[:, kept], its, visit).detach().float()

    def messages(kept: Tensor | slice) -> Tensor:
        return sent_to(source, target, edge_index, kept)

    whole = messages(slice(None))
    first = max(1, t // 2)
    if not alike(whole[:first], messages(edge_index[1] < first)[:first]):
        raise ValueError(
            f"{name} makes what a node is sent depend on edges into other nodes, of which a batch has not all; "
            "normalise once, into data's edge_weight, before vqgnn.convert"
        )
    # The same nodes and edges, counted from the end, and some of them alone.
    back = torch.tensor([[s - 1], [t - 1]], device=device) - edge_index
    half = max(1, s // 2)
    among = (back < torch.tensor([[half], [first]], device=device)).all(0)
    alone_sent = sent_to(source.flip(0)[:half], target.flip(0)[:first], back, among)
    if not alike(messages(among).flip(0)[:first], alone_sent):
        raise ValueError(
            f"{name} makes what a node is sent depend on rows of others than its sources (their mean?), or on where "
            "rows stand (self loops between two types: add_self_loops=False), and a batch has not all rows; do that "
            "outside the conv, or once to the features"
        )
    splits, out = True, run_code(conv, source, target, edge_index, values).detach()
    for ends, flip in ((edge_index, lambda rows: rows), (back, lambda rows: rows.flip(0))):
        kept = ends[1] < first
        its = {key: value[kept] for key, value in values.items()}
        part = run_code(conv, flip(source), flip(target)[:first], ends[:, kept], its).detach()
        splits &= alike(flip(out)[:first], part)
    # by its values too: what comes of a comparison has no gradient
    reads_targets = read is not None or not alike(whole, sent_to(source, 0.3 - target.flip(0), edge_index, slice(None)))
    additive, none = True, messages(slice(0, 0))
    for half in (torch.arange(edge_index.size(1), device=device) < pairs.size(1), edge_index[0] < (s + 1) // 2):
        rest = whole - messages(half) - messages(~half) + none
        additive &= bool(rest.norm() <= 1e-4 * whole.norm())
    out_dims = [flat(conv, messages).size(1) for messages in sent]
    return Form(list(values), target.size(1), out_dims, additive, reads_targets, splits)
