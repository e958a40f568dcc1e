"""A graph of ogbn-arxiv's size, made in seconds: power-law degrees, homophilous, features too noisy on their own."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import graph_writer
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
_DISK_VERSION = 1  # as _VERSION, for graphs on disk
_ON_DISK_NODES, _ON_DISK_EDGES = 4_000_000, 40_000_000  # from these sizes on a graph is made on disk
_DRAWN, _ROWS = 4_000_000, 262_144  # edges drawn, and rows of features made, at a time; part of the result
_SUFFIX = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class GeneratedGraph:
    """Sizes of a generated graph, written `generated:n=2000,classes=5` on the command line.

    `nodes` may be written for `n`, and 10M for 10000000. `disk=1` makes the graph piece by piece in a folder of
    memory-mapped files (another graph of the same kind), 0 in RAM; default: by its size.
    """

    n: int = 169_343
    edges: int | None = None  # undirected; default: ogbn-arxiv's mean degree
    classes: int = 40
    features: int = 128
    seed: int = 0
    disk: int | None = None

    @classmethod
    def parse(cls, text: str) -> GeneratedGraph:
        known = [f.name for f in fields(cls)]
        try:
            given = dict(item.split("=") for item in text.split(",") if item)
            graph = cls(**{"n" if key == "nodes" else key: _number(value) for key, value in given.items()})
        except (ValueError, TypeError):
            raise InputError(
                f"dataset 'generated:{text}' cannot be read; use generated:NAME=NUMBER,... with {', '.join(known)}"
            ) from None
        n = graph.n
        if n < 10 or not 1 <= graph.classes <= n or graph.features < 1 or graph.seed < 0:
            raise InputError(f"dataset 'generated:{text}': n >= 10, 1 <= classes <= n, features >= 1, seed >= 0 needed")
        if graph.disk not in (None, 0, 1):
            raise InputError(f"dataset 'generated:{text}': disk must be 0 (in RAM) or 1 (memory-mapped files)")
        if not 0 <= graph.num_edges <= n * (n - 1) // 8:
            raise InputError(f"dataset 'generated:{text}': edges must be in 0..n(n-1)/8 = {n * (n - 1) // 8}")
        return graph

    @property
    def num_edges(self) -> int:
        wanted = round(self.n * 1_166_243 / 169_343) if self.edges is None else self.edges
        return min(wanted, self.n * (self.n - 1) // 8) if self.edges is None else wanted

    @property
    def on_disk(self) -> bool:
        large = self.n >= _ON_DISK_NODES or self.num_edges >= _ON_DISK_EDGES
        return large if self.disk is None else bool(self.disk)

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
        n = self.n
        class_of, class_share, community, weight = self._blocks(rng)
        label = class_of[community]
        edge_index = self._edges(rng, community, label, weight)

        mean = self._means(rng, class_of)
        x = rng.standard_normal((n, self.features), dtype=np.float32)
        x *= np.exp(_NOISE_SPREAD * rng.standard_normal((n, 1), dtype=np.float32))
        x += mean[community]
        y = np.where(rng.random(n) < _LABEL_NOISE / weight, rng.choice(self.classes, n, p=class_share), label)

        place = rng.permutation(n)  # node ids must not tell the communities
        order = np.argsort(place)
        return {
            "x": np.clip(x, -6e4, 6e4).astype(np.float16)[order],
            "y": y.astype(np.int16)[order],
            "edge_index": place[edge_index].astype(np.int32),
            **self._masks(rng),
            "num_classes": np.int64(self.classes),
        }

    def cached_on_disk(self, folder: Path, directed: bool = False) -> Path:
        """The graph as a graph folder in `folder` (see disk_graph), generated at the first call.

        The model of `generate`, but never all edges or features in RAM: arrays of one or two numbers a node, and
        pieces of fixed size.
        """
        n, e = self.n, self.num_edges
        sizes = f"n{n}-e{e}-c{self.classes}-f{self.features}-s{self.seed}{'-directed' * directed}"
        path = Path(folder) / f"generated-disk-v{_DISK_VERSION}-{sizes}"
        if (path / "meta.json").exists():
            return path
        edges_at_most = 8 * 1.1 * e + 16 * e + 8 * e  # keys of pairs, keys of both directions, col
        with graph_writer.creating(path, n, not directed, int(edges_at_most + n * (4 * self.features + 19))) as writer:
            if writer is None:
                return path
            rng = np.random.default_rng(self.seed)
            class_of, class_share, community, weight = self._blocks(rng)
            place = rng.permutation(n)  # node ids must not tell the communities
            with graph_writer.Buckets(writer.path / "pairs", n, e) as pairs:
                with writer.timed("draw edges"):
                    self._draw_on_disk(rng, pairs, class_of, community, weight, place)
                writer.edges(_progress(_each_pair(pairs), e, "sorting edges"), 2 * e)
                writer.bytes += pairs.bytes

            mean = self._means(rng, class_of)
            order = np.argsort(place)
            community, weight = community[order].astype(np.int32), weight[order]

            def rows() -> Iterator[np.ndarray]:
                for start in range(0, n, _ROWS):
                    shape = (min(_ROWS, n - start), self.features)
                    x = rng.standard_normal(shape, dtype=np.float32)
                    x *= np.exp(_NOISE_SPREAD * rng.standard_normal((shape[0], 1), dtype=np.float32))
                    yield x + mean[community[start : start + _ROWS]]

            writer.array("x", _progress(rows(), n, "features"), (self.features,))
            noisy = rng.random(n) < _LABEL_NOISE / weight
            labels = class_of[community]
            labels[noisy] = rng.choice(self.classes, int(noisy.sum()), p=class_share)
            writer.array("y", [labels])
            for key, mask in self._masks(rng).items():
                writer.array(key, [mask])
            writer.finish(self.classes)
        return path

    def _blocks(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(class of each community, share of each class, community of each node, ascending, weight of each node)."""
        n, groups = self.n, self.classes * _COMMUNITIES
        class_of = np.arange(groups) // _COMMUNITIES
        class_share = rng.dirichlet(np.full(self.classes, 3.0))
        community = np.sort(rng.choice(groups, n, p=class_share[class_of] / _COMMUNITIES))
        weight = np.minimum((1 - rng.random(n)) ** (-1 / (_POWER_LAW - 1)), 3 * np.sqrt(n))  # 1 and more
        return class_of, class_share, community, weight

    def _means(self, rng: np.random.Generator, class_of: np.ndarray) -> np.ndarray:
        """The mean features of each community."""
        mean = rng.standard_normal((self.classes, self.features))[class_of]
        return (_SIGNAL * (mean + 0.7 * rng.standard_normal((len(class_of), self.features)))).astype(np.float32)

    def _masks(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        split = rng.permutation(self.n)
        train, val = round(_TRAIN * self.n), round((_TRAIN + _VAL) * self.n)
        return {
            "train_mask": split < train,
            "val_mask": (split >= train) & (split < val),
            "test_mask": split >= val,
        }

    def _draw_on_disk(
        self,
        rng: np.random.Generator,
        pairs: graph_writer.Buckets,
        class_of: np.ndarray,
        community: np.ndarray,
        weight: np.ndarray,
        place: np.ndarray,
    ) -> None:
        """Fill `pairs` with num_edges distinct pairs of nodes, as `_edges` draws them."""
        n, wanted, count = self.n, self.num_edges, 0
        counts = [0] * len(pairs.files)
        running = np.concatenate([[0.0], np.cumsum(weight)])
        groups = np.searchsorted(community, np.arange(len(class_of) + 1))  # the nodes of each community
        classes = groups[np.searchsorted(class_of, np.arange(self.classes + 1))]  # ... of each class
        reaches = np.cumsum([_SAME_COMMUNITY, _SAME_CLASS])
        with _bar(wanted, "drawing edges") as bar:
            while count < wanted:
                left = int(1.1 * (wanted - count)) + 100
                while left > 0:
                    size = min(left, _DRAWN)
                    # Ascending ends are found many times faster: the search meets the same cache lines.
                    source = _find(running, np.sort(rng.random(size)) * running[-1])
                    group = community[source]
                    reach = np.searchsorted(reaches, rng.random(size))
                    low = np.choose(reach, [groups[group], classes[class_of[group]], 0])
                    high = np.choose(reach, [groups[group + 1], classes[class_of[group] + 1], n])
                    target = _find(running, running[low] + rng.random(size) * (running[high] - running[low]))
                    a, b = place[source], place[np.clip(target, low, high - 1)]
                    a, b = a[a != b], b[a != b]
                    first = np.where((a ^ b) & 1, np.minimum(a, b), np.maximum(a, b))  # whichever way it was drawn
                    pairs.add(first, a + b - first)
                    left -= size
                    bar.update(size)
                counts = []
                for i in range(len(pairs.files)):
                    keys = pairs.read(i)
                    pairs.replace(i, keys)
                    counts.append(len(keys))
                count = sum(counts)
        keep = np.diff(np.concatenate([[0], np.cumsum(counts)]) * wanted // max(count, 1))
        for i in range(len(pairs.files)):  # a bucket loses its share of what is too many
            pairs.replace(i, np.delete(keys := pairs.read(i), rng.permutation(len(keys))[keep[i] :]))

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


def _number(text: str) -> int:
    """An integer; 10M is 10000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMG]?)", text)
    value = float(match[1]) * _SUFFIX[match[2]] if match else -0.5
    return int(text) if match is None or not value.is_integer() else int(value)


def _find(running: np.ndarray, point: np.ndarray) -> np.ndarray:
    """The node within whose part of the running sum a point lies."""
    return np.minimum(np.searchsorted(running, point, side="right") - 1, len(running) - 2)


def _each_pair(pairs: graph_writer.Buckets) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for i in range(len(pairs.files)):
        keys = pairs.read(i)
        pairs.drop(i)
        yield np.divmod(keys, pairs.n)


def _progress(chunks: Iterator, total: int, name: str) -> Iterator:
    with _bar(total, name) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk[0] if isinstance(chunk, tuple) else chunk))


def _bar(total: int, name: str) -> tqdm:
    interval = 0.5 if sys.stderr.isatty() else 10  # seconds; a log needs no animation
    return tqdm(total=total, desc=name, unit_scale=True, leave=False, mininterval=interval, disable=total < 1_000_000)
