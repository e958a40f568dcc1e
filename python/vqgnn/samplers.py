"""Which nodes make a batch: VQ-GNN's nodes, edges and random walks (its ablation of samplers), and METIS clusters.

A sampler draws an epoch: one tensor of different nodes, ascending, a batch. Where it does not visit each node once, it
weighs the losses: with `loss_weight` [n], 1 over the expected number of batches of an epoch that a node is in, the sum
of the weighted losses over an epoch is the full-batch sum in expectation (GraphSAINT's normalisation).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Generator, Tensor
from torch_geometric.data import Data, HeteroData

from .graph import Convolution, Graph
from .hetero_graph import HeteroGraph
from .partitioning import partition

SAMPLERS = ("node", "cluster", "edge", "walk")
WALK_LENGTH = 3  # steps
_PRESAMPLED = 2**24  # nodes of the walks by which visits are counted beforehand
_WALKS = 2**18  # at a time


class PartSampler:
    """Each node once an epoch: `parts` (default: single nodes) are shared out at random."""

    loss_weight = None

    def __init__(self, num_nodes: int, num_batches: int, shuffle: bool, parts: list[Tensor] | None = None):
        self.parts, self.shuffle = parts, shuffle
        self.count = num_nodes if parts is None else len(parts)
        self.num_batches = min(num_batches, self.count)

    def draw(self, generator: Generator) -> list[Tensor]:
        order = torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)
        groups = torch.tensor_split(order, self.num_batches)
        if self.parts:
            groups = [torch.cat([self.parts[i] for i in group.tolist()]) for group in groups]
        return [group.sort().values for group in groups]


class TypeSampler:
    """Each node once an epoch: every batch gets an equal, random share of every type of nodes numbered together."""

    loss_weight = None

    def __init__(self, sizes: list[int], num_batches: int, shuffle: bool):
        self.sizes, self.num_batches, self.shuffle = sizes, min(num_batches, sum(sizes)), shuffle

    def draw(self, generator: Generator) -> list[Tensor]:
        batches, start, more = [[] for _ in range(self.num_batches)], 0, 0
        for size in self.sizes:
            order = torch.randperm(size, generator=generator) if self.shuffle else torch.arange(size)
            for i, share in enumerate(torch.tensor_split(order + start, self.num_batches)):
                # tensor_split gives its first parts one more: by turns, so that batches are of equal size
                batches[(i + more) % self.num_batches].append(share)
            start += size
            more = (more + size) % self.num_batches
        return [torch.cat(shares).sort().values for shares in batches]


class EdgeSampler:
    """The end points of batch_size / 2 edges, drawn uniformly and independently; a node without edges is one itself."""

    def __init__(self, edge_index: Tensor, num_nodes: int, num_batches: int, batch_size: int):
        edge_index = edge_index.cpu()
        alone = torch.ones(num_nodes, dtype=torch.bool)
        alone[edge_index.flatten()] = False
        self.edge_index = torch.cat([edge_index, alone.nonzero().t().expand(2, -1)], 1)
        self.num_batches, self.num_edges = num_batches, max(1, batch_size // 2)
        source, target = self.edge_index
        ends = torch.cat([source, target[source != target]])  # a self loop has one
        share = ends.bincount(minlength=num_nodes).double() / source.numel()
        self.loss_weight = _loss_weight(share, self.num_edges, num_batches)

    def draw(self, generator: Generator) -> list[Tensor]:
        chosen = torch.randint(self.edge_index.size(1), (self.num_batches, self.num_edges), generator=generator)
        return [self.edge_index[:, edges].unique() for edges in chosen]


class WalkSampler:
    """The nodes of batch_size / 4 walks of three steps from uniformly drawn roots, each to a node that sends a message.

    Without one, a walk stays. Which share of all walks meets a node is counted beforehand, on walks from every node.
    """

    def __init__(self, data: Data, num_batches: int, batch_size: int):
        matrix = Graph.of(data).matrix(Convolution("sum"))
        self.rowptr, self.col = matrix.rowptr.cpu(), matrix.col.cpu()
        self.num_nodes, self.num_batches = data.num_nodes, num_batches
        self.num_roots = max(1, batch_size // (1 + WALK_LENGTH))
        self.loss_weight = _loss_weight(self._presampled(), self.num_roots, num_batches)

    def draw(self, generator: Generator) -> list[Tensor]:
        roots = torch.randint(self.num_nodes, (self.num_batches, self.num_roots), generator=generator)
        return [self._walk(batch, generator).unique() for batch in roots]

    def _walk(self, roots: Tensor, generator: Generator) -> Tensor:
        """[roots, steps + 1] nodes."""
        nodes = [roots]
        for _ in range(WALK_LENGTH):
            start, degree = self.rowptr[nodes[-1]], self.rowptr[nodes[-1] + 1] - self.rowptr[nodes[-1]]
            step = (torch.rand(roots.numel(), generator=generator, dtype=torch.float64) * degree).long()
            moves = degree > 0
            following = nodes[-1].clone()
            following[moves] = self.col[start[moves] + step[moves]].long()
            nodes.append(following)
        return torch.stack(nodes, 1)

    def _presampled(self) -> Tensor:
        """[n] share of the walks that meet each node, from equally many walks from every node."""
        n = self.num_nodes
        repeats = min(max(_PRESAMPLED // (n * (1 + WALK_LENGTH)), 8), 2000)
        visits, generator = torch.zeros(n, dtype=torch.int64), Generator().manual_seed(0)
        for start in range(0, repeats * n, _WALKS):
            roots = torch.arange(start, min(start + _WALKS, repeats * n)) % n
            walks = self._walk(roots, generator).sort(1).values
            first = torch.ones_like(walks, dtype=torch.bool)
            first[:, 1:] = walks[:, 1:] != walks[:, :-1]  # a walk that returns meets a node once
            visits += walks[first].bincount(minlength=n)
        return visits.double() / (repeats * n)


def _loss_weight(share: Tensor, draws: int, num_batches: int) -> Tensor:
    """[n] float32: one draw meets a node with probability `share` [n], a batch is so many independent draws."""
    inclusion = -torch.expm1(draws * torch.log1p(-share))
    return (1 / (num_batches * inclusion)).float()


def make(
    name: str, data: Data, num_batches: int, num_parts: int, shuffle: bool, cache_dir: str | Path | None
) -> PartSampler | EdgeSampler | WalkSampler:
    """The sampler of this name; it may need fewer batches than asked for."""
    n = data.num_nodes
    if name == "node":
        return PartSampler(n, num_batches, shuffle)
    if data.edge_index is None:
        raise ValueError(f"sampler={name!r} needs edge_index, which a graph on disk lacks; use sampler='node'")
    if name == "cluster":
        return PartSampler(n, num_batches, shuffle, partition(data.edge_index, n, min(num_parts, n), cache_dir))
    if not shuffle:
        raise ValueError(f"sampler={name!r} draws at random; leave shuffle={shuffle} out, or use sampler='node'")
    batch_size = -(-n // num_batches)
    if name == "edge":
        return EdgeSampler(data.edge_index, n, num_batches, batch_size)
    return WalkSampler(data, num_batches, batch_size)


def make_hetero(
    name: str, data: HeteroData, num_batches: int, num_parts: int, shuffle: bool, cache_dir: str | Path | None
) -> PartSampler | TypeSampler:
    """`make` for nodes of several types, numbered together."""
    graph = HeteroGraph.of(data)
    if name == "node":
        return TypeSampler(list(graph.sizes.values()), num_batches, shuffle)
    if name == "cluster":
        n = graph.num_nodes
        return PartSampler(n, num_batches, shuffle, partition(graph.edge_index(), n, min(num_parts, n), cache_dir))
    raise ValueError(f"sampler={name!r} is for Data; a HeteroData takes 'node' or 'cluster'")
