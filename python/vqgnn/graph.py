"""The whole graph as sparse convolution matrices, and a mini-batch's share of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from torch_geometric.data import Data, HeteroData
from torch_geometric.data.storage import EdgeStorage, NodeStorage
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import add_self_loops, degree, get_laplacian, remove_self_loops

import vqgnn_kernels as kernels
from vqgnn_kernels import CSR, Rows

from .disk_graph import MappedData
from .edge_dropout import EdgeDropout
from .sparse_rows import SparseRows
from .store import Neighbours, NodeStore
from .transfer import Ticket

# rows, and numbers, of C X computed at a time, so that nothing but the result is ever as tall as the graph
_CHUNK, _CHUNK_NUMBERS = 65_536, 2**23
_FILLED = 1 / 8  # of C X at most, where its zeros are left out: an entry is 8 bytes then


def version(x: Tensor | None) -> int | None:
    """How often x was changed in place; None: not counted, as of tensors made in `torch.inference_mode`."""
    return None if x is None or x.is_inference() else x._version


class Made:
    """From which tensors, in which state, something was made that is kept."""

    def __init__(self, tensors: Mapping[Any, Tensor]):
        self.tensors = {key: (tensor, version(tensor)) for key, tensor in tensors.items()}

    def of(self, tensors: Mapping[Any, Tensor]) -> bool:
        """Whether these are they, neither replaced nor changed in place since."""
        then, now = self.tensors, Made(tensors).tensors
        return then.keys() == now.keys() and all(
            then[key][0] is now[key][0] and then[key][1] == now[key][1] for key in then
        )


class Wanted:
    """What converted convs need of each batch, as long as they live: convolutions and names of BatchGraph's methods.

    The loader's thread iterates over it while models are converted.
    """

    def __init__(self):
        self._of: dict[int, tuple[tuple[Any, str], ...]] = {}

    def add(self, conv: object, *items: tuple[Any, str]) -> None:
        """`conv` needs these too."""
        key = id(conv)
        if key not in self._of:
            weakref.finalize(conv, self._of.pop, key).atexit = False
        self._of[key] = tuple(dict.fromkeys((*self._of.get(key, ()), *items)))

    def set(self, conv: object, *items: tuple[Any, str]) -> None:
        """`conv` needs these alone."""
        self.add(conv)
        self._of[id(conv)] = items

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        return iter(dict.fromkeys(item for items in list(self._of.values()) for item in items))


def kept(make: Callable) -> Callable:
    """For a method of a batch: its result is kept, by its arguments."""

    @wraps(make)
    def run(self, *args, **options):
        key = (make.__name__, *args, *options.values())
        if key not in self._made:
            self._made[key] = self._make(make, *args, **options)
        return self._made[key]

    return run


def lasting(method: Callable) -> Callable:
    """For a method whose result is kept: made in `torch.inference_mode`, training could not use it."""

    @wraps(method)
    def run(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


@dataclass(frozen=True)
class Convolution:
    """Which fixed convolution matrix C a conv uses: the key under which the graph keeps it.

    kind: "gcn" (symmetrically normalised), "mean" or "sum" (adjacency, row-normalised or not), "attention" (adjacency,
        with add_self_loops exactly one loop a node; its weights are computed by the conv), or "cheb" (the Laplacian of
        that normalization, scaled to eigenvalues in [-1, 1], of whose Chebyshev polynomials `order` are used).
    edge_dim: columns of data.edge_attr that an attention takes; None: it takes none. fill: PyG's fill_value, what self
        loops get in its place.
    """

    kind: str
    normalize: bool = True
    add_self_loops: bool = True
    improved: bool = False
    normalization: str | None = None
    order: int = 0
    edge_dim: int | None = None
    fill: float | str | tuple[float, ...] | None = None

    def edges(self, graph: Graph) -> tuple[Tensor, Tensor | None]:
        """`(edge_index [2, e], weight [e] or None)` of C, with coefficients from the whole graph."""
        edge_index, weight = graph.edge_index, graph.edge_weight
        weight = None if weight is None else weight.float()
        if weight is not None and weight.requires_grad and self.kind in ("gcn", "cheb"):
            raise ValueError(
                "data.edge_weight requires a gradient, and a fixed convolution matrix gives none; give it .detach()ed, "
                "or use a conv that computes its own weights, as GATConv does"
            )
        if self.kind == "gcn":
            if not self.normalize:
                return edge_index, weight
            return gcn_norm(
                edge_index, weight, graph.num_nodes, self.improved, self.add_self_loops, dtype=torch.float32
            )
        if self.kind == "cheb":
            edge_index, weight = get_laplacian(edge_index, weight, self.normalization, torch.float32, graph.num_nodes)
            weight = weight / weight.max()  # 2 L / lambda_max, which is taken for twice the largest entry
            weight[edge_index[0] == edge_index[1]] -= 1
            return edge_index, weight
        if self.kind == "mean":  # PyG's SAGEConv takes no edge weights
            count = degree(edge_index[1], graph.num_nodes, dtype=torch.float32)
            return edge_index, (1.0 / count)[edge_index[1]]
        if self.kind == "attention" and self.add_self_loops:
            return add_self_loops(remove_self_loops(edge_index)[0], num_nodes=graph.num_nodes)[0], None
        return edge_index, None


@dataclass
class Matrix:
    """C and its transpose in compressed sparse rows: rowptr [n + 1] int64, col [e] int32, weight [e] fp32 or None.

    Where the graph is undirected the two share rowptr and col, and a batch slices them once.
    """

    rowptr: Tensor
    col: Tensor
    weight: Tensor | None
    rowptr_t: Tensor
    col_t: Tensor
    weight_t: Tensor | None

    @classmethod
    def build(cls, edge_index: Tensor, weight: Tensor | None, num_nodes: int, num_sources: int | None = None) -> Matrix:
        """num_sources: columns, where they are other nodes than the rows."""
        source, target = edge_index
        num_sources = num_nodes if num_sources is None else num_sources
        rowptr, col, order = compress(target, source, num_nodes, num_sources)
        rowptr_t, col_t, order_t = compress(source, target, num_sources, num_nodes)
        if torch.equal(rowptr, rowptr_t) and torch.equal(col, col_t):
            rowptr_t, col_t = rowptr, col
        weights = (None, None) if weight is None else (weight[order].contiguous(), weight[order_t].contiguous())
        if weight is not None and torch.equal(*weights):
            weights = (weights[0], weights[0])
        return cls(rowptr, col, weights[0], rowptr_t, col_t, weights[1])

    @property
    def symmetric_structure(self) -> bool:
        return self.rowptr_t is self.rowptr


EDGE_TENSORS = ("edge_weight", "edge_attr", "edge_type")  # of the data, which convs ask for by these names


def edge_weight(data: Data) -> Tensor | None:
    return data.edge_weight if "edge_weight" in data else None


def edge_tensors(data: Data) -> dict[str, Tensor]:
    return {name: data[name] for name in EDGE_TENSORS if isinstance(data.get(name), Tensor)}


def _tensors(data: Data) -> dict[str, Tensor]:
    """What a graph is made of."""
    given = {"edge_index": data.edge_index, "x": data.x}
    return {name: tensor for name, tensor in given.items() if isinstance(tensor, Tensor)} | edge_tensors(data)


def node_tensors(data: Data | NodeStorage) -> dict[str, Tensor]:
    """The tensors of a `Data`, or of a type of a `HeteroData`, with a row a node, without x: what batches bring too."""
    found = ((k, v) for k, v in data.to_dict().items() if k != "x" and isinstance(v, Tensor) and data.is_node_attr(k))
    return {k: v for k, v in found if v.size(0) == data.num_nodes}  # else nodes lie along another dimension


def compress(row: Tensor, col: Tensor, num_rows: int, num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(rowptr, col int32, order)` of edges sorted by (row, col); duplicates stay, in their order."""
    order = torch.argsort(row * num_cols + col, stable=True)
    rowptr = torch.zeros(num_rows + 1, dtype=torch.int64, device=row.device)
    torch.cumsum(torch.bincount(row, minlength=num_rows), 0, out=rowptr[1:])
    return rowptr, col[order].to(torch.int32), order


def check_features(name: str, x: Tensor | None, num_nodes: int | None) -> None:
    """Raise a ValueError unless x, called so, is what a graph's features must be."""
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise ValueError(f"{name} is {x.layout}, which is not supported; give {name}.to_dense()")
    if x is None or x.dim() != 2 or x.size(0) != num_nodes:
        came = None if x is None else tuple(x.shape)
        raise ValueError(f"{name} must be [num_nodes={num_nodes}, features], got {came}; give every node features")
    if x.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {x.dtype}; set {name} = {name}.float()")
    if x.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, and what is kept of it would give none; give {name}.detach(), and learn "
            "features in the model: model(embedding(batch.n_id), batch.graph) with an nn.Embedding, convert(forward=) "
            "likewise"
        )
    if num_nodes >= 2**31:
        raise ValueError(f"data has {num_nodes} nodes; at most 2^31 - 1 are supported")


def check_edge_index(name: str, edge_index: object) -> None:
    if not isinstance(edge_index, Tensor) or edge_index.dim() != 2 or edge_index.size(0) != 2:
        came = getattr(edge_index, "shape", None) or type(edge_index).__name__
        raise ValueError(
            f"{name} must be a [2, num_edges] tensor, got {came}; of an adj_t make one, by "
            "torch_geometric.utils.to_edge_index(adj_t.t())"
        )
    if edge_index.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {edge_index.dtype}; convert it with .long()")


def check_ids(name: str, ids: Tensor, num_nodes: int, setting: str) -> None:
    """Raise a ValueError unless all node ids are below num_nodes, which `setting` of the data is."""
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_nodes):
        raise ValueError(
            f"{name} holds node ids {int(ids.min())}..{int(ids.max())}, allowed are 0..{num_nodes - 1}; "
            f"drop those edges or set {setting}"
        )


def check_edge_tensors(name: str, data: Data | EdgeStorage, num_edges: int) -> None:
    """Raise a ValueError where what `data`, called so, has of its edges is not a row an edge."""
    for key in EDGE_TENSORS:
        value = data.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}.{key} must be a tensor with a row an edge, got a {type(value).__name__}")
        one = key == "edge_weight"
        if value.shape[:1] != (num_edges,) or (one and value.dim() != 1):
            wanted = f"[num_edges={num_edges}]" if one else f"[num_edges={num_edges}, ...]"
            raise ValueError(f"{name}.{key} must be {wanted}, got {list(value.shape)}; give every edge its own")


def check_edge_attr(name: str, edge_attr: Tensor, num_edges: int, edge_dim: int) -> None:
    """Raise a ValueError unless edge_attr is [num_edges, edge_dim] float32; one column may be without its dimension."""
    shape = (num_edges,) if edge_attr.dim() == 1 and edge_dim == 1 else (num_edges, edge_dim)
    if edge_attr.shape != shape or edge_attr.dtype != torch.float32:
        raise ValueError(
            f"{name} is {list(edge_attr.shape)} {edge_attr.dtype}; a conv of edge_dim={edge_dim} needs "
            f"[num_edges={num_edges}, {edge_dim}] torch.float32: give every edge so many numbers, by .float(), or set "
            "the conv's edge_dim"
        )
    if edge_attr.requires_grad:
        raise ValueError(f"{name} requires a gradient, and a fused attention gives it none; give it .detach()ed")


class Graph:
    """A PyG `Data` as the convolution matrices that its models need, each built once and kept.

    Edges go from `edge_index[0]` to `edge_index[1]`, as in PyG; row i of C holds the messages *to* node i.
    """

    _known = WeakIdKeyDictionary()  # Data -> Graph

    def __init__(self, data: Data):
        edge_index, num_nodes = data.edge_index, data.num_nodes
        self.folder = data.folder if isinstance(data, MappedData) else None  # its files have been checked
        if self.folder is not None:
            if edge_index is not None or edge_weight(data) is not None or data.x is not self.folder.tensor("x"):
                raise ValueError("a graph on disk takes x and the edges from its folder; write another folder instead")
            edge_index = torch.empty(2, 0, dtype=torch.int64)
        check_edge_index("data.edge_index", edge_index)
        check_features("data.x", data.x, num_nodes)
        check_ids("data.edge_index", edge_index, num_nodes, "data.num_nodes")
        self.num_nodes = self.num_sources = num_nodes
        self.edge_index = data.edge_index
        self.edge_weight = edge_weight(data)
        check_edge_tensors("data", data, edge_index.size(1))
        self.edge_tensors = edge_tensors(data)
        self.x = data.x
        self.made = Made(_tensors(data))
        self._matrices: dict[Convolution, Matrix] = {}
        self._orders: dict[tuple[Convolution, bool], Tensor] = {}
        self._products: dict[Convolution, Tensor | SparseRows] = {}
        self._terms: dict[Convolution, list[Tensor]] = {}
        self._edge_features: dict[Convolution, Tensor] = {}
        self.wanted = Wanted()
        self.recorded: list = []  # what convs made of the graph's edges (generic.Recorded), for others to share

    @classmethod
    def of(cls, data: Data) -> Graph:
        """The graph of `data`, built at the first call and anew when its tensors are replaced or changed in place."""
        if isinstance(data, HeteroData):
            raise ValueError("data is a HeteroData, which only convert, BatchLoader, layerwise and warmup take")
        if not isinstance(data, Data):
            raise ValueError(f"data is a {type(data).__name__}; give one graph, a torch_geometric.data.Data")
        graph = cls._known.get(data)
        if graph is None or not graph.is_of(data):
            graph = cls._known[data] = cls(data)
        return graph

    def is_of(self, data: Data) -> bool:
        """Whether `data` is still as it was."""
        return self.made.of(_tensors(data))

    @lasting
    def matrix(self, convolution: Convolution) -> Matrix:
        if convolution not in self._matrices:
            if self.folder is not None:
                self._matrices[convolution] = Matrix(*self.folder.matrix(convolution))
            else:
                self._matrices[convolution] = Matrix.build(*convolution.edges(self), self.num_nodes)
        return self._matrices[convolution]

    @lasting
    def order(self, convolution: Convolution, transposed: bool = False) -> Tensor:
        """[e] the number in `convolution.edges` of each edge in its matrix's rows, or in the transposed one's."""
        if (convolution, transposed) not in self._orders:
            source, target = convolution.edges(self)[0]
            ends, sizes = (target, source), (self.num_nodes, self.num_sources)
            if transposed:
                ends, sizes = ends[::-1], sizes[::-1]
            self._orders[convolution, transposed] = compress(*ends, *sizes)[2]
        return self._orders[convolution, transposed]

    @lasting
    def edge_features(self, convolution: Convolution) -> Tensor | None:
        """[e, edge_dim] what the conv takes of each of `convolution.edges`; None: of this graph it takes none.

        A self loop that PyG would add gets the mean of the edges to its node, or what `fill` says, of the whole graph.
        """
        if convolution.edge_dim is None or "edge_attr" not in self.edge_tensors:
            return None
        if convolution not in self._edge_features:
            self.matrix(convolution)  # of a graph on disk there is none, and no edge has features
            features, fill = self.edge_tensors["edge_attr"], convolution.fill
            check_edge_attr("data.edge_attr", features, self.edge_index.size(1), convolution.edge_dim)
            features = features.view(len(features), convolution.edge_dim)
            if convolution.add_self_loops:
                if isinstance(fill, tuple):
                    if len(fill) != convolution.edge_dim:
                        raise ValueError(
                            f"fill_value has {len(fill)} numbers for edge_dim={convolution.edge_dim}; give one a column"
                        )
                    fill = torch.tensor(fill)
                edge_index, features = remove_self_loops(self.edge_index, features)
                features = add_self_loops(edge_index, features, fill, self.num_nodes)[1]
            self._edge_features[convolution] = features.contiguous()
        return self._edge_features[convolution]

    def rows_of(self, convolution: Convolution, start: int, stop: int) -> CSR:
        """Rows start..stop of C with columns that index a table of all nodes directly."""
        matrix = self.matrix(convolution)
        rowptr = matrix.rowptr[start : stop + 1]
        edges = slice(int(rowptr[0]), int(rowptr[-1]))
        weight = None if matrix.weight is None else matrix.weight[edges]
        return CSR(rowptr - rowptr[0], matrix.col[edges], weight, None)

    def propagate(self, convolution: Convolution, rows: Rows, start: int, stop: int, dim: int) -> Tensor:
        """Rows start..stop of C X, with X [n, dim] given as a table."""
        empty = torch.empty(0, dim, dtype=torch.float32, device=rows.data.device)
        return kernels.aggregate(empty, self.rows_of(convolution, start, stop), rows)

    @lasting
    def product(self, convolution: Convolution) -> Tensor | SparseRows:
        """C X [n, f] of the input features, computed once (SGC's insight): the input layer needs no store.

        To be indexed for rows: of bags of words, it is kept without its zeros.
        """
        if convolution not in self._products:
            if self.folder is not None:
                self.matrix(convolution)  # before, so that its time is not C X's
                out = self.folder.product(convolution, self.x.shape, lambda: self._product_chunks(convolution))
            elif self._entries_at_most(convolution) < _FILLED * self.num_nodes * self.x.size(1):
                out = SparseRows.of(self._product_chunks(convolution))
            else:
                out, start = self.x.new_empty(self.num_nodes, self.x.size(1)), 0
                for chunk in self._product_chunks(convolution):
                    out[start : start + len(chunk)] = chunk
                    start += len(chunk)
            self._products[convolution] = out
        return self._products[convolution]

    @lasting
    def whole_product(self, convolution: Convolution) -> Tensor:
        """C X [n, f], kept with its zeros from now on."""
        product = self.product(convolution)
        if isinstance(product, SparseRows):
            product = self._products[convolution] = product[:]
        return product

    def _entries_at_most(self, convolution: Convolution) -> int:
        """Numbers in C X that are not 0: at most as many as in the rows of X that all its rows are sums of."""
        filled = torch.cat([(x != 0).sum(1) for x in self.x.split(self._chunk_rows)])
        return int((filled * self.matrix(convolution).rowptr_t.diff()).sum())

    @property
    def _chunk_rows(self) -> int:
        return min(_CHUNK, max(1, _CHUNK_NUMBERS // max(1, self.x.size(1))))

    @lasting
    def terms(self, convolution: Convolution) -> list[Tensor]:
        """Chebyshev polynomials T_1, T_2, ... [n, f] of C, of the input features; computed once."""
        if convolution not in self._terms:
            terms = [self.x, self.whole_product(convolution)]
            while len(terms) < convolution.order:
                rows = Rows("fp32", terms[-1], None, None)
                after = torch.empty_like(self.x)
                for start in range(0, self.num_nodes, self._chunk_rows):
                    stop = min(start + self._chunk_rows, self.num_nodes)
                    after[start:stop] = self.propagate(convolution, rows, start, stop, self.x.size(1))
                terms.append(after.mul_(2).sub_(terms[-2]))
            self._terms[convolution] = terms[1:]
        return self._terms[convolution]

    def _product_chunks(self, convolution: Convolution) -> Iterator[Tensor]:
        for start in range(0, self.num_nodes, self._chunk_rows):
            stop = min(start + self._chunk_rows, self.num_nodes)
            yield self.propagate(convolution, self.features, start, stop, self.x.size(1))

    @property
    def device(self) -> torch.device:
        return self.x.device

    @cached_property
    def features(self) -> Rows:
        """The input features as a table of exact rows."""
        return Rows("fp32", self.x.detach().float().contiguous(), None, None)


class BatchEdges(NamedTuple):
    """Edges between a few nodes of a graph as PyG writes them.

    edge_index [2, e]: source and target as positions among the nodes, those that get messages first. others [o]: ids of
    the nodes behind them. ids [e]: the edges' numbers in `convolution.edges`, where their values are asked for.
    """

    edge_index: Tensor
    others: Tensor
    ids: Tensor | None

    def among(self, own: int) -> BatchEdges:
        """Only the edges whose source is one of the first `own` nodes too."""
        if self.others.numel() == 0:
            return self
        inside = self.edge_index[0] < own
        ids = None if self.ids is None else self.ids[inside]
        return BatchEdges(self.edge_index[:, inside], self.others[:0], ids)


class EdgeIndexError(AttributeError, ValueError):
    """A model treats a batch's graph as an edge_index; also an AttributeError, so that hasattr answers no."""


def not_an_edge_index(used: str) -> EdgeIndexError:
    return EdgeIndexError(
        f"the model's forward uses {used} of its edge_index, but a mini-batch brings a BatchGraph, which convs alone "
        "read; move what it does to edges into a transform of the data, once and before vqgnn.convert: "
        "data = torch_geometric.transforms.AddSelfLoops()(data), ToUndirected, RemoveDuplicatedEdges, GCNNorm, ...; "
        "for edges dropped at random (dropout_edge), give BatchLoader edge_dropout"
    )


def require_graph(kept: int, num_nodes: int) -> None:
    """Raise a ValueError unless a store's nodes are as many as the graph's that a batch is of."""
    if kept != num_nodes:
        raise ValueError(
            f"the model was converted for a graph of {kept} nodes and got a batch of one of {num_nodes}; convert it "
            "for that one, or use vqgnn.inference.layerwise there"
        )


def require_unchanged(name: str, x: Tensor, before: int | None) -> None:
    """Raise a ValueError where the model has changed its input in place since `before`, its `version`."""
    if version(x) != before:
        raise ValueError(
            f"the model changes {name} in place, which must stay the data's features; leave out inplace=True (or "
            "relu_, +=, ...) before its first conv"
        )


@dataclass(eq=False)
class BatchGraph:
    """What a mini-batch knows of the graph: goes where `edge_index` goes.

    n_id [b] are the batch's nodes, x [b, f] their input features. `run` is set by layer-wise inference, which then
    answers for every conv instead of the training store. visit [3], on the host: the number of the loader's pass, which
    no other pass has, and of the batch in it, and whether nodes may be in several of its batches. edge_dropout: what
    drops some of its edges; None: all stay.
    """

    graph: Graph
    n_id: Tensor
    x: Tensor
    run: object | None = None
    visit: Tensor | None = None
    edge_dropout: EdgeDropout | None = None
    started: bool = False  # see `start`
    _made: dict[tuple, Any] = field(default_factory=dict, repr=False)
    _started: dict[NodeStore, dict[str, Ticket]] = field(default_factory=dict, repr=False)

    def prepare(self) -> BatchGraph:
        """Slice all that the converted models of this graph need (done by the loader's thread)."""
        for convolution, method in self.graph.wanted:
            if self._droppable(convolution):  # else the model that wants it says so
                getattr(self, method)(convolution)
        return self

    @property
    def origin(self) -> BatchGraph:
        """This batch on the graph's device."""
        return self

    @property
    def whole(self) -> bool:
        """Whether the batch is the graph itself, in its own order."""
        return self.x is self.graph.x

    def start(self, reads: list[tuple[NodeStore, Convolution]]) -> None:
        """Begin to bring what `neighbours` will be asked for, in this order."""
        self.started = True
        for store, convolution in reads:
            self._started[store] = store.start(*self.origin.csr(convolution))

    def neighbours(self, store: NodeStore, convolution: Convolution) -> Neighbours:
        """The batch's neighbours with their stored states."""
        require_graph(store.num_nodes, self.graph.num_nodes)
        started = None
        if not store.in_place:
            started = self._started.pop(store, None) or store.start(*self.origin.csr(convolution))
        return store.neighbours(*self.csr(convolution), started)

    def read(self, rows: Rows, convolution: Convolution) -> Neighbours:
        """The batch's neighbours with states from a table of all nodes beside the graph; without gradients."""
        return Neighbours(self.csr(convolution)[0], rows)

    def _make(self, make: Callable, *args: Any, **options: Any) -> Any:
        """For `kept`."""
        return make(self, *args, **options)

    @kept
    def csr(self, convolution: Convolution) -> tuple[CSR, CSR]:
        """The batch's rows of C and of its transpose: columns < b in the batch, the others in its halo.

        Of an attention with edge features their weights are these, [e, edge_dim].
        """
        if self.edge_dropout is None:
            return self._with_features(convolution)
        self._require_droppable(convolution)
        csr, csr_t = self.slices(convolution)
        rows, scaled = self.edge_dropout.rows, convolution.kind != "attention"
        return rows(csr, self.n_id, scaled), rows(csr_t, self.n_id, scaled, transposed=True)

    def slices(self, convolution: Convolution) -> tuple[CSR, CSR]:
        """`csr` before edges are dropped."""
        return self.csr(convolution) if self.edge_dropout is None else self._whole_slices(convolution)

    @kept
    def _whole_slices(self, convolution: Convolution) -> tuple[CSR, CSR]:
        return self._with_features(convolution)

    def _droppable(self, convolution: Convolution) -> bool:
        """Whether the edges that are left need no other weights than those of the whole graph."""
        weighted = any(getattr(convolution, "values", ()))  # by a conv of which PyG's code runs
        return self.edge_dropout is None or not (weighted or getattr(convolution, "kind", None) == "cheb")

    def _require_droppable(self, convolution: Convolution) -> None:
        if not self._droppable(convolution):
            cheb = getattr(convolution, "kind", None) == "cheb"
            which = "ChebConv" if cheb else "a conv that weighs the edges itself (SGConv, APPNP)"
            raise ValueError(
                f"edge_dropout={self.edge_dropout.share} is not for {which}, whose weights are the whole graph's; use "
                "GCNConv, SAGEConv or an attention, or leave it out"
            )

    def _with_features(self, convolution: Convolution) -> tuple[CSR, CSR]:
        forward, transposed = self._sliced(convolution)
        features = self.graph.edge_features(convolution)
        if features is None:
            return forward, transposed
        m, order = self.graph.matrix(convolution), self.graph.order
        ids, ids_t = order(convolution), order(convolution, transposed=True)
        if not self.whole:
            ids, ids_t = ids[self._places(m.rowptr, forward)], ids_t[self._places(m.rowptr_t, transposed)]
        return forward._replace(weight=features[ids]), transposed._replace(weight=features[ids_t])

    def _sliced(self, convolution: Convolution) -> tuple[CSR, CSR]:
        m = self.graph.matrix(convolution)
        if self.whole:
            none = self.n_id.new_empty(0)
            return CSR(m.rowptr, m.col, m.weight, none), CSR(m.rowptr_t, m.col_t, m.weight_t, none)
        forward = self._slice(m.rowptr, m.col, m.weight)
        if not m.symmetric_structure:
            return forward, self._slice(m.rowptr_t, m.col_t, m.weight_t)
        if m.weight_t is m.weight:
            return forward, forward
        weight_t = kernels.csr_slice_values(m.rowptr, self.n_id, forward.rowptr, m.weight_t)
        return forward, forward._replace(weight=weight_t)

    def _places(self, rowptr: Tensor, csr: CSR) -> Tensor:
        """[e] where the edges of the batch's rows stand in the graph's matrix."""
        return self._edge_index(rowptr, self.n_id, csr.rowptr, csr.col)[2]

    def _slice(self, rowptr: Tensor, col: Tensor, weight: Tensor | None) -> CSR:
        rowptr_b, col_b, halo = kernels.csr_slice(rowptr, col, self.n_id)
        if weight is not None:
            weight = kernels.csr_slice_values(rowptr, self.n_id, rowptr_b, weight)
        return CSR(rowptr_b, col_b, weight, halo)

    @kept
    def halo_transpose(self, convolution: Convolution) -> CSR:
        """[b + h, b]: of the batch's rows of C, by which the halo's rows are given gradients as its own are."""
        csr, csr_t = self.csr(convolution)
        if self.whole:
            return csr_t
        b, h, e = self.n_id.numel(), csr.halo.numel(), csr.col.numel()
        order = torch.argsort(csr.col, stable=True)
        row = torch.arange(b, dtype=torch.int32, device=order.device)
        row = row.repeat_interleave(csr.rowptr.diff(), output_size=e)
        rowptr = torch.searchsorted(csr.col[order], torch.arange(b + h + 1, dtype=torch.int32, device=order.device))
        return CSR(rowptr, row[order], None if csr.weight is None else csr.weight[order], self.n_id.new_empty(0))

    @kept
    def input_messages(self, convolution: Convolution) -> Tensor:
        """The batch's rows of C X [b, f]."""
        return self.graph.whole_product(convolution) if self.whole else self.graph.product(convolution)[self.n_id]

    @kept
    def input_terms(self, convolution: Convolution) -> tuple[Tensor, ...]:
        """The batch's rows of `Graph.terms`, each [b, f]."""
        self._require_droppable(convolution)
        terms = self.graph.terms(convolution)
        return tuple(terms if self.whole else (term[self.n_id] for term in terms))

    @kept
    def exact_neighbours(self, convolution: Convolution) -> Neighbours:
        """The batch's neighbours with their given features."""
        csr, csr_t = self.csr(convolution)
        return Neighbours(csr, self.graph.features, csr_t)

    @kept
    def edges(self, convolution: Convolution, valued: bool = False) -> BatchEdges:
        """The edges into the batch, `others` being its halo; with valued, their ids too."""
        self._require_droppable(convolution)
        csr = self.slices(convolution)[0]
        edges = self._edge_index(self.graph.matrix(convolution).rowptr, self.n_id, csr.rowptr, csr.col)
        if self.edge_dropout is not None:
            source = torch.cat([self.n_id, csr.halo])[edges[0]]
            edges = edges[:, self.edge_dropout.keeps(source, self.n_id[edges[1]])]
        order = self.graph.order(convolution) if valued else None
        return BatchEdges(edges[:2], csr.halo, None if order is None else order[edges[2]])

    def valued_edges(self, convolution: Convolution) -> BatchEdges:
        return self.edges(convolution, valued=True)

    @kept
    def edges_out(self, convolution: Convolution, all_sources: bool, valued: bool = False) -> tuple[Tensor, BatchEdges]:
        """The out-of-batch nodes [d] that the batch sends to, and the edges into them.

        From the batch alone, which then stands behind them as `others`, or with all_sources from every node. None of
        these edges is dropped: by them come kept gradients.
        """
        matrix, csr = self.graph.matrix(convolution), self.slices(convolution)[1]
        targets = csr.halo
        if all_sources:
            rowptr, col, others = kernels.csr_slice(matrix.rowptr, matrix.col, targets)
            edges = self._edge_index(matrix.rowptr, targets, rowptr, col)
        else:
            others, b = self.n_id, self.n_id.numel()
            edges = self._edge_index(matrix.rowptr_t, others, csr.rowptr, csr.col)
            target, source, place = edges[:, edges[0] >= b]
            edges = torch.stack([source + targets.numel(), target - b, place])
        order = self.graph.order(convolution, transposed=not all_sources) if valued else None
        return targets, BatchEdges(edges[:2], others, None if order is None else order[edges[2]])

    def _edge_index(self, rowptr: Tensor, nodes: Tensor, rowptr_b: Tensor, col_b: Tensor) -> Tensor:
        """[3, e] column, row and place in the graph's matrix of the edges of `nodes`, cut out as rowptr_b and col_b."""
        count, e = rowptr_b.diff(), col_b.numel()
        row = torch.arange(count.numel(), device=col_b.device).repeat_interleave(count, output_size=e)
        place = (rowptr[nodes] - rowptr_b[:-1])[row] + torch.arange(e, device=col_b.device)
        return torch.stack([col_b.long(), row, place])

    @cached_property
    def source_id(self) -> Tensor:
        """[b] the batch's nodes that messages come from."""
        return self.n_id

    @cached_property
    def position(self) -> Tensor:
        """[num_sources] where each node that messages come from stands in the batch, -1 outside it."""
        position = torch.full((self.graph.num_sources,), -1, device=self.n_id.device)
        position[self.source_id] = torch.arange(self.source_id.numel(), device=self.n_id.device)
        return position

    def __getattr__(self, name: str):
        if not name.startswith("__") and hasattr(Tensor, name):
            raise not_an_edge_index(f".{name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index):
        raise not_an_edge_index("[...]")

    def __len__(self):
        raise not_an_edge_index("the length")

    def __bool__(self):  # not by its length
        return True

    def __iter__(self):
        raise not_an_edge_index("the rows (row, col = edge_index)")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise not_an_edge_index(f"torch.{getattr(function, '__name__', function)}(...)")


class MovedBatch(BatchGraph):
    """A batch for a model on another device than the graph: what it needs is made beside the graph, then moved.

    `move` copies a tensor to the model's device.
    """

    def __init__(self, origin: BatchGraph, move: Callable[[Tensor], Tensor]):
        self._origin, self._copy, self._copies = origin, move, {}
        moved = self._moved(origin.n_id), self._moved(origin.x)
        super().__init__(origin.graph, *moved, origin.run, origin.visit, origin.edge_dropout)

    @property
    def origin(self) -> BatchGraph:
        return self._origin

    @property
    def whole(self) -> bool:
        return self._origin.whole

    def _moved(self, value: Any) -> Any:
        """The tensors in tuples of tuples, each moved once."""
        if isinstance(value, Tensor):
            if id(value) not in self._copies:
                self._copies[id(value)] = value, self._copy(value)  # kept, so that nothing else gets its id
            return self._copies[id(value)][1]
        if isinstance(value, tuple):
            moved = map(self._moved, value)
            return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
        return value

    def _make(self, make: Callable, *args: Any, **options: Any) -> Any:
        """The origin's, moved, but for what this class makes itself."""
        if make.__name__ in vars(type(self)):
            return make(self, *args, **options)
        return self._moved(getattr(self._origin, make.__name__)(*args, **options))

    @kept
    def exact_neighbours(self, convolution: Convolution) -> Neighbours:
        """As BatchGraph's; of the features only the halo's rows are moved."""
        csr_t = self.csr(convolution)[1]
        return self.read(self.graph.features, convolution)._replace(csr_t=csr_t._replace(halo=None))

    def read(self, rows: Rows, convolution: Convolution) -> Neighbours:
        halo = self._origin.csr(convolution)[0].halo
        data, scale = (None if t is None else self._copy(t[halo]) for t in (rows.data, rows.scale))
        csr = self.csr(convolution)[0]._replace(halo=None)
        return Neighbours(csr, rows._replace(data=data, scale=scale))
