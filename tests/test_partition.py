import sys

import numpy as np
import pytest
import torch
from graphs import awkward_graph

from vqgnn import partition
from vqgnn.partitioning import cache_folder


def planted_clusters(count=4, size=20, seed=0):
    """Dense clusters with few edges between them; node v belongs to cluster v % count."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.randint(size, (2, count * size * 4), generator=generator) * count
    inside = inside + torch.randint(count, (1, inside.size(1)), generator=generator)
    between = torch.randint(count * size, (2, count * 2), generator=generator)
    return torch.cat([inside, between], 1), count * size


def assert_partition(parts, num_nodes):
    assert all(part.dtype == torch.int64 and part.numel() for part in parts)
    assert all(torch.equal(part, part.sort().values) for part in parts)
    assert torch.cat(parts).sort().values.tolist() == list(range(num_nodes))


def cut(parts, edge_index):
    """Share of edges between parts."""
    label = torch.empty(int(edge_index.max()) + 1, dtype=torch.int64)
    for i, part in enumerate(parts):
        label[part] = i
    source, target = label[edge_index]
    return float((source != target).float().mean())


@pytest.fixture
def no_pymetis(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymetis", None)


def test_metis_finds_planted_clusters(tmp_path):
    edge_index, n = planted_clusters()
    parts = partition(edge_index, n, 4, tmp_path)
    assert_partition(parts, n)
    assert len(parts) == 4 and max(map(len, parts)) <= 1.2 * n / 4
    assert cut(parts, edge_index) < 0.15
    for part in parts:  # each is one of the planted clusters, nearly
        assert (part % 4).bincount().max() >= 0.8 * len(part)


def test_breadth_first_fallback_announces_itself(no_pymetis, tmp_path):
    edge_index, n = planted_clusters()
    with pytest.warns(RuntimeWarning, match="pymetis is missing"):
        parts = partition(edge_index, n, 4, tmp_path)
    assert_partition(parts, n)
    assert [len(part) for part in parts] == [20] * 4
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:pymetis is missing")
def test_fallback_is_better_than_chance_on_a_grid(no_pymetis, tmp_path):
    side = 20
    ids = torch.arange(side * side).view(side, side)
    edges = [
        torch.stack([ids[:, 1:].flatten(), ids[:, :-1].flatten()]),
        torch.stack([ids[1:].flatten(), ids[:-1].flatten()]),
    ]
    shuffled = torch.randperm(side * side)[torch.cat(edges, 1)]
    parts = partition(shuffled, side * side, 4, tmp_path)
    assert_partition(parts, side * side)
    assert cut(parts, shuffled) < 0.25  # chance: 0.75


@pytest.mark.filterwarnings("ignore:pymetis is missing")
@pytest.mark.parametrize("num_parts", [1, 3, 40])
@pytest.mark.parametrize("metis", [True, False], ids=["metis", "fallback"])
def test_awkward_graphs(metis, num_parts, tmp_path, request):
    if not metis:
        request.getfixturevalue("no_pymetis")
    assert_partition(partition(awkward_graph().edge_index, 40, num_parts, tmp_path), 40)
    assert_partition(partition(torch.empty(2, 0, dtype=torch.int64), 40, num_parts, tmp_path), 40)


@pytest.mark.parametrize("num_parts", [0, 41])
def test_bad_number_of_parts(num_parts):
    with pytest.raises(ValueError, match=rf"num_parts={num_parts} is not in 1..40 .*choose fewer"):
        partition(awkward_graph().edge_index, 40, num_parts)


def test_result_is_cached_and_the_cache_is_read(tmp_path):
    edge_index = awkward_graph().edge_index
    parts = partition(edge_index, 40, 3, tmp_path)
    (path,) = tmp_path.iterdir()
    np.save(path, np.arange(40, dtype=np.int32) % 3)
    again = partition(edge_index, 40, 3, tmp_path)
    assert [part[:2].tolist() for part in again] == [[0, 3], [1, 4], [2, 5]]
    path.unlink()
    assert all(map(torch.equal, parts, partition(edge_index, 40, 3, tmp_path)))
    # another graph or another number of parts is another file
    partition(edge_index, 40, 4, tmp_path)
    partition(edge_index[:, 1:60], 40, 3, tmp_path)
    partition(edge_index, 41, 3, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "content",
    ["cut short", "empty", "not numpy", np.zeros(39, np.int32), np.zeros(40), np.full(40, 3, np.int32)],
    ids=["cut-short", "empty", "not-numpy", "other-size", "other-type", "part-out-of-range"],
)
def test_damaged_cache_is_reported_and_made_anew(tmp_path, content):
    edge_index = awkward_graph().edge_index
    expected = partition(edge_index, 40, 3, tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes({"cut short": good[:-5], "empty": b"", "not numpy": b"x" * 400}[content])
    with pytest.warns(RuntimeWarning, match="damaged"):
        parts = partition(edge_index, 40, 3, tmp_path)
    assert all(map(torch.equal, parts, expected))
    assert path.read_bytes() == good


def test_cache_folder_can_be_set(monkeypatch, tmp_path):
    monkeypatch.setenv("VQGNN_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    partition(awkward_graph().edge_index, 40, 3)
    assert len(list((tmp_path / "cache").iterdir())) == 1
