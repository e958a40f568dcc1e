"""A graph in memory-mapped files is the graph that it would be in memory: matrices, products, training, inference."""

import json
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from graphs import awkward_graph
from test_cli import comparable, fails
from torch_geometric.data import Data
from torch_geometric.nn.models import GCN

import vqgnn
from vqgnn import BatchLoader, Convolution, Graph, datasets, disk_graph, graph_writer, report
from vqgnn.cli import main
from vqgnn.config import Config, InputError
from vqgnn.disk_graph import GraphFolder, MappedData
from vqgnn.generate import GeneratedGraph
from vqgnn.inference import layerwise
from vqgnn.train import Trainer

pytestmark = pytest.mark.usefixtures("command_line")
SPEC = "n=600,edges=4000,classes=4,features=8,disk=1"
GRAPH = f"generated:{SPEC}"
SMALL = ["--dataset", GRAPH, "--hidden", "8", "--layers", "2", "--codec", "pq:d=4,k=4", "--threads", "1"]
CONVOLUTIONS = {
    "gcn": Convolution("gcn"),
    "gcn without loops": Convolution("gcn", add_self_loops=False),
    "gcn not normalised": Convolution("gcn", normalize=False),
    "mean": Convolution("mean"),
    "sum": Convolution("sum"),
}


@pytest.fixture(params=[7, 10**6], ids=["small pieces", "one piece"])
def pieces(request, monkeypatch):
    """Edges in RAM at a time."""
    monkeypatch.setattr(disk_graph, "_EDGES", request.param)
    monkeypatch.setattr(graph_writer, "_EDGES", request.param)


def awkward(**options):
    """An awkward graph with masks, each edge once; duplicates are the folder's to drop."""
    data = awkward_graph(**options)
    part = torch.rand(data.num_nodes)
    masks = zip(datasets.MASKS, (0, 0.33, 0.66), strict=True)
    data.update({key: (part >= low) & (part < low + 0.33) for key, low in masks})
    return data


def in_memory(data):
    """The same graph as an ordinary Data, its edges in another order."""
    edges = torch.cat([torch.stack(chunk) for chunk in data.edge_chunks()], 1)
    edges = edges[:, torch.randperm(edges.size(1))]
    return Data(edge_index=edges, **{name: data[name].clone() for name in disk_graph.NODE_ARRAYS})


def assert_same_matrix(ours, expected):
    for field, want in vars(expected).items():
        got = getattr(ours, field)
        assert (got is None) == (want is None), field
        assert got is None or (got.dtype == want.dtype and torch.equal(got, want)), field


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("undirected", [True, False], ids=["undirected", "directed"])
def test_matrices_are_those_of_the_graph_in_memory(undirected, name, pieces, tmp_path):
    data = graph_writer.save(awkward(), tmp_path / "graph", undirected=undirected)
    on_disk, expected = Graph.of(data), Graph.of(in_memory(data))
    convolution = CONVOLUTIONS[name]
    assert_same_matrix(on_disk.matrix(convolution), expected.matrix(convolution))
    assert on_disk.matrix(convolution).symmetric_structure == undirected
    assert torch.equal(on_disk.product(convolution), expected.product(convolution))


@pytest.mark.parametrize("undirected", [True, False], ids=["undirected", "directed"])
def test_a_saved_graph_keeps_its_edges(undirected, pieces, tmp_path):
    source = awkward()
    data = graph_writer.save(source, tmp_path / "graph", undirected=undirected)
    edges = {tuple(pair) for pair in source.edge_index.t().tolist()}
    edges |= {(b, a) for a, b in edges} if undirected else set()
    found = [tuple(pair) for pair in in_memory(data).edge_index.t().tolist()]
    assert len(found) == len(set(found)) == data.num_edges and set(found) == edges
    for name in disk_graph.NODE_ARRAYS:
        assert torch.equal(data[name], source[name]) and data[name].dtype == source[name].dtype
    with pytest.raises(InputError, match="exists already"):
        graph_writer.save(source, tmp_path / "graph")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"edge_index": torch.tensor([[0, 40], [1, 2]])},
            r"data\.edge_index holds node ids 0\.\.40, allowed are 0\.\.39",
        ),
        ({"edge_index": torch.tensor([[0, 3], [-1, 2]])}, r"data\.edge_index holds node ids -1\.\.3"),
        ({"edge_index": torch.tensor([[0.0], [1.0]])}, r"data\.edge_index must be int64"),
        ({"edge_weight": torch.ones(127)}, "data has edge_weight, which a graph folder does not keep"),
        ({"edge_attr": torch.ones(127, 2), "pos": torch.ones(40)}, "data has edge_attr, pos, which"),
        ({"x": None}, r"data\.x must be \[num_nodes=40, features\], got None"),
        ({"x": torch.full((40, 6), torch.nan)}, r"data\.x has values that are NaN"),
        ({"y": None}, r"data\.y must be \[num_nodes=40\] class numbers, integers, got None"),
        ({"y": torch.zeros(5, dtype=torch.long)}, r"data\.y must be .* got \[5\] torch\.int64"),
        ({"y": torch.full((40,), 1.9)}, r"data\.y must be .* torch\.float32"),
        ({"y": torch.full((40,), -1)}, r"data\.y has classes -1\.\.-1 where a mask is set; allowed are 0\.\.-1"),
        ({"val_mask": None}, r"data\.val_mask must be bool .* got None"),
        ({"val_mask": torch.arange(40) % 3}, r"data\.val_mask must be bool .* torch\.int64"),
        ({"val_mask": torch.ones(40, 2).bool()}, r"data\.val_mask must be bool \[num_nodes=40\].* got \[40, 2\]"),
        ({"val_mask": torch.zeros(40).bool()}, r"data\.val_mask must be .* with 0 nodes"),
        ({"val_mask": torch.ones(40).bool()}, r"data\.train_mask, val_mask, test_mask overlap"),
    ],
    ids=str,
)
def test_what_a_folder_cannot_keep_is_named(changes, message, tmp_path):
    data = awkward()
    data.num_nodes, data.name = 40, "awkward"  # which are no tensors
    data.update(changes)
    with pytest.raises(ValueError, match=message):
        graph_writer.save(data, tmp_path / "graph")
    assert not list(tmp_path.iterdir())


def test_ends_of_edges_are_checked_as_they_are_written(tmp_path):
    with (
        pytest.raises(ValueError, match=r"edges have ends 5\.\.40; nodes are 0\.\.39"),
        graph_writer.creating(tmp_path / "graph", 40, False, 0) as writer,
    ):
        writer.edges([(np.array([0, 1]), np.array([2, 3])), (np.array([5, 40]), np.array([3, 4]))], 4)
    assert not (tmp_path / "graph").exists()


def test_a_graph_without_edges(tmp_path):
    data = awkward(num_edges=9)
    data.edge_index = torch.empty(2, 0, dtype=torch.int64)
    mapped = graph_writer.save(data, tmp_path / "graph")
    for convolution in CONVOLUTIONS.values():
        assert_same_matrix(Graph.of(mapped).matrix(convolution), Graph.of(data).matrix(convolution))


def test_pieces_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(disk_graph, "_EDGES", 5)
    degree = torch.tensor([0, 3, 2, 0, 17, 0, 0, 0, 0, 0, 0, 0, 0, 1, 5, 6, 0])
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), degree.cumsum(0)])
    ranges = list(disk_graph._row_ranges(rowptr))
    assert [start for start, _ in ranges] == [0] + [stop for _, stop in ranges[:-1]] and ranges[-1][1] == len(degree)
    for start, stop in ranges:
        assert int(degree[start:stop].sum()) <= 5 or stop == start + 1


@pytest.mark.parametrize("spec", [SPEC, "n=50,edges=300,disk=1", "n=20,edges=0,disk=1,classes=2"])
def test_generated_edges_are_exactly_as_many_and_distinct(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_writer, "_EDGES", 500)
    graph = GeneratedGraph.parse(spec)
    data = MappedData(GraphFolder(graph.cached_on_disk(tmp_path)))
    edges = torch.cat([torch.stack(chunk) for chunk in data.edge_chunks()] or [torch.empty(2, 0)], 1)
    source, target = edges
    assert data.num_edges == 2 * graph.num_edges and (source != target).all()
    pairs = {tuple(pair) for pair in edges.t().tolist()}
    assert len(pairs) == 2 * graph.num_edges and pairs == {(b, a) for a, b in pairs}
    folder = GraphFolder(graph.cached_on_disk(tmp_path / "again"))
    assert folder.fingerprint == data.folder.fingerprint
    other = GraphFolder(GeneratedGraph.parse(spec + ",seed=1").cached_on_disk(tmp_path))
    assert other.fingerprint != folder.fingerprint


def test_generated_on_disk_is_the_graph_of_the_generator_in_memory(tmp_path):
    """Statistics of the two ways to draw one model: degrees, homophily, labels, features."""
    spec = "generated:n=20000,edges=140000,classes=8,features=16"
    statistics = []
    for disk in (0, 1):
        data = datasets.load(f"{spec},disk={disk}").data
        chunks = data.edge_chunks() if disk else [data.edge_index]
        source, target = (torch.cat(ends) for ends in zip(*chunks, strict=True))
        degree = torch.bincount(target, minlength=20000).double().sort().values
        statistics.append(
            {
                "edges": len(source),
                "homophily": float((data.y[source] == data.y[target]).double().mean()),
                **{f"degree at {q}": float(degree[int(q * 19999)]) for q in (0.1, 0.5, 0.9, 0.99)},
                "x": float(data.x.abs().median()),
                "train": int(data.train_mask.sum()),
                "val": int(data.val_mask.sum()),
                "test": int(data.test_mask.sum()),
                "places": float(source.double().mean()),
            }
        )
    for key, value in statistics[0].items():
        assert statistics[1][key] == pytest.approx(value, rel=0.05), key


def test_what_the_command_line_says_of_sizes(capsys):
    assert GeneratedGraph.parse("nodes=10M,edges=100M,features=64") == GeneratedGraph(10**7, 10**8, features=64)
    assert GeneratedGraph.parse("n=1.5k").n == 1500
    assert GeneratedGraph.parse("nodes=10M").on_disk and not GeneratedGraph.parse("n=10M,disk=0").on_disk
    assert not GeneratedGraph.parse("").on_disk
    for bad in ("n=10Q", "n=1.0001k", "n=-5", "disk=2", "n=5,,nodes"):
        fails(capsys, ["info", f"generated:{bad}"], f"'generated:{bad}'")


@pytest.mark.parametrize("model", ["gcn", "sage", "gin"])
def test_train_evaluate_info(model, tmp_path, capsys):
    out = tmp_path / "run"
    options = [*SMALL, "--model", model, "--epochs", "2", "--place", "disk"]
    assert main(["train", *options, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    for words in ("time by phase", "generating", "filling the store", "disk, this process", "test accuracy"):
        assert words in table
    summary = json.loads((out / "summary.json").read_text())
    assert main(["evaluate", str(out)]) == 0
    assert f"{summary['test_acc']:.4f}" in capsys.readouterr().out
    folder = datasets.load(GRAPH).data.folder.path
    assert main(["train", *options[2:], "--dataset", str(folder), "--out", str(tmp_path / "by-path")]) == 0
    assert comparable(out) == comparable(tmp_path / "by-path")


def test_info_and_statistics_equal_those_in_memory():
    on_disk = datasets.load(GRAPH)
    ram = datasets.Dataset("ram", in_memory(on_disk.data), on_disk.num_classes, multilabel=False)
    config = Config(dataset=GRAPH)
    texts = [report.graph_statistics(dataset, config).split("\n\n")[0] for dataset in (on_disk, ram)]
    assert texts[0] == texts[1] and "8,000" in texts[0]


@pytest.mark.parametrize("method", ["full", "gas"])
def test_inference_and_batches_equal_those_in_memory(method, tmp_path):
    data = graph_writer.save(awkward(), tmp_path / "graph")
    other = in_memory(data)
    results, models = [], []
    for each in (data, other):
        torch.manual_seed(3)
        models.append(vqgnn.convert(GCN(6, 8, 3, 3), each, method=method, fill=False).eval())
        results.append(layerwise(models[-1], each, 9, folder=tmp_path / "rows"))
    assert torch.equal(*results)
    if method == "gas":
        pairs = zip(BatchLoader(data, 11, seed=2), BatchLoader(other, 11, seed=2), strict=True)
        for ours, expected in pairs:
            assert torch.equal(models[0](ours.x, ours.graph), models[1](expected.x, expected.graph))
            for key in ("n_id", "x", "y", *datasets.MASKS):
                assert torch.equal(getattr(ours, key), getattr(expected, key)), key
            assert not hasattr(ours, "col") and not hasattr(ours, "rowptr")


def test_stopped_and_resumed_with_state_and_graph_on_disk(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = [*SMALL, "--epochs", "3", "--place", "disk"]
    assert main(["train", *options, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        train_epoch = Trainer.train_epoch

        def stopped(self, bar):
            if self.epoch == 2:
                raise KeyboardInterrupt
            return train_epoch(self, bar)

        patch.setattr(Trainer, "train_epoch", stopped)
        assert main(["train", *options, "--out", str(broken)]) == 130
    assert main(["train", "--resume", "--out", str(broken)]) == 0
    assert comparable(broken) == comparable(whole)


@pytest.fixture
def saved(tmp_path):
    """A saved graph with C and C X of a GCN in its cache."""
    data = graph_writer.save(awkward(), tmp_path / "graph")
    Graph.of(data).product(Convolution("gcn"))
    return tmp_path / "graph"


def test_what_is_derived_is_built_once(saved):
    assert not any(path.name.endswith(".npy") and path.name.startswith(".") for path in (saved / "cache").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in (saved / "cache").glob("*.npy")}
    folder = GraphFolder(saved)
    Graph.of(MappedData(folder)).product(Convolution("gcn"))
    assert folder.seconds == {}
    assert before == {path.name: path.stat().st_mtime_ns for path in (saved / "cache").glob("*.npy")}


@pytest.mark.parametrize("damage", ["cut off", "other dtype", "noise"])
def test_a_damaged_cache_is_made_anew(saved, damage):
    expected = Graph.of(MappedData(GraphFolder(saved))).product(Convolution("gcn")).clone()
    path = saved / "cache" / "gcn-loops.product.npy"
    if damage == "cut off":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "noise":
        path.write_bytes(b"noise" * 100)
    else:
        np.save(path, np.zeros(expected.shape))
    left = path.with_name(".gcn-loops.product.npy.left")
    left.write_bytes(b"half of a file, by a process that was killed")
    with pytest.warns(RuntimeWarning, match="gcn-loops.product.npy is damaged.*made anew"):
        product = Graph.of(MappedData(GraphFolder(saved))).product(Convolution("gcn"))
    assert torch.equal(product, expected) and not left.exists()


def test_a_damaged_folder_is_refused(saved, capsys):
    for name, change, words in (
        ("x.npy", lambda path: os.truncate(path, 200), "x.npy is cut off"),
        ("col.npy", lambda path: path.unlink(), "col.npy"),
        ("y.npy", lambda path: np.save(path, np.zeros(3)), "y.npy holds float64"),
        ("meta.json", lambda path: path.write_text('{"format": "other"}'), "no graph folder"),
    ):
        whole = (saved / name).read_bytes()
        change(saved / name)
        fails(capsys, ["info", str(saved)], words)
        (saved / name).write_bytes(whole)
    assert main(["info", str(saved)]) == 0


def test_a_full_disk_is_noticed_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VQGNN_CACHE", str(tmp_path / "cache"))
    usage = namedtuple("usage", "total used free")(0, 0, 100_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        fails(capsys, ["info", GRAPH], "are needed in", "100 kB are free", "VQGNN_CACHE")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert main(["info", GRAPH]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:  # and for what is derived
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert main(["train", *SMALL, "--out", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "1.0 kB are free" in errors[-1] and errors[-1].startswith("vqgnn: error:")


def test_what_a_killed_generation_left_is_removed(tmp_path):
    graph = GeneratedGraph.parse(SPEC)
    path = graph.cached_on_disk(tmp_path)
    shutil.rmtree(path)
    left = tmp_path / f".{path.name}.building-abc"
    (left / "pairs").mkdir(parents=True)
    assert graph.cached_on_disk(tmp_path) == path and path.is_dir() and not left.exists()
    assert not list(tmp_path.glob("*/pairs")) and not list(path.glob("by-*"))


def test_what_a_graph_on_disk_refuses(saved, tmp_path, capsys):
    for options, words in (
        (["--split", "1"], "one split"),
        (["--features", "0:3"], "all its features"),
        (["--directed"], "leave out --directed"),
        (["--sampler", "cluster"], "sampler='cluster' needs edge_index"),
    ):
        fails(capsys, ["train", "--dataset", str(saved), *options, "--out", str(tmp_path / "run")], words)
    data = MappedData(GraphFolder(saved))
    with pytest.raises(ValueError, match="no matrix of kind 'other'"):
        Graph.of(data).matrix(Convolution("other"))
    data.x = data.x.clone()
    with pytest.raises(ValueError, match="write another folder"):
        Graph.of(data)
    with pytest.raises(ValueError, match="edge_weight"):
        graph_writer.save(awkward(weighted=True), tmp_path / "weighted")
    several = awkward()
    several.y = torch.ones(several.num_nodes, 3)
    with pytest.raises(ValueError, match="one label a node"):
        graph_writer.save(several, tmp_path / "several")


def test_released_pages_are_read_again(saved):
    data = MappedData(GraphFolder(saved))
    before = {name: data[name].clone() for name in ("x", "col", "rowptr")}
    data.folder.release()
    assert all(torch.equal(data[name], value) for name, value in before.items())
