import numpy as np
import pytest
import torch

from vqgnn import datasets
from vqgnn.config import InputError


def arrays(**changes):
    """A small valid file: 6 nodes, 3 classes, 2 splits; None removes a key."""
    train, val, test = (np.zeros((6, 2), bool) for _ in range(3))
    train[[0, 1]], val[[2, 3]], test[[4, 5]] = True, True, True
    train[0, 1], val[0, 1] = False, True  # split 1 differs
    base = {
        "x": np.arange(12, dtype=np.float16).reshape(6, 2),
        "edge_index": np.array([[0, 1, 1, 2, 3, 3], [1, 2, 2, 0, 3, 4]], np.int32),  # a duplicate and a self loop
        "y": np.array([0, 1, 2, 0, 1, 2], np.int16),
        "train_mask": train,
        "val_mask": val,
        "test_mask": test,
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "graph.npz"
        np.savez(path, **arrays(**changes))
        return str(path)

    return write


def test_undirected_by_default(write):
    dataset = datasets.load(write())
    edges = set(map(tuple, dataset.data.edge_index.t().tolist()))
    assert edges == {(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2), (3, 3), (3, 4), (4, 3)}
    assert dataset.data.edge_index.shape == (2, 9) and dataset.data.edge_index.dtype == torch.int64
    assert dataset.data.x.dtype == torch.float32 and dataset.data.x[5].tolist() == [10, 11]
    assert (dataset.num_classes, dataset.metric) == (3, "acc")
    assert dataset.data.train_mask.tolist() == [True, True, False, False, False, False]


def test_directed_keeps_directions(write):
    edges = datasets.load(write(), directed=True).data.edge_index
    assert edges.t().tolist() == [[0, 1], [1, 2], [2, 0], [3, 3], [3, 4]]


def test_split_picks_a_column(write):
    assert datasets.load(write(), split=1).data.train_mask.nonzero().flatten().tolist() == [1]


def test_sparse_features_and_columns(write):
    dense = np.array([[0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0], [5, 6, 7, 8]], np.float32)
    row, column = dense.nonzero()
    sparse = {
        "x": None,
        "x_data": dense[row, column].astype(np.uint8),
        "x_indices": column.astype(np.uint16),
        "x_indptr": np.concatenate([[0], np.cumsum((dense != 0).sum(1))]).astype(np.int32),
        "x_shape": np.array(dense.shape),
    }
    assert datasets.load(write(**sparse)).data.x.tolist() == dense.tolist()
    assert datasets.load(write(**sparse), columns=slice(1, 3)).data.x.tolist() == dense[:, 1:3].tolist()
    with pytest.raises(InputError, match="4 feature columns"):
        datasets.load(write(**sparse), columns=slice(1, 5))
    with pytest.raises(InputError, match="do not fit x_shape"):
        datasets.load(write(**(sparse | {"x_shape": np.array([6, 3])})))


def test_columns_of_dense_features(write):
    assert datasets.load(write(), columns=slice(1, 2)).data.x.flatten().tolist() == [1, 3, 5, 7, 9, 11]


def test_random_features(write):
    x = datasets.load(write(x=None), random=5).data.x
    assert x.shape == (6, 5) and x.dtype == torch.float32 and x.unique().numel() == 30
    assert torch.equal(x, datasets.load(write(), random=5).data.x)  # those of the file, if any, stay away


def test_several_labels(write):
    y = np.array([[0, 1]] * 5 + [[1, 1]], np.uint8)
    dataset = datasets.load(write(y=y))
    assert (dataset.num_classes, dataset.metric, dataset.multilabel) == (2, "f1", True)
    assert dataset.data.y.dtype == torch.float32


def test_unlabelled_nodes_outside_the_splits(write):
    y = np.array([0, 1, 2, 0, 1, -1], np.int16)
    test = arrays()["test_mask"]
    test[5] = False
    assert datasets.load(write(y=y, test_mask=test)).num_classes == 3


def test_fingerprint_tells_graphs_apart(write):
    first = datasets.load(write()).fingerprint()
    assert first == datasets.load(write()).fingerprint()
    x = arrays()["x"]
    x[3, 1] += 1
    assert datasets.load(write(x=x)).fingerprint()["hash"] != first["hash"]
    assert datasets.load(write(), split=1).fingerprint() != first


def nan_features():
    x = arrays()["x"]
    x[2, 0] = np.nan
    return x


BAD = {
    "out of range": ({"edge_index": np.array([[0], [6]])}, "between nodes 0..6; its nodes are 0..5"),
    "negative": ({"edge_index": np.array([[-1], [2]])}, "between nodes -1..2"),
    "edge shape": ({"edge_index": np.zeros((3, 4), np.int64)}, "must be \\[2, edges\\]"),
    "edge dtype": ({"edge_index": np.zeros((2, 4))}, "float64"),
    "nan": ({"x": nan_features()}, "NaN or infinite, at 1 of 6 nodes"),
    "x shape": ({"x": np.zeros((5, 2))}, "has x of shape \\[5, 2\\]"),
    "x dtype": ({"x": np.full((6, 2), "a")}, "must be numbers"),
    "no x": ({"x": None}, "has no features x; .*--features random:D"),
    "no mask": ({"val_mask": None}, "lacks val_mask"),
    "mask dtype": ({"val_mask": np.ones(6)}, "must be bool"),
    "empty split": ({"test_mask": np.zeros(6, bool)}, "empty test_mask"),
    "overlap": ({"test_mask": np.ones(6, bool)}, "in both"),
    "label beyond num_classes": ({"num_classes": np.int64(2)}, "labels 0..2 in its splits; its classes are 0..1"),
    "label beyond names": ({"label_names": np.array(["a", "b"])}, "its classes are 0..1"),
    "negative label": ({"y": np.array([-1, 1, 2, 0, 1, 2])}, "labels -1..2"),
    "float label": ({"y": np.array([0.5, 1, 2, 0, 1, 2])}, "integer class numbers"),
    "multi-hot": ({"y": np.full((6, 2), 3)}, "not all 0 or 1"),
    "sparse incomplete": ({"x": None, "x_data": np.ones(3)}, "lacks x_indices, x_indptr, x_shape"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_contents(write, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        datasets.load(write(**changes))
    assert "\n" not in str(caught.value)


def test_missing_split(write):
    with pytest.raises(InputError, match=r"no split 2; choose --split in 0\.\.1"):
        datasets.load(write(), split=2)


@pytest.mark.parametrize("kind", ["noise", "empty", "cut", "npy", "flipped"])
def test_corrupt_files(tmp_path, kind):
    path = tmp_path / "graph.npz"
    np.savez_compressed(path, **arrays())
    content = bytearray(path.read_bytes())
    if kind == "noise":
        content = b"not a zip file" * 20
    elif kind == "empty":
        content = b""
    elif kind == "cut":
        content = content[: len(content) // 2]
    elif kind == "npy":
        with open(path, "wb") as handle:
            np.save(handle, np.ones(3))
        content = path.read_bytes()
    else:
        for i in range(60, 90):
            content[i] ^= 255
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable"):
        datasets.load(str(path))


@pytest.mark.parametrize("name", ["nowhere.npz", "nothing-like-this", "/no/such/folder/graph.npz"])
def test_unknown_names(name):
    with pytest.raises(InputError, match=r"does not exist|use 'generated.*ogbn-arxiv.*cora"):
        datasets.load(name)


@pytest.mark.parametrize("name", ["ogbn-arxiv", "cora"])
def test_failed_download_is_one_line(name, monkeypatch, tmp_path):
    monkeypatch.setenv("VQGNN_CACHE", str(tmp_path))

    def unreachable(*_):
        raise OSError("Name or service not known\nand a second line")

    monkeypatch.setattr(datasets, "_read_ogb", unreachable)
    monkeypatch.setattr(datasets, "_read_pyg", unreachable)
    with pytest.raises(InputError, match=r"could not be downloaded.*without a network") as caught:
        datasets.load(name)
    assert "\n" not in str(caught.value)


def test_real_file(shared_data):
    dataset = datasets.load(str(shared_data / "cora.npz"))
    assert (dataset.data.num_nodes, dataset.data.num_edges, dataset.num_classes) == (2708, 10556, 7)
    assert int(dataset.data.train_mask.sum()) == 140
