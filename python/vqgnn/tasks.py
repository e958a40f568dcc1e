"""What is learnt and measured: the loss of a batch and the scores of exact outputs. The trainer has everything else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data

from .config import Config, InputError
from .datasets import Dataset
from .inference import device_of
from .links import LinkLoader, LinkModel, hits, mrr, recall
from .loader import Batch, BatchLoader

SPLITS = ("train", "val", "test")
_ROWS = 65_536  # logits at a time
_RECALL_K = 20
_IGNORED = -100  # label of nodes that take no part in the loss


class NodeTask:
    """Classification of nodes: cross-entropy and accuracy, with several labels a node binary and micro-F1."""

    def __init__(self, config: Config, dataset: Dataset):
        self.multilabel, self.out_channels = dataset.multilabel, dataset.num_classes
        self.metric = dataset.metric if config.metric == "auto" else config.metric
        if self.metric == "auc" and not self.multilabel and self.out_channels != 2:
            raise InputError(f"--metric auc needs two classes or several labels a node, not {self.out_channels}")

    def with_head(self, model: nn.Module) -> nn.Module:
        """The model to train, from a GNN of `out_channels`."""
        return model

    def loader(self, config: Config, data: Data, device: torch.device) -> BatchLoader:
        """Batches of the data, for a model on this device."""
        options = {"seed": config.seed, "device": device, "edge_dropout": config.edge_dropout}
        if config.whole:
            return BatchLoader(data, batch_size=data.num_nodes, **options)
        num_parts, joined = config.parts_pair()
        options["sampler"] = config.sampler
        return BatchLoader(data, config.batch_size, num_parts, joined, **options)

    def count(self, data: Data) -> int:
        """Terms of the full-batch loss, which is their mean."""
        return int(data.train_mask.sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy (several labels: binary, their mean), weighted and summed over the training nodes."""
        logits = model(batch.x, batch.graph)
        y, mask = batch.y, batch.train_mask  # picking the rows by the mask would wait for their number
        weight = mask.to(logits.dtype) if batch.loss_weight is None else mask * batch.loss_weight
        if self.multilabel:
            return F.binary_cross_entropy_with_logits(logits, y, weight[:, None], reduction="sum") / y.size(1)
        losses = F.cross_entropy(logits, torch.where(mask, y, _IGNORED), ignore_index=_IGNORED, reduction="none")
        return (losses * weight).sum()

    def scores(self, model: nn.Module, logits: Tensor, data: Data) -> dict[str, float]:
        """`train_acc`, `val_acc`, `test_acc`, or the same with `_f1` or `_auc`, of logits [n, C]."""
        masks = {split: data[f"{split}_mask"] for split in SPLITS}
        if self.metric == "acc":  # never as many logits again as there are
            right = torch.cat([part.argmax(1) for part in logits.split(_ROWS)]) == data.y
            return {f"{split}_acc": float(right[mask].float().mean()) for split, mask in masks.items()}
        measure = {"f1": micro_f1, "auc": roc_auc}[self.metric]
        return {f"{split}_{self.metric}": measure(logits[mask], data.y[mask]) for split, mask in masks.items()}

    def arrays(self, logits: Tensor) -> dict[str, Tensor]:
        """What `vqgnn predict` writes."""
        return {"pred": (logits > 0) if self.multilabel else logits.argmax(1), "logits": logits}


class LinkTask:
    """Prediction of edges: binary cross-entropy of edges and drawn pairs.

    Scores are Hits@K as ogbl-collab's and, where each edge to find has negatives of its own, the mean reciprocal rank
    as ogbl-citation2's; or Recall@20 of a recommender's users, as LightGCN's.
    """

    def __init__(self, config: Config, dataset: Dataset):
        self.links, self.k, self.head = dataset.links, config.hits, config.head
        self.out_channels = config.hidden
        self.metric = self.links.metrics[0] if config.metric == "auto" else config.metric
        if self.metric not in self.links.metrics:
            needed = {
                "hits": "edges to find among pairs that are none",
                "mrr": "--links with negatives of every edge's own (val_neg_dst, test_neg_dst)",
                "recall": "--links of a recommender (test_pos, num_users)",
            }[self.metric]
            raise InputError(f"--metric {self.metric} needs {needed}; these links have {', '.join(self.links.metrics)}")
        if self.metric == "hits":
            count = min(self.links.val_negatives.size(1), self.links.test_negatives.size(1))
            if count < self.k:
                raise InputError(f"--hits {self.k} needs as many pairs that are no edges; of these there are {count}")
        if self.metric == "recall" and self.head != "dot":
            raise InputError(f"--head {self.head} cannot rank all items for --metric recall; use --head dot")

    def with_head(self, model: nn.Module) -> nn.Module:
        return LinkModel(model, self.out_channels, self.head)

    def loader(self, config: Config, data: Data, device: torch.device) -> BatchLoader:
        """Batches of the edges to learn, for a model on this device."""
        edges, destinations = self.links.train.to(data.x.device), self.links.destinations(data.num_nodes)
        options = {"seed": config.seed, "device": device, "edge_dropout": config.edge_dropout}
        options["destinations"] = destinations
        return LinkLoader(data, edges, config.batch_size, config.whole, **options)

    def count(self, data: Data) -> int:
        """Terms of the full-batch loss: the edges, and a drawn pair each."""
        return 2 * self.links.train.size(1)

    def loss_sum(self, model: LinkModel, batch: Batch) -> Tensor:
        z = model(batch.x, batch.graph)
        logits = model.score(*z[batch.pairs])
        return F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum")

    @torch.no_grad()
    def scores(self, model: LinkModel, z: Tensor, data: Data) -> dict[str, float]:
        """`val_hits`, `test_hits`, and `_mrr` where it can be had, or `_recall` alone, of exact outputs z [n, f]."""
        links, device = self.links.to(z.device), device_of(model, data)
        if self.metric == "recall":  # an item of the test was not met before, nor one of validation in training
            met = {"val": links.train, "test": torch.cat([links.train, links.val], 1)}
            sizes = links.num_users, _RECALL_K, device
            return {f"{split}_recall": recall(z, getattr(links, split), known, *sizes) for split, known in met.items()}

        def score(pairs: Tensor) -> Tensor:
            return torch.cat([model.score(*z[part].to(device)) for part in pairs.split(_ROWS, 1)])

        scores = {}
        for split in ("val", "test"):
            positive, negative = score(getattr(links, split)), score(getattr(links, f"{split}_negatives"))
            if len(negative) >= self.k:
                scores[f"{split}_hits"] = hits(positive, negative, self.k)
            if links.own_negatives:
                scores[f"{split}_mrr"] = mrr(positive, negative.view(len(positive), -1))
        return scores

    def arrays(self, z: Tensor) -> dict[str, Tensor]:
        """What `vqgnn predict` writes."""
        return {"embeddings": z}


TASKS = {"node": NodeTask, "link": LinkTask}


def micro_f1(logits: Tensor, y: Tensor) -> float:
    """Micro-averaged F1 of labels y [n, C] with a positive logit [n, C]."""
    positive, true = logits > 0, y > 0.5
    hits = int((positive & true).sum())
    return 2 * hits / max(1, int(positive.sum()) + int(true.sum()))


def roc_auc(logits: Tensor, y: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive is ranked above a negative, ties counted half.

    logits [n, 2] and classes y [n], or [n, C] and labels y [n, C]: then the mean over the labels that vary.
    """
    if y.dim() == 1:
        logits, y = logits[:, 1:] - logits[:, :1], y[:, None]
    areas = []
    for value, true in zip(logits.t(), (y > 0.5).t(), strict=True):
        positives = int(true.sum())
        negatives = true.numel() - positives
        if positives and negatives:
            _, group, size = value.unique(return_inverse=True, return_counts=True)
            rank = (size.cumsum(0) - (size - 1) / 2).double()[group]  # mean rank of equal values, from 1
            area = float(rank[true].sum()) - positives * (positives + 1) / 2
            areas.append(area / (positives * negatives))
    return sum(areas) / max(1, len(areas))
