"""Link prediction: which edges pass messages, which are learnt, and which are to be found among which pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .config import InputError

_VAL, _TEST = 0.05, 0.1  # shares of the edges in a random split
_NEGATIVES = 100_000  # pairs that are no edges, in a random split: as many as ogbl-collab has


@dataclass(frozen=True)
class Links:
    """Edges [2, e] to learn, and per split the edges [2, p] to find among the pairs [2, m] that are no edges.

    own_negatives: each edge to find has m / p pairs of its own, in the edges' order, with its source; else all share
    them. num_users: of a recommender, whose edges go from users 0..num_users-1 to items, the other nodes; a user's
    edges are to be found among all items that the user has not met, and there are no such pairs.
    """

    train: Tensor
    val: Tensor
    test: Tensor
    val_negatives: Tensor | None = None
    test_negatives: Tensor | None = None
    own_negatives: bool = False
    num_users: int | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The scores that can be had, the usual one first."""
        if self.num_users is not None:
            return ("recall",)
        return ("hits", "mrr") if self.own_negatives else ("hits",)

    def destinations(self, num_nodes: int) -> range | None:
        """Where pairs that are no edges lead, if they have the sources of edges; None: they are any two nodes."""
        if self.num_users is not None:
            return range(self.num_users, num_nodes)
        return range(num_nodes) if self.own_negatives else None

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Links:
        return replace(self, **{name: edges.to(device) for name, edges in self.tensors().items()})


def random_split(edge_index: np.ndarray, num_nodes: int, seed: int) -> tuple[np.ndarray, Links]:
    """`(edges that pass messages [2, e], links)`: 85 % of the node pairs that are joined are learnt and pass messages.

    5 % are for validation, 10 % for the test; each of the two has 100,000 uniformly drawn pairs that are not joined.
    """
    rng = np.random.default_rng(seed)
    low, high = edge_index.min(0).astype(np.int64), edge_index.max(0).astype(np.int64)
    key = low * num_nodes + high
    pairs, which = np.unique(key, return_inverse=True)
    joined = np.flatnonzero(pairs // num_nodes != pairs % num_nodes)  # a self loop is never held out
    if len(joined) < 3:
        raise InputError(f"the graph has {len(joined)} joined pairs of nodes; --task link needs 3 to split, or more")
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
    name: str,
    arrays: dict[str, np.ndarray],
    edge_index: np.ndarray,
    num_nodes: int,
    seed: int = 0,
    directed: bool = False,
) -> tuple[np.ndarray, Links]:
    """`(edges that pass messages [2, e], links)` of a file's arrays; ids of edges are those of the graph's stored ones.

    They are train_edge_id, val_edge_id and test_edge_id [p], val_neg_dst and test_neg_dst [p, r] (nodes to which the
    source of the edge has none), and, if other edges than all but the last two sets' (of a graph that is not directed,
    but those between the same nodes) are to pass messages, message_edge_mask.

    A recommender's are test_pos [2, p] (user, item), num_users, and val_pos [2, p] or none: then 5 % of the edges,
    drawn by `seed`, are for validation. The graph's edges go from users 0..num_users-1 to items num_users.., and all
    but those of validation and test are learnt and pass messages.
    """
    refuse = _refuse(name)
    if "test_pos" in arrays:
        return _recommender(refuse, arrays, edge_index, num_nodes, seed)
    needed = ["train_edge_id", "val_edge_id", "test_edge_id", "val_neg_dst", "test_neg_dst"]
    _require(refuse, arrays, needed)
    edges = edge_index.shape[1]
    for key, limit in zip(needed, [edges] * 3 + [num_nodes] * 2, strict=True):
        _check_ids(refuse, key, arrays[key], 1 + key.endswith("dst"), limit)
    message = arrays.get("message_edge_mask")
    if message is None:
        pairs = _numbers(edge_index if directed else np.sort(edge_index, 0), num_nodes)
        message = ~np.isin(pairs, pairs[np.concatenate([arrays["val_edge_id"], arrays["test_edge_id"]])])
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
    return edge_index[:, message], Links(**found, own_negatives=True)


def _recommender(
    refuse: Callable[[str], None], arrays: dict[str, np.ndarray], edge_index: np.ndarray, num_nodes: int, seed: int
) -> tuple[np.ndarray, Links]:
    _require(refuse, arrays, ["num_users"])
    if arrays["num_users"].size != 1 or arrays["num_users"].dtype.kind not in "iu":
        refuse(f"has num_users {list(arrays['num_users'].shape)}; it must be one number")
    num_users = int(arrays["num_users"].item())
    given = {"the graph's edges": edge_index, **{key: arrays[key] for key in ("val_pos", "test_pos") if key in arrays}}
    for key, pairs in given.items():
        _check_ids(refuse, key, pairs, 2, num_nodes)
        if len(pairs) != 2 or pairs[0].max() >= num_users or pairs[1].min() < num_users:
            ends = f"users 0..{num_users - 1} to items {num_users}.."
            refuse(f"has {key} {list(pairs.shape)} that are not [2, p] from {ends}")
    # an interaction counts once
    edge_index = edge_index[:, np.sort(np.unique(_numbers(edge_index, num_nodes), return_index=True)[1])]
    held_out = [_numbers(pairs, num_nodes) for key, pairs in given.items() if key.endswith("_pos")]
    edge_index = edge_index[:, ~np.isin(_numbers(edge_index, num_nodes), np.concatenate(held_out))]
    if not edge_index.size:
        refuse("has all of the graph's edges in val_pos and test_pos, so that none is left to learn from")
    val = given.get("val_pos")
    if val is None:
        chosen = np.zeros(edge_index.shape[1], bool)
        drawn = np.random.default_rng(seed).permutation(len(chosen))
        chosen[drawn[: math.ceil(_VAL * len(chosen))]] = True
        val, edge_index = edge_index[:, chosen], edge_index[:, ~chosen]
    parts = (torch.from_numpy(part.astype(np.int64)) for part in (edge_index, val, given["test_pos"]))
    return edge_index, Links(*parts, num_users=num_users)


def _numbers(pairs: np.ndarray, num_nodes: int) -> np.ndarray:
    """A number for each pair of nodes [2, p]."""
    return pairs[0].astype(np.int64) * num_nodes + pairs[1]


def _refuse(name: str) -> Callable[[str], None]:
    def refuse(problem: str) -> None:
        raise InputError(f"--links {name!r} {problem}")

    return refuse


def _require(refuse: Callable[[str], None], arrays: dict[str, np.ndarray], needed: list[str]) -> None:
    missing = [key for key in needed if key not in arrays]
    if missing:
        refuse(f"lacks {', '.join(missing)}; see vqgnn.link_splits.given_split for the format")


def _check_ids(refuse: Callable[[str], None], key: str, ids: np.ndarray, dims: int, limit: int) -> None:
    if ids.ndim != dims or ids.dtype.kind not in "iu" or not ids.size or not 0 <= ids.min() <= ids.max() < limit:
        refuse(f"has {key} {list(ids.shape)} {ids.dtype}; it must be {dims}-dimensional, integers 0..{limit - 1}")
