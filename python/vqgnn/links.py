"""Link prediction: batches of edges, the score of a pair of nodes, and Hits@K."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from .loader import Batch, BatchLoader


class LinkLoader(BatchLoader):
    """Batches of edges to predict and of as many uniformly drawn pairs; their end points are the batch's nodes.

    Beside a batch's tensors it has `pairs` [2, p], positions among its nodes, and `labels` [p], 1 for an edge and 0 for
    a drawn pair. An epoch has each edge once.

    Args:
        data: PyG `Data` whose edges pass messages.
        edges: [2, e], to predict.
        batch_size: end points a batch; nodes that occur more than once are in it once. Default: a tenth of the graph.
        whole: one batch of all edges, in the whole graph.
        seed, prefetch, device: as in `BatchLoader`.
    """

    def __init__(
        self,
        data: Data,
        edges: Tensor,
        batch_size: int | None = None,
        whole: bool = False,
        seed: int = 0,
        prefetch: int = 2,
        device: torch.device | str | None = None,
    ):
        super().__init__(data, batch_size, seed=seed, prefetch=prefetch, device=device)
        self.edges, self.whole = edges, whole
        batch_size = batch_size or math.ceil(data.num_nodes / 10)
        self._num_batches = 1 if whole else math.ceil(4 * edges.size(1) / batch_size)

    def _draw(self, epoch: int) -> list[Tensor]:
        """Each batch's pairs [2, p] of nodes; the first half are edges."""
        generator, count = self._generator(epoch), self.edges.size(1)
        order = torch.randperm(count, generator=generator).to(self.edges.device)
        drawn = torch.randint(self.graph.num_nodes, (2, count), generator=generator).to(self.edges.device)
        positives, negatives = (pairs.tensor_split(self._num_batches, 1) for pairs in (self.edges[:, order], drawn))
        return [torch.cat(pairs, 1) for pairs in zip(positives, negatives, strict=True)]

    def _build(self, pairs: Tensor) -> Batch:
        if self.whole:
            n_id, position = torch.arange(self.graph.num_nodes, device=pairs.device), pairs
        else:
            n_id, position = pairs.unique(return_inverse=True)
        batch = super()._build(n_id)
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
