import numpy as np
import pytest

from vqgnn.config import InputError
from vqgnn.generate import GeneratedGraph


def test_sizes_masks_and_homophily():
    graph = GeneratedGraph(n=3000, edges=20_000, classes=6, features=16)
    arrays = graph.generate()
    low, high = arrays["edge_index"].astype(np.int64)
    assert arrays["x"].shape == (3000, 16) and np.isfinite(arrays["x"]).all()
    assert arrays["edge_index"].shape == (2, 20_000) and (low != high).all()
    pairs = np.minimum(low, high) * 3000 + np.maximum(low, high)
    assert len(np.unique(pairs)) == 20_000
    masks = np.stack([arrays[f"{split}_mask"] for split in ("train", "val", "test")])
    assert (masks.sum(0) == 1).all() and masks.sum(1).tolist() == [1620, 540, 840]
    y = arrays["y"]
    assert set(y) == set(range(6))
    assert 0.6 < (y[low] == y[high]).mean() < 0.75
    degree = np.bincount(np.concatenate([low, high]), minlength=3000)
    assert degree.max() > 10 * np.median(degree)  # a heavy tail


def test_features_need_the_graph():
    arrays = GeneratedGraph(n=8000, edges=55_000, classes=5, features=32).generate()
    x, y, train, test = (arrays[key] for key in ("x", "y", "train_mask", "test_mask"))
    x = x.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)  # nodes differ in their noise
    source, target = np.concatenate([arrays["edge_index"], arrays["edge_index"][::-1]], axis=1)
    neighbours = np.zeros_like(x)
    np.add.at(neighbours, target, x[source])

    def accuracy(z):
        one_hot = np.eye(5)[y[train]]
        weights = np.linalg.solve(z[train].T @ z[train] + 1e-3 * np.eye(z.shape[1]), z[train].T @ one_hot)
        return ((z[test] @ weights).argmax(1) == y[test]).mean()

    assert accuracy(neighbours) > accuracy(x) + 0.1


def test_seed_decides_everything(tmp_path):
    first, again = (GeneratedGraph(n=500, classes=4, features=8).generate() for _ in range(2))
    other = GeneratedGraph(n=500, classes=4, features=8, seed=1).generate()
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["edge_index"], other["edge_index"])


def test_cache_is_used_and_whole(tmp_path, monkeypatch):
    graph = GeneratedGraph(n=200, classes=3, features=4)
    path = graph.cached(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file is left
    monkeypatch.setattr(GeneratedGraph, "generate", lambda self: pytest.fail("generated again"))
    assert graph.cached(tmp_path) == path
    with np.load(path) as file:
        assert file["x"].shape == (200, 4)


def test_parse():
    assert GeneratedGraph.parse("") == GeneratedGraph()
    assert GeneratedGraph.parse("n=50,classes=2,seed=3") == GeneratedGraph(n=50, classes=2, seed=3)
    assert GeneratedGraph().num_edges == 1_166_243


@pytest.mark.parametrize(
    "text", ["n", "n=many", "nodes=3", "n=3", "n=100,classes=0", "n=100,edges=99999", "n=50,seed=-1"]
)
def test_parse_refuses(text):
    with pytest.raises(InputError, match="generated:"):
        GeneratedGraph.parse(text)
