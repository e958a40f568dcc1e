"""Link prediction: batches of edges, the score of a pair of nodes, and how well edges are found."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData

from .edge_dropout import EdgeDropout
from .graph import check_edge_index, check_ids
from .loader import Batch, BatchLoader

_SCORES = 2**25  # of user-item pairs at a time


class LinkLoader(BatchLoader):
    """Batches of edges to predict and of as many drawn pairs; their end points are the batch's nodes.

    Beside a batch's tensors it has `pairs` [2, p], positions among its nodes, and `labels` [p], 1 for an edge and 0 for
    a drawn pair. An epoch has each edge once.

    Args:
        data: PyG `Data` whose edges pass messages.
        edges: [2, e], to predict.
        batch_size: end points a batch; nodes that occur more than once are in it once. Default: a tenth of the graph.
        whole: one batch of all edges, in the whole graph.
        destinations: a drawn pair is an edge's source and one of these nodes, or by default any two nodes.
        seed, prefetch, device, edge_dropout: as in `BatchLoader`.
    """

    def __init__(
        self,
        data: Data,
        edges: Tensor,
        batch_size: int | None = None,
        whole: bool = False,
        destinations: range | None = None,
        seed: int = 0,
        prefetch: int | None = None,
        device: torch.device | str | None = None,
        edge_dropout: float = 0.0,
    ):
        if isinstance(data, HeteroData):
            raise ValueError("data is a HeteroData, whose links have two types; LinkLoader takes a Data")
        check_edge_index("edges", edges)
        check_ids("edges", edges, data.num_nodes, "data.num_nodes")
        if edges.size(1) == 0:
            raise ValueError("edges is [2, 0]; give it the edges to predict")
        if destinations is not None and (not destinations or destinations.step != 1):
            raise ValueError(f"destinations={destinations!r} must be a range of nodes, not empty, of step 1")
        if destinations is not None and not 0 <= destinations.start < destinations.stop <= data.num_nodes:
            raise ValueError(f"destinations={destinations!r} must be within data's nodes 0..{data.num_nodes - 1}")
        options = {"seed": seed, "prefetch": prefetch, "device": device, "edge_dropout": edge_dropout}
        super().__init__(data, batch_size, **options)
        self.edges, self.whole, self.destinations = edges, whole, destinations
        batch_size = batch_size or math.ceil(data.num_nodes / 10)
        ends = 4 if destinations is None else 3  # of an edge and its drawn pair
        self._num_batches = 1 if whole else min(math.ceil(ends * edges.size(1) / batch_size), edges.size(1))

    def _repeats(self) -> bool:
        return not self.whole

    def _draw(self, epoch: int) -> list[Tensor]:
        """Each batch's pairs [2, p] of nodes; the first half are edges."""
        generator, count = self._generator(epoch), self.edges.size(1)
        edges = self.edges[:, torch.randperm(count, generator=generator).to(self.edges.device)]
        if self.destinations is None:
            drawn = torch.randint(self.graph.num_nodes, (2, count), generator=generator).to(edges.device)
        else:
            low, high = self.destinations.start, self.destinations.stop
            drawn = torch.stack([edges[0], torch.randint(low, high, (count,), generator=generator).to(edges.device)])
        positives, negatives = (pairs.tensor_split(self._num_batches, 1) for pairs in (edges, drawn))
        return [torch.cat(pairs, 1) for pairs in zip(positives, negatives, strict=True)]

    def _build(self, pairs: Tensor, dropout: EdgeDropout | None = None) -> Batch:
        if self.whole:
            n_id, position = torch.arange(self.graph.num_nodes, device=pairs.device), pairs
        else:
            n_id, position = pairs.unique(return_inverse=True)
        batch = super()._build(n_id, dropout)
        batch.pairs = position.to(self.device)
        batch.labels = (torch.arange(pairs.size(1), device=self.device) < pairs.size(1) // 2).float()
        return batch


class LinkModel(nn.Module):
    """A GNN whose outputs z [b, f] score pairs of nodes: by inner product, or by an MLP of their product."""

    def __init__(self, gnn: nn.Module, channels: int, head: str):
        super().__init__()
        self.gnn = gnn
        self.head = None
        if head == "mlp":
            self.head = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 1))

    def forward(self, x: Tensor, graph: object = None) -> Tensor:
        return self.gnn(x, graph)

    def score(self, first: Tensor, second: Tensor) -> Tensor:
        """[p] logits of pairs of outputs [p, f]."""
        product = first * second
        return product.sum(1) if self.head is None else self.head(product)[:, 0]


def hits(positive: Tensor, negative: Tensor, k: int) -> float:
    """Hits@K as in OGB: the share of positive scores above the k-th highest negative score."""
    if negative.numel() < k:
        return 1.0
    return float((positive > negative.topk(k).values[-1]).float().mean())


def mrr(positive: Tensor, negative: Tensor) -> float:
    """Mean reciprocal rank as in OGB, of each score [p] among its own negatives' [p, r]; ties count half."""
    above, level = (negative > positive[:, None]).sum(1), (negative == positive[:, None]).sum(1)
    return float((1 / (1 + above + level / 2)).mean())


def recall(z: Tensor, pairs: Tensor, met: Tensor, num_users: int, k: int, device: torch.device | None = None) -> float:
    """Recall@K as for LightGCN: of each user's pairs, the share among its K best items, mean over users with pairs.

    Items are ranked by the inner product of outputs z [n, f]; of users 0..num_users-1, against all other nodes.

    Args:
        pairs, met: [2, p], [2, m] (user, item): to find, and to leave out of the ranking.
        device: to compute on; default: z's.
    """
    device = z.device if device is None else device
    items = z[num_users:].to(device)
    pairs = pairs.unique(dim=1)  # a pair counts once
    users, count = pairs[0].unique(return_counts=True)
    pairs, met = (edges[:, edges[0].argsort()] for edges in (pairs, met))
    share = 0.0
    for part, size in zip(*(t.split(max(1, _SCORES // len(items))) for t in (users, count)), strict=True):
        score = z[part].to(device) @ items.t()
        score[_cells(part, met, num_users)] = -math.inf
        right = torch.zeros_like(score, dtype=torch.bool)
        right[_cells(part, pairs, num_users)] = True
        found = right.gather(1, score.topk(min(k, len(items)), 1).indices).sum(1)
        share += float((found / size.to(device)).sum())
    return share / len(users)


def _cells(users: Tensor, edges: Tensor, num_users: int) -> tuple[Tensor, Tensor]:
    """(row, column) in a table of these ascending users and all items of edges [2, e], which ascend by user."""
    low, high = torch.searchsorted(edges[0].contiguous(), torch.stack([users[0], users[-1] + 1])).tolist()
    source, target = edges[:, low:high]
    row = torch.searchsorted(users, source)
    known = users[row.clamp(max=len(users) - 1)] == source
    return row[known], target[known] - num_users
