"""A graph of ogbn-arxiv's size, made in seconds: power-law degrees, homophilous, features too noisy on their own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from .config import InputError
from .files import atomic_write

_VERSION = 2  # part of the cache's file names; raise it when the generator's result changes
_COMMUNITIES = 10  # a class
_POWER_LAW = 2.6  # exponent of the degree distribution
_SAME_COMMUNITY = _SAME_CLASS = 0.47  # shares of edges that stay in the community, in the class; the rest goes anywhere
_LABEL_NOISE = 0.4  # share of random labels among the least connected nodes (a quarter of all nodes): a ceiling for all
_SIGNAL = 0.24  # length of a community's mean feature against the noise's
_NOISE_SPREAD = 1.2  # log-standard deviation of the noise from node to node: some nodes are clear, most are not
_TRAIN, _VAL = 0.54, 0.18


@dataclass(frozen=True)
class GeneratedGraph:
    """Sizes of a generated graph, written `generated:n=2000,classes=5` on the command line."""

    n: int = 169_343
    edges: int | None = None  # undirected; default: ogbn-arxiv's mean degree
    classes: int = 40
    features: int = 128
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> GeneratedGraph:
        known = [f.name for f in fields(cls)]
        try:
            given = {key: int(value) for key, value in (item.split("=") for item in text.split(",") if item)}
            graph = cls(**given)
        except (ValueError, TypeError):
            raise InputError(
                f"dataset 'generated:{text}' cannot be read; use generated:NAME=NUMBER,... with {', '.join(known)}"
            ) from None
        n = graph.n
        if n < 10 or not 1 <= graph.classes <= n or graph.features < 1 or graph.seed < 0:
            raise InputError(f"dataset 'generated:{text}': n >= 10, 1 <= classes <= n, features >= 1, seed >= 0 needed")
        if not 0 <= graph.num_edges <= n * (n - 1) // 8:
            raise InputError(f"dataset 'generated:{text}': edges must be in 0..n(n-1)/8 = {n * (n - 1) // 8}")
        return graph

    @property
    def num_edges(self) -> int:
        wanted = round(self.n * 1_166_243 / 169_343) if self.edges is None else self.edges
        return min(wanted, self.n * (self.n - 1) // 8) if self.edges is None else wanted

    def cached(self, folder: Path) -> Path:
        """The graph as an .npz file in `folder`, generated at the first call."""
        sizes = f"n{self.n}-e{self.num_edges}-c{self.classes}-f{self.features}-s{self.seed}"
        path = Path(folder) / f"generated-v{_VERSION}-{sizes}.npz"
        if not path.exists():
            arrays = self.generate()
            with atomic_write(path) as handle:
                np.savez(handle, **arrays)
        return path

    def generate(self) -> dict[str, np.ndarray]:
        """Arrays of a data set file: x, y, edge_index (each edge once), the masks and num_classes.

        A degree-corrected stochastic block model. Every node has a weight (its expected degree, up to a factor) and
        belongs to a community of a class. Nodes are sorted by community, so that the candidates for the other end of
        an edge (community, class or all) are always a range, and drawing by weight is one binary search in the
        running sum of the weights.
        """
        rng = np.random.default_rng(self.seed)
        n, groups = self.n, self.classes * _COMMUNITIES
        class_of = np.arange(groups) // _COMMUNITIES
        class_share = rng.dirichlet(np.full(self.classes, 3.0))
        community = np.sort(rng.choice(groups, n, p=class_share[class_of] / _COMMUNITIES))
        label = class_of[community]
        weight = np.minimum((1 - rng.random(n)) ** (-1 / (_POWER_LAW - 1)), 3 * np.sqrt(n))  # 1 and more
        edge_index = self._edges(rng, community, label, weight)

        mean = rng.standard_normal((self.classes, self.features))[class_of]
        mean = _SIGNAL * (mean + 0.7 * rng.standard_normal((groups, self.features)))
        x = rng.standard_normal((n, self.features), dtype=np.float32)
        x *= np.exp(_NOISE_SPREAD * rng.standard_normal((n, 1), dtype=np.float32))
        x += mean.astype(np.float32)[community]
        y = np.where(rng.random(n) < _LABEL_NOISE / weight, rng.choice(self.classes, n, p=class_share), label)

        place = rng.permutation(n)  # node ids must not tell the communities
        order = np.argsort(place)
        split = rng.permutation(n)
        train, val = round(_TRAIN * n), round((_TRAIN + _VAL) * n)
        return {
            "x": np.clip(x, -6e4, 6e4).astype(np.float16)[order],
            "y": y.astype(np.int16)[order],
            "edge_index": place[edge_index].astype(np.int32),
            "train_mask": split < train,
            "val_mask": (split >= train) & (split < val),
            "test_mask": split >= val,
            "num_classes": np.int64(self.classes),
        }

    def _edges(
        self, rng: np.random.Generator, community: np.ndarray, label: np.ndarray, weight: np.ndarray
    ) -> np.ndarray:
        """[2, num_edges] distinct undirected edges without self loops."""
        n, wanted = self.n, self.num_edges
        running = np.concatenate([[0.0], np.cumsum(weight)])

        def draw(low: np.ndarray, high: np.ndarray) -> np.ndarray:
            """One node of each range low..high - 1, by weight."""
            point = running[low] + rng.random(len(low)) * (running[high] - running[low])
            return np.clip(np.searchsorted(running, point, side="right") - 1, low, high - 1)

        bounds = [(np.searchsorted(of, of), np.searchsorted(of, of, side="right")) for of in (community, label)]
        bounds.append((np.zeros(n, np.int64), np.full(n, n)))
        pairs = np.empty(0, np.int64)
        while len(pairs) < wanted:
            count = int(1.1 * (wanted - len(pairs))) + 100
            source = draw(np.zeros(count, np.int64), np.full(count, n))
            reach = np.searchsorted(np.cumsum([_SAME_COMMUNITY, _SAME_CLASS]), rng.random(count))
            low, high = (np.choose(reach, [b[side][source] for b in bounds]) for side in (0, 1))
            target = draw(low, high)
            pair = np.minimum(source, target) * n + np.maximum(source, target)
            pairs = np.unique(np.concatenate([pairs, pair[source != target]]))
        pairs = rng.permutation(pairs)[:wanted]
        return np.stack([pairs // n, pairs % n])
