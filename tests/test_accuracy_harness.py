"""benchmarks/accuracy: what decides a run's name, which trial goes on, and that the peers are what they claim to be."""

import dataclasses
import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "accuracy"


@pytest.fixture
def harness(monkeypatch, tmp_path):
    """Its modules, with a small data set of its own in place of shared/data."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("VQGNN_CACHE", str(tmp_path / "cache"))
    before = set(sys.modules)
    import results
    import settings
    import worker

    rng, n = np.random.default_rng(0), 120
    y = np.arange(n) % 3
    edges = rng.integers(0, n, (2, 600))
    edges = edges[:, (y[edges[0]] == y[edges[1]]) | (rng.random(600) < 0.2)]
    split = rng.permutation(n)
    x = (np.eye(3)[y] + rng.standard_normal((n, 3))).astype(np.float32)
    masks = {"train_mask": split < 60, "val_mask": (split >= 60) & (split < 90), "test_mask": split >= 90}
    np.savez(tmp_path / "tiny.npz", x=x, y=y, edge_index=edges, **masks)
    monkeypatch.setitem(settings.SETTINGS, "tiny", settings.Setting("tiny", 0.0, 6, 3, 2, 0.1))
    monkeypatch.setattr(worker, "shared_data", lambda: tmp_path)
    monkeypatch.setattr(worker, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(results, "ROWS", tmp_path / "accuracy.csv")
    monkeypatch.setattr(results, "CURVES", tmp_path / "curves.csv")
    monkeypatch.setattr(results, "SECONDS", tmp_path / "seconds.csv")
    monkeypatch.setattr(results, "MEMORY", tmp_path / "memory.csv")
    threads = torch.get_num_threads()
    yield settings, results, worker
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:  # `settings` and `results` are names that others may have too
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == FOLDER:
            del sys.modules[name]


def test_a_name_is_of_all_that_decides_the_result(harness):
    settings, _, _ = harness
    run = settings.Run("tiny", "gcn", "vq", 0, 0.01)
    assert run.config == settings.Run("tiny", "gcn", "vq", 3, 0.01).config, "seeds share a configuration"
    others = [
        settings.Run("tiny", "sage", "vq", 0, 0.01),
        settings.Run("tiny", "gcn", "gas", 0, 0.01),
        settings.Run("tiny", "gcn", "vq", 0, 0.003),
        settings.Run("tiny", "gcn", "vq", 0, 0.01, (("layers", 2),)),
        settings.Run("cora", "gcn", "vq", 0, 0.01),
    ]
    assert len({run.config, *(other.config for other in others)}) == 6


def test_validation_chooses_the_step_size(harness):
    settings, results, _ = harness
    cell = ("tiny", "gcn", "vq")
    row = {"train": 1, "stability": "", "best_epoch": 1}
    for run, val, test in zip(settings.trials(cell), (0.7, 0.8), (0.9, 0.6), strict=True):
        assert results.chosen(cell, results.read()) is None, "a trial is missing"
        results.append(run, row | {"val": val, "test": test}, [])
    assert results.chosen(cell, results.read()).lr == 0.003


def test_several_seeds_choose_the_step_size(harness):
    """Of cora's the mean decides, over the seeds that both step sizes have."""
    settings, results, _ = harness
    cell = ("cora", "gcn", "vq")
    row = {"train": 1, "stability": "", "best_epoch": 1, "test": 0.5}
    large, small = settings.trials(cell)
    values = [(large, 0, 0.72, None), (small, 0, 0.7, large), (large, 1, 0.7, large), (small, 1, 0.74, small)]
    for run, seed, val, best in [*values, (large, 2, 0.9, small)]:
        results.append(dataclasses.replace(run, seed=seed), row | {"val": val}, [])
        assert results.chosen(cell, results.read()) == best


@pytest.mark.parametrize("method", ["full", "vq", "gas", "mlp"])
def test_our_rows(harness, method, monkeypatch):
    settings, results, worker = harness
    model = "" if settings.METHODS[method].shared else "gcn"
    run = settings.Run("tiny", model, method, 0, 0.01, (("hidden", 8),))
    row, curve = worker.execute(run)
    assert 0 <= row["test"] <= 1 and row["cpu_seconds_epoch"] > 0
    assert row["val"] == max(point["val"] for point in curve) and len(curve) == run.options["epochs"]
    assert (row["state_bytes"] > 0) == (method in ("vq", "gas"))
    results.append(run, row, curve)
    assert not results.read_curves(), "of those that are timed alone"
    monkeypatch.setattr(results, "timed", lambda label: run)
    results.append(run, row, curve)
    results.append(run, row, curve)
    kept = results.read()[run.config, 0]
    assert float(kept["test"]) == row["test"]
    assert len(results.read_curves()[run.config, 0]) == len(curve), "of a repeated run the last course counts"


def test_a_checkpoint_that_cannot_be_gone_on_with(harness):
    settings, _, worker = harness
    run = settings.Run("tiny", "gcn", "vq", 0, 0.01, (("hidden", 8),))
    folder = worker.RUNS / f"{run.name}-{run.config}"
    worker.RunFolder.create(folder, worker.config_of(run, threads=1)).checkpoint_path.write_bytes(b"another version's")
    row, curve = worker.execute(run)
    assert len(curve) == run.options["epochs"] and row["device"].endswith("threads")


def test_a_run_that_is_wanted_again_is_begun_anew(harness):
    settings, _, worker = harness
    run = settings.Run("tiny", "gcn", "vq", 0, 0.01, (("hidden", 8),))
    first, again = worker.execute(run), worker.execute(run)
    assert len(first[1]) == len(again[1]) == run.options["epochs"]
    assert first[0]["test"] == again[0]["test"]


def test_memory_is_measured_once(harness, monkeypatch, capsys):
    settings, results, worker = harness
    monkeypatch.syspath_prepend(str(FOLDER))
    main = runpy.run_path(str(FOLDER / "__main__.py"), run_name="harness")
    monkeypatch.setitem(main["take_memory"].__globals__, "execute", lambda run, *_: worker.execute(run))
    cells = settings.measured(["tiny"], ["gcn"], ["full", "vq", "vq-fine"])
    assert cells == [("tiny", "gcn", "full"), ("tiny", "gcn", "vq")], "no variants"
    assert main["take_memory"](cells, 1, True, math.inf) == 0 and not results.read_memory(), "a dry run"
    for _ in range(2):
        assert main["take_memory"](cells, 1, False, math.inf) == 0
    assert capsys.readouterr().out.count(" MB") == 2
    assert set(results.read_memory()) == set(cells) and min(results.read_memory().values()) >= 0


def test_rows_of_a_gpu(harness, monkeypatch):
    """Their accuracy counts; their memory and their course are not those of a CPU."""
    settings, results, worker = harness
    import render

    run = settings.Run("tiny", "gcn", "full", 0, 0.01)
    monkeypatch.setattr(results, "timed", lambda label: run)
    row = {"train": 1, "val": 0.7, "test": 0.6, "best_epoch": 1, "peak_mb": 90, "device": "NVIDIA H100 80GB HBM3"}
    results.append(run, row, [{"epoch": 1, "cpu_seconds": 1, "val": 0.7, "test": 0.6}])
    table, cell = render.Table(results.read()), ("tiny", "gcn", "full")
    assert table.values(cell) == [60] and not results.read_curves()
    assert table.values(cell, "peak_mb", 1) == [] and table.values(cell, "peak_mb", 1, gpu=True) == [90]
    with pytest.raises(ValueError, match="saint-rw runs on the CPU only; leave --device cuda out"):
        worker.execute(settings.Run("tiny", "gcn", "saint-rw", 0, 0.01), device="cuda")


def test_how_many_seeds(harness, monkeypatch):
    """Of a set whose runs take long, only full batch and ours have several; other forms of a method run by name."""
    settings, _, _ = harness
    monkeypatch.setitem(settings.SETTINGS, "tiny", dataclasses.replace(settings.SETTINGS["tiny"], peer_seeds=1))
    assert [settings.seeds_of(("tiny", "gcn", method)) for method in ("full", "vq", "gas", "mlp")] == [2, 2, 1, 1]
    assert settings.seeds_of(("cora", "gcn", "gas")) == 5
    command = [sys.executable, str(FOLDER), "run", "--dry-run", "--tables", "main", "--models", "gcn", "--datasets"]
    done = subprocess.run([*command, "ogbn-arxiv-ranks35"], capture_output=True, text=True, check=True)
    named = subprocess.run([*command, "cora", "--methods", "vq-fine"], capture_output=True, text=True, check=True)
    assert "vq-fine" not in done.stdout and "cora-gcn-vq-fine" in named.stdout


def test_time_to_an_accuracy(harness, monkeypatch):
    """Epochs are counted in the runs, their median over the seeds; an epoch's seconds are of all taking turns."""
    settings, results, _ = harness
    import render

    full, ours, other = settings.Timed("full", seeds=2), settings.Timed("vq", seeds=3), settings.Timed("gas")
    table = {"full batch": full, "ours: vq": ours, "ours: vq, slower": settings.Timed("vq", 0.003), "GAS": other}
    for module in (settings, render, results):
        monkeypatch.setattr(module, "TIMED", table)
    for module in (settings, render):
        monkeypatch.setattr(module, "TIMED_DATASET", "tiny")
    monkeypatch.setattr(render, "TIMED_GOALS", ("full batch",))
    row = {"train": 1, "best_epoch": 1, "device": "a CPU x 1 threads", "stability": "", "test": 0.5}

    def course(label, seed, *values):
        points = [{"epoch": n, "cpu_seconds": 9, "val": value, "test": 0.5} for n, value in enumerate(values, 1)]
        results.append(settings.timed(label, seed), row | {"val": max(values)}, points)

    course("full batch", 0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.79)
    course("full batch", 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.81)
    course("ours: vq", 0, 0.6, 0.8)
    course("ours: vq", 1, 0.6, 0.7, 0.7, 0.8)
    course("ours: vq", 2, 0.6, 0.7)
    course("ours: vq, slower", 0, 0.6, 0.7)
    course("GAS", 0, 0.6, 0.7, 0.8)
    rows, curves = results.read(), results.read_curves()
    assert render.goals(rows) == {"full batch": pytest.approx(0.99 * 0.8)}
    assert [render.reached(label, 0.792, curves).median for label in table] == [math.inf, 4, math.inf, 3]
    runs = [settings.pace(settings.timed(label)) for label in ("full batch", "ours: vq", "GAS")]
    assert settings.pace(settings.timed("ours: vq, slower")).config == runs[1].config, "as long an epoch"
    results.write_seconds(runs, [3.0, 1.5, 2.5], 5, "a CPU x 1 threads")
    seconds = results.read_seconds()
    lines = render.timed_table(rows, curves, seconds)
    assert "| ours: vq | 6.0 (2, 4, -) | 1.50 | 1 | 76.67 | 50.00 | 3 |" in lines
    assert "| ours: vq, slower | not reached | 1.50 |" in lines and "| GAS | 7.5 (3) | 2.50 |" in lines
    _, text, verdict = render._fast(rows, curves, seconds)
    assert verdict == "met" and "ours 6.0 s (vq), codes with d = 4 6.0 s, GAS 7.5 s" in text
    results.write_seconds(runs, [3.0, 2.0, 2.5], 5, "a CPU x 1 threads")
    assert render._fast(rows, curves, results.read_seconds())[2] == "**missed**"


def test_epochs_take_turns(harness):
    settings, _, worker = harness
    runs = [settings.Run("tiny", "gcn", method, 0, 0.01, (("hidden", 8),)) for method in ("full", "vq")]
    seconds = worker.epoch_seconds(runs, rounds=2)
    assert len(seconds) == 2 and min(seconds) > 0


def peers_of(worker):
    pytest.importorskip("torch_sparse", reason="PyG's samplers need torch_sparse, which has no wheel")
    return sys.modules["peers"]


@pytest.mark.parametrize("model", ["gcn", "sage", "gat"])
@pytest.mark.parametrize(
    "method", ["cluster-gcn", "lmc-mixed", "saint-rw", "saint-rw-plain", "ns-sage", "sgc", "sign", "lp", "c&s"]
)
def test_peers_learn(harness, method, model):
    settings, _, worker = harness
    peers_of(worker)
    what = settings.METHODS[method]
    shared = what.shared
    if (shared and model != "gcn") or model not in what.models:
        pytest.skip("not run with this model")
    epochs = 120 if method == "saint-rw-plain" else 60  # a node's degree is another in each of its subgraphs
    changes = (("epochs", epochs), ("hidden", 16), ("batches", 3))
    run = settings.Run("tiny", "" if shared else model, method, 0, 0.03, changes)
    row, _ = worker.execute(run)
    assert row["test"] > 0.55, "a third is chance"


@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_graphsaint_is_unbiased(harness, model):
    """Over many subgraphs a node's normalised message has the mean of the whole graph's, its loss the whole weight."""
    settings, _, worker = harness
    peers = peers_of(worker)
    config = worker.config_of(settings.Run("tiny", model, "saint-rw", 0, 0.01), 1)
    torch.manual_seed(0)
    dataset = worker.datasets.of_config(config)
    dataset.data.x = torch.rand(120, 1) + 1
    peer = peers.GraphSAINT(config, dataset, batches=4)
    expected = peer.graph @ dataset.data.x
    total, visits, weight = torch.zeros(120, 1), torch.zeros(120, 1), torch.zeros(120)
    for _ in range(400):
        for batch, graph, loss_weight in peer.batches_of():
            total[batch.n_id] += graph @ batch.x
            visits[batch.n_id] += 1
            weight[batch.n_id] += loss_weight
    mean = total / visits.clamp(min=1)
    train = dataset.data.train_mask
    assert (mean - expected).norm() < 0.1 * expected.norm()
    assert math.isclose(float(weight[train].sum() / 1600), 1, rel_tol=0.05)
    assert float(weight[~train].abs().max()) == 0


def lmc_gradients(harness, model, graph_of=lambda data: data, exact=False):
    """(full batch's gradient, the sum of LMC's over an epoch's batches), with histories of zeros or the true rows."""
    settings, _, worker = harness
    peers = peers_of(worker)
    fixed = (("dropout", 0.0), ("norm", "none"), ("hidden", 8))
    config = worker.config_of(settings.Run("tiny", model, "lmc-mixed", 0, 0.01, fixed), 1)
    dataset = worker.datasets.of_config(config)
    graph_of(dataset.data)
    peer = peers.LMC(config, dataset, batches=3)
    gnn, data = peer.model.double(), peer.data
    data.x, peer.graph = data.x.double(), peer.graph.set_value(peer.graph.storage.value().double(), "coo")
    peer.states, peer.gradients = [r.double() for r in peer.states], [r.double() for r in peer.gradients]
    kept = []
    x = data.x
    for layer, conv in enumerate(gnn.convs):
        x = conv(x, peer.graph)
        x.retain_grad()
        kept.append(x)
        x = gnn.act(x) if layer < len(gnn.convs) - 1 else x
    mask = data.train_mask
    F.cross_entropy(x[mask], data.y[mask]).backward()
    expected = [p.grad.clone() for p in gnn.parameters()]
    gnn.zero_grad()
    if exact:
        peer.states = [row.detach().clone() for row in kept]
        peer.gradients = [row.grad * peer.batches for row in kept[:-1]]
        peer.score = torch.zeros_like
    for loss_of in peer.steps():
        loss_of(gnn).backward()
    return expected, [p.grad / peer.batches for p in gnn.parameters()]


@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_lmc_is_exact_with_true_histories(harness, model):
    """What a batch's gradient lacks is in the histories alone: the sum over batches is full batch's."""
    for expected, found in zip(*lmc_gradients(harness, model, exact=True), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_lmc_needs_no_histories_where_a_halo_is_whole(harness, model):
    """A batch that has all of its halo's neighbours computes it: histories of zeros are not read."""

    def complete(data):
        nodes = torch.arange(data.num_nodes)
        pairs = torch.cartesian_prod(nodes, nodes).T
        data.edge_index = pairs[:, pairs[0] != pairs[1]]

    for expected, found in zip(*lmc_gradients(harness, model, complete), strict=True):
        torch.testing.assert_close(found, expected)


def test_clusters_cover_the_graph(harness):
    settings, _, worker = harness
    peers = peers_of(worker)
    config = worker.config_of(settings.Run("tiny", "gcn", "cluster-gcn", 0, 0.01), 1)
    peer = peers.ClusterGCN(config, worker.datasets.of_config(config), batches=3)
    assert len(peer) == 3
    assert sum(batch.num_nodes for batch in peer.loader) == 120


def test_sign_and_sgc_see_powers_of_the_matrix(harness):
    settings, _, worker = harness
    peers = peers_of(worker)
    config = worker.config_of(settings.Run("tiny", "", "sign", 0, 0.01), 1)
    dataset = worker.datasets.of_config(config)
    a = torch.zeros(120, 120)
    source, target = dataset.data.edge_index
    a[target, source] = 1
    a.fill_diagonal_(1)
    scale = a.sum(1).rsqrt()
    c, x = scale[:, None] * a * scale, dataset.data.x
    expected = torch.stack([x, c @ x, c @ c @ x, c @ c @ c @ x], 1)
    torch.testing.assert_close(peers.SIGN(config, dataset, 3).rows, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(peers.SGC(config, dataset, 3).rows, expected[:, 3], rtol=1e-4, atol=1e-5)


def test_docs_are_what_the_rows_give():
    command = [sys.executable, str(FOLDER), "render", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
