"""A heterogeneous graph: a rectangular convolution matrix for every edge type, and a mini-batch's share of each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from torch_geometric.data import HeteroData

import vqgnn_kernels as kernels
from vqgnn_kernels import CSR

from .graph import (
    BatchEdges,
    BatchGraph,
    Convolution,
    Graph,
    Made,
    Matrix,
    Wanted,
    check_edge_index,
    check_edge_tensors,
    check_features,
    check_ids,
    edge_tensors,
    edge_weight,
    kept,
    lasting,
    node_tensors,
)
from .sparse_rows import SparseRows

EdgeType = tuple[str, str, str]


class Relation(Graph):
    """The edges of one type, as a `Graph` whose rows (targets) and columns (sources) are different nodes.

    x [n_source, f] are the sources' features, target_x [n_target, f'] the targets'.
    """

    def __init__(self, edge_type: EdgeType, store, x: Tensor, target_x: Tensor):
        source, _, target = self.edge_type = edge_type
        name = f"data[{edge_type!r}]"
        check_edge_index(f"{name}.edge_index", store.get("edge_index"))
        for side, node_type, nodes in ((0, source, x), (1, target, target_x)):
            ids = store.edge_index[side]
            check_ids(f"{name}.edge_index[{side}]", ids, len(nodes), f"data[{node_type!r}].num_nodes")
        check_edge_tensors(name, store, store.edge_index.size(1))
        self.folder = None
        self.x, self.target_x = x, target_x
        self.num_nodes, self.num_sources = len(target_x), len(x)
        self.edge_index, self.edge_weight, self.edge_tensors = store.edge_index, edge_weight(store), edge_tensors(store)
        self._matrices: dict[Convolution, Matrix] = {}
        self._orders: dict[tuple[Convolution, bool], Tensor] = {}
        self._products: dict[Convolution, Tensor | SparseRows] = {}
        self._receivers: dict[Convolution, Tensor] = {}
        self._padded: dict[Convolution, tuple[Tensor, Tensor]] = {}
        self.wanted = Wanted()

    @property
    def num_edges(self) -> int:
        return self.edge_index.size(1)

    @property
    def square(self) -> bool:
        """Whether sources and targets are the same nodes."""
        return self.edge_type[0] == self.edge_type[2]

    @lasting
    def matrix(self, convolution: Convolution) -> Matrix:
        if convolution not in self._matrices:
            matrix = Matrix.build(*convolution.edges(self), self.num_nodes, self.num_sources)
            forward, transposed = self._padded[convolution] = (
                torch.cat([matrix.rowptr.new_zeros(self.num_sources), matrix.rowptr]),
                torch.cat([matrix.rowptr.new_zeros(self.num_nodes), matrix.rowptr_t]),
            )
            matrix.rowptr, matrix.rowptr_t = forward[self.num_sources :], transposed[self.num_nodes :]  # no copies
            self._matrices[convolution] = matrix
        return self._matrices[convolution]

    def receivers(self, convolution: Convolution) -> Tensor:
        """Ascending ids of the targets with edges: of a rare relation few, and no other's gradient is ever read."""
        if convolution not in self._receivers:
            self._receivers[convolution] = self.matrix(convolution).rowptr.diff().nonzero().flatten()
        return self._receivers[convolution]

    def padded(self, convolution: Convolution) -> tuple[Tensor, Tensor]:
        """rowptr [n_source + n_target + 1] of C and of its transpose, with an empty row for every column before them.

        So columns and rows are numbered together, and the slice of a square matrix serves a rectangular one.
        """
        self.matrix(convolution)
        return self._padded[convolution]


class BatchRelation(BatchGraph):
    """What a mini-batch knows of one edge type: goes where that type's `edge_index` goes.

    n_id [b] are the batch's targets, source_id [s] its sources and x [s, f] their input features. In its matrices
    columns < s are in the batch, those of the transpose where they are < b.
    """

    def __init__(self, graph: Relation, n_id: Tensor, x: Tensor, source_id: Tensor, run: object | None = None):
        super().__init__(graph, n_id, x, run)
        self.source_id = source_id

    def __repr__(self) -> str:
        return f"BatchRelation(sources={self.source_id.numel()}, targets={self.n_id.numel()})"

    def _with_features(self, convolution: Convolution) -> tuple[CSR, CSR]:
        if self.whole:
            return super()._with_features(convolution)
        m, (rowptr, rowptr_t) = self.graph.matrix(convolution), self.graph.padded(convolution)
        return (
            _slice(rowptr, self.graph.num_sources, m.col, m.weight, self.n_id, self.source_id),
            _slice(rowptr_t, self.graph.num_nodes, m.col_t, m.weight_t, self.source_id, self.n_id),
        )

    @kept
    def receivers(self, convolution: Convolution) -> tuple[Tensor, Tensor]:
        """Those of the batch's targets that are among the relation's receivers, and which of them: both [k]."""
        among = self.graph.receivers(convolution)
        own = (self.graph.matrix(convolution).rowptr.diff()[self.n_id] > 0).nonzero().flatten()
        return own, torch.searchsorted(among, self.n_id[own])

    @kept
    def outside_receivers(self, convolution: Convolution) -> Tensor:
        """Which of the relation's receivers the transposed matrix's halo is [h]."""
        return torch.searchsorted(self.graph.receivers(convolution), self.csr(convolution)[1].halo)

    @kept
    def edges_out(self, convolution: Convolution, all_sources: bool, valued: bool = False) -> tuple[Tensor, BatchEdges]:
        """As BatchGraph's; where targets are no sources, only `others` send."""
        if self.graph.square:
            return super().edges_out(convolution, all_sources, valued)
        matrix, csr = self.graph.matrix(convolution), self.csr(convolution)[1]
        targets, b = csr.halo, self.n_id.numel()
        if all_sources:
            rowptr = self.graph.padded(convolution)[0]
            rows = _slice(rowptr, self.graph.num_sources, matrix.col, None, targets, targets[:0])
            others = rows.halo
            source, target, place = self._edge_index(matrix.rowptr, targets, rows.rowptr, rows.col)
        else:
            others = self.source_id
            edges = self._edge_index(matrix.rowptr_t, others, csr.rowptr, csr.col)
            target, source, place = edges[:, edges[0] >= b]
            target = target - b
        order = self.graph.order(convolution, transposed=not all_sources) if valued else None
        return targets, BatchEdges(torch.stack([source, target]), others, None if order is None else order[place])


def _slice(rowptr: Tensor, padding: int, col: Tensor, weight: Tensor | None, rows: Tensor, columns: Tensor) -> CSR:
    """`rows` of a rectangular matrix, of which rowptr has a row for each of its `padding` columns before them.

    Columns < c of the result are in `columns` [c], the others in the halo.
    """
    r, c = rows.numel(), columns.numel()
    rows = rows + padding
    rowptr_b, col_b, halo = kernels.csr_slice(rowptr, col, torch.cat([columns, rows]))
    rowptr_b = rowptr_b[c:]
    if weight is not None:
        weight = kernels.csr_slice_values(rowptr, rows, rowptr_b, weight)
    return CSR(rowptr_b, torch.where(col_b < c, col_b, col_b - r), weight, halo)


class HeteroGraph:
    """A PyG `HeteroData` as one `Relation` an edge type. Its nodes are also numbered together, type after type."""

    _known = WeakIdKeyDictionary()  # HeteroData -> HeteroGraph

    def __init__(self, data: HeteroData):
        self.x_dict: dict[str, Tensor] = {}
        for node_type in data.node_types:
            x, num_nodes = data[node_type].get("x"), data[node_type].num_nodes
            check_features(f"data[{node_type!r}].x", x, num_nodes)
            self.x_dict[node_type] = x
        if not data.edge_types:
            raise ValueError("data has no edge types; set data['source', 'to', 'target'].edge_index")
        self.sizes = {node_type: len(x) for node_type, x in self.x_dict.items()}
        self.num_nodes = sum(self.sizes.values())
        self.starts = torch.tensor([0, *self.sizes.values()]).cumsum(0).tolist()
        self.relations: dict[EdgeType, Relation] = {}
        for edge_type in data.edge_types:
            for node_type in (edge_type[0], edge_type[2]):
                if node_type not in self.x_dict:
                    raise ValueError(f"data[{node_type!r}] is missing, of which {edge_type} has edges; give it its x")
            x, target_x = self.x_dict[edge_type[0]], self.x_dict[edge_type[2]]
            self.relations[edge_type] = Relation(edge_type, data[edge_type], x, target_x)
        self.made = Made(_tensors(data))

    @classmethod
    def of(cls, data: HeteroData) -> HeteroGraph:
        """The graph of `data`, built at the first call and anew when its tensors are replaced or changed in place."""
        graph = cls._known.get(data)
        if graph is None or not graph.is_of(data):
            graph = cls._known[data] = cls(data)
        return graph

    def is_of(self, data: HeteroData) -> bool:
        """Whether `data` is still as it was."""
        return self.made.of(_tensors(data))

    @property
    def device(self) -> torch.device:
        return next(iter(self.x_dict.values())).device

    def edge_index(self) -> Tensor:
        """[2, e] all edges, between nodes numbered together."""
        start = dict(zip(self.sizes, self.starts, strict=False))
        shifted = [
            relation.edge_index + torch.tensor([[start[source]], [start[target]]], device=self.device)
            for (source, _, target), relation in self.relations.items()
        ]
        return torch.cat(shifted, 1)

    def by_type(self, n_id: Tensor) -> dict[str, Tensor]:
        """Ids of nodes of every type from ascending ones of nodes numbered together."""
        bounds = torch.searchsorted(n_id, torch.tensor(self.starts, device=n_id.device)).tolist()
        return {node_type: n_id[bounds[k] : bounds[k + 1]] - self.starts[k] for k, node_type in enumerate(self.sizes)}

    def batch(
        self,
        n_id: dict[str, Tensor],
        tensors: dict[str, dict[str, Tensor]] | None = None,
        x: dict[str, Tensor] | None = None,
        run: object | None = None,
    ) -> HeteroData:
        """These nodes of every type: `x`, `n_id` and `tensors` of the types, and each edge type's `graph`.

        x: in place of the nodes' features. run: as of `BatchGraph`.
        """
        batch = HeteroData()
        whole = all(ids.numel() == self.sizes[node_type] for node_type, ids in n_id.items())
        for node_type, ids in n_id.items():
            for name, value in {"x": self.x_dict[node_type], **(tensors or {}).get(node_type, {})}.items():
                batch[node_type][name] = value if whole else value[ids]
            if x is not None:
                batch[node_type].x = x[node_type]
            batch[node_type].n_id = ids
        for edge_type, relation in self.relations.items():
            source, _, target = edge_type
            graph = BatchRelation(relation, n_id[target], batch[source].x, n_id[source], run)
            batch[edge_type].graph = graph if run is not None else graph.prepare()
        return batch


def tensors_by_type(data: HeteroData) -> dict[str, dict[str, Tensor]]:
    """What batches bring of every type beside x."""
    return {store._key: node_tensors(store) for store in data.node_stores}


def _tensors(data: HeteroData) -> dict[tuple, Tensor]:
    """All that a graph is made of."""
    found = {(node_type, "x"): data[node_type].get("x") for node_type in data.node_types}
    for edge_type in data.edge_types:
        found[edge_type, "edge_index"] = data[edge_type].get("edge_index")
        found.update({(edge_type, name): value for name, value in edge_tensors(data[edge_type]).items()})
    return found
