"""Link prediction: which edges are learnt and ranked, their batches, and the score of a pair of nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from .config import InputError
from .loader import Batch, BatchLoader

_VAL, _TEST = 0.05, 0.1  # shares of the edges in a random split
_NEGATIVES = 100_000  # pairs that are no edges, in a random split: as many as ogbl-collab has


@dataclass(frozen=True)
class Links:
    """Edges [2, e] to learn, and per split the edges to find among the pairs [2, m] that are no edges."""

    train: Tensor
    val: Tensor
    test: Tensor
    val_negatives: Tensor
    test_negatives: Tensor

    def to(self, device: torch.device) -> Links:
        return Links(**{name: edges.to(device) for name, edges in vars(self).items()})


def random_split(edge_index: np.ndarray, num_nodes: int, seed: int) -> tuple[np.ndarray, Links]:
    """`(edges that pass messages [2, e], links)`: 85 % of the node pairs that are joined are learnt and pass messages.

    5 % are for validation, 10 % for the test; each of the two has 100,000 uniformly drawn pairs that are not joined.
    """
    rng = np.random.default_rng(seed)
    low, high = edge_index.min(0).astype(np.int64), edge_index.max(0).astype(np.int64)
    key = low * num_nodes + high
    pairs, which = np.unique(key, return_inverse=True)
    joined = np.flatnonzero(pairs // num_nodes != pairs % num_nodes)  # a self loop is never held out
    order = rng.permutation(joined)
    val, test = math.ceil(_VAL * len(order)), math.ceil(_TEST * len(order))
    kept = np.ones(len(pairs), bool)
    kept[order[: val + test]] = False
    parts = np.split(pairs[order], [val, val + test])

    def negatives() -> Tensor:
        drawn = rng.integers(0, num_nodes, (2, 2 * _NEGATIVES))
        drawn = drawn[:, drawn[0] != drawn[1]]
        known = np.isin(drawn.min(0) * num_nodes + drawn.max(0), pairs)
        return torch.from_numpy(drawn[:, ~known][:, :_NEGATIVES])

    val, test, train = (torch.from_numpy(np.stack([part // num_nodes, part % num_nodes])) for part in parts)
    return edge_index[:, kept[which]], Links(train, val, test, negatives(), negatives())


def given_split(
    name: str, arrays: dict[str, np.ndarray], edge_index: np.ndarray, num_nodes: int
) -> tuple[np.ndarray, Links]:
    """`(edges that pass messages [2, e], links)` of a file's arrays, which number the graph's stored edges.

    They are train_edge_id, val_edge_id and test_edge_id [p], val_neg_dst and test_neg_dst [p, r] (nodes to which the
    source of the edge has none), and, if other edges than the last two sets' are to pass messages, message_edge_mask.
    """

    def refuse(problem: str) -> None:
        raise InputError(f"--links {name!r} {problem}")

    needed = ["train_edge_id", "val_edge_id", "test_edge_id", "val_neg_dst", "test_neg_dst"]
    missing = [key for key in needed if key not in arrays]
    if missing:
        refuse(f"lacks {', '.join(missing)}; see vqgnn.links.given_split for the format")
    edges = edge_index.shape[1]
    for key, limit in zip(needed, [edges] * 3 + [num_nodes] * 2, strict=True):
        ids, dims = arrays[key], 1 + key.endswith("dst")
        if ids.ndim != dims or ids.dtype.kind not in "iu" or not ids.size or not 0 <= ids.min() <= ids.max() < limit:
            refuse(f"has {key} {list(ids.shape)} {ids.dtype}; it must be {dims}-dimensional, integers 0..{limit - 1}")
    message = arrays.get("message_edge_mask")
    if message is None:
        message = np.ones(edges, bool)
        message[np.concatenate([arrays["val_edge_id"], arrays["test_edge_id"]])] = False
    if message.shape != (edges,) or message.dtype != bool:
        refuse(f"has message_edge_mask {list(message.shape)} {message.dtype}; it must be bool [{edges}]")
    found = {}
    for split in ("train", "val", "test"):
        found[split] = torch.from_numpy(edge_index[:, arrays[f"{split}_edge_id"]].astype(np.int64))
        if split != "train":
            target = arrays[f"{split}_neg_dst"].astype(np.int64)
            if len(target) != found[split].size(1):
                refuse(f"has {len(target)} rows of {split}_neg_dst for {found[split].size(1)} edges of {split}_edge_id")
            source = found[split][0].repeat_interleave(target.shape[1])
            found[f"{split}_negatives"] = torch.stack([source, torch.from_numpy(target).flatten()])
    return edge_index[:, message], Links(**found)


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
