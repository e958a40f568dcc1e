"""Node state on disk: the same values as in memory, snapshots that are whole or not there, and every fault a line."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from graphs import awkward_graph
from test_cli import comparable, fails
from test_store import assert_same, stored
from torch_geometric.nn.models import GCN

import vqgnn
from vqgnn import NodeStore, memory, places, tables
from vqgnn.cli import main
from vqgnn.runs import Run

pytestmark = pytest.mark.usefixtures("command_line")
GRAPH = "generated:n=300,classes=3,features=8"
SMALL = ["--dataset", GRAPH, "--hidden", "8", "--layers", "3", "--codec", "pq:d=4,k=4", "--threads", "1"]
CODECS = ["fp32", "fp16", "int8", "int4", "pq:d=4,k=8", "pq:d=4,k=300"]
N, DIM = 30, 7
GIB = 2**30


def pushed(codec="fp32", grad=True, **options):
    """A store after two pushes."""
    torch.manual_seed(1)
    store = NodeStore(N, DIM, codec, grad, **options)
    for _ in range(2):
        store.push(torch.randperm(N)[:20], torch.randn(20, DIM), torch.randn(20, DIM))
    return store


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("codec", CODECS)
def test_a_store_on_disk_is_the_one_in_memory(codec, grad, tmp_path):
    on_disk = pushed(codec, grad, place="disk", folder=tmp_path / "state")
    in_memory = pushed(codec, grad)
    assert_same(stored(on_disk), stored(in_memory))
    assert torch.equal(on_disk.pull(), in_memory.pull())
    assert not any((tmp_path / "state").iterdir())  # scratch files have no names


@pytest.mark.parametrize("where", ["disk", "device"])
@pytest.mark.parametrize("codec", CODECS)
def test_snapshot_and_back(codec, where, tmp_path):
    store = pushed(codec, place="disk", folder=tmp_path)
    store.save_tables(tmp_path / "a.tables", generation=3)
    small = {key: value for key, value in store.state_dict().items() if key not in store.tables}
    other = NodeStore(N, DIM, codec, place=where, folder=tmp_path)
    other.load_state_dict(small, strict=False)
    other.load_tables(tmp_path / "a.tables", generation=3)
    assert_same(stored(other), stored(store))


def test_tables_are_all_that_grows_with_the_graph():
    for codec in CODECS:
        small, large = NodeStore(N, DIM, codec), NodeStore(2 * N, DIM, codec)
        grown = {key for key, value in large.state_dict().items() if value.nbytes != small.state_dict()[key].nbytes}
        assert grown == large.tables.keys()


@pytest.fixture
def snapshot(tmp_path):
    path = tmp_path / "a.tables"
    pushed("int8").save_tables(path, generation=3, graph={"nodes": N, "hash": "a"})
    return path


def test_snapshot_of_something_else(snapshot):
    store = pushed("int8")
    about = {"generation": 3, "graph": {"nodes": N, "hash": "a"}}
    store.load_tables(snapshot, **about)
    for changes, words in (
        ({"generation": 4}, "generation 3, this run's is 4"),
        ({"graph": {"nodes": N, "hash": "b"}}, "another graph"),
    ):
        with pytest.raises(ValueError, match=words):
            store.load_tables(snapshot, **(about | changes))
    for other, words in (
        (NodeStore(N, DIM, "fp32"), "codec int8, this run's is fp32"),
        (NodeStore(N + 1, DIM, "int8"), "nodes 30, this run's is 31"),
        (NodeStore(N, DIM + 1, "int8"), "dim 7"),
        (NodeStore(N, DIM, "int8", grad=False), "grad True"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_tables(snapshot, **about)
    with pytest.raises(ValueError, match="is missing"):
        store.load_tables(snapshot.with_name("b.tables"), **about)


def test_every_damage_is_noticed(snapshot):
    """Whichever byte that matters is changed, and wherever the file is cut off."""
    store, whole = pushed("int8"), snapshot.read_bytes()
    with open(snapshot, "rb") as handle:
        header = tables.read_header(handle, snapshot)
    _, length, _ = tables._PREFIX.unpack_from(whole)
    places = [0, 7, 8, 12, 15, 16, 16 + length // 2, 16 + length - 1]
    for entry in header["tables"]:
        size = store.tables[entry["name"]].nbytes
        places += [entry["offset"], entry["offset"] + size // 2, entry["offset"] + size - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        snapshot.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|not a file of node state|version"):
            store.load_tables(snapshot)
    for length in (0, 3, 20, 4096, len(whole) // 2, len(whole) - 1, len(whole) + 1):
        snapshot.write_bytes((whole + b"x")[:length])
        with pytest.raises(ValueError, match=r"cut off|damaged|not a file of node state"):
            store.load_tables(snapshot)
    snapshot.write_bytes(whole)
    store.load_tables(snapshot)


def test_a_failed_snapshot_leaves_the_old_one(snapshot, monkeypatch):
    old = snapshot.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tables.zlib, "crc32", full)
    with pytest.raises(OSError, match="No space"):
        pushed("int8").save_tables(snapshot)
    assert snapshot.read_bytes() == old and os.listdir(snapshot.parent) == [snapshot.name]


def test_bad_places(tmp_path):
    with pytest.raises(ValueError, match=r"place='cloud'.*device, host, disk, pinned"):
        NodeStore(N, DIM, place="cloud")
    with pytest.raises(ValueError, match="disk needs a folder"):
        NodeStore(N, DIM, place="disk")
    with pytest.raises(ValueError, match=r"place='cloud'.*auto, device, host, disk, pinned"):
        vqgnn.convert(GCN(6, 8, 2, 3), awkward_graph(), place="cloud")
    with pytest.raises(ValueError, match="place='disk' needs the graph in RAM, the data is on cuda"):
        places.resolve("disk", 1, torch.device("cuda"), torch.device("cuda"))
    with pytest.raises(ValueError, match="on disk serves cpu and cannot move"):
        NodeStore(N, DIM, place="disk", folder=tmp_path).to("meta")


def test_auto_goes_by_size_and_free_memory(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(memory, "available", lambda device: {"cpu": 100, "cuda": 10}[device.type] * GIB)
    assert places.choose(50 * GIB, cpu)[0] == "device"
    assert places.choose(50 * GIB + 1, cpu)[0] == "disk"
    assert places.choose(5 * GIB, gpu) == ("device", "5.4 GB is at most half of 10.7 GB free on the GPU")
    assert places.choose(6 * GIB, gpu) == (
        "host", "6.4 GB is more than half of 10.7 GB free on the GPU; 6.4 GB is at most half of 107 GB free",
    )  # fmt: skip
    assert places.choose(51 * GIB, gpu)[0] == "disk"
    assert places.resolve("auto", 6 * GIB, gpu, cpu) == "host"
    assert places.resolve("auto", 6 * GIB, gpu, gpu) == "device"  # a graph on the GPU has its state there
    assert places.resolve("device", 90 * GIB, cpu, cpu) == "device"
    monkeypatch.setattr(memory, "available", lambda device: None)
    assert places.choose(6 * GIB, cpu) == ("device", "free memory is unknown")


@pytest.mark.parametrize(("free", "place"), [(10**9, "device"), (1, "disk")])
def test_convert_chooses(free, place, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: free)
    model = vqgnn.convert(GCN(6, 8, 3, 3), awkward_graph(), method="gas")
    assert {store.place for store in vqgnn.stores(model).values()} == {place}


def test_free_memory_within_a_containers_limit(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1500\nactive_file 300\ninactive_file 200\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available(torch.device("cpu")) == 3500
    (tmp_path / "memory.max").write_text("max\n")
    free = memory.available(torch.device("cpu"))
    assert free is None or free > 3500


def test_info_says_what_auto_would_choose(capsys, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 500_000)
    assert main(["info", GRAPH]) == 0
    lines = {line.split("  ")[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert "disk: 617 kB is more than half of 500 kB free" in lines["lmc fp32"]
    assert "device: 161 kB is at most half of 500 kB free" in lines["lmc int8"]


@pytest.mark.parametrize("method", ["vq", "lmc"])
def test_the_place_does_not_change_a_run(tmp_path, method, capsys):
    runs = {}
    for place in ("device", "disk"):
        runs[place] = tmp_path / place
        options = [*SMALL[:-4], "--threads", "1", "--method", method, "--epochs", "2", "--place", place]
        options += ["--codec", "pq:d=4,k=4"] if method == "vq" else []
        assert main(["train", *options, "--out", str(runs[place])]) == 0
    assert comparable(runs["disk"]) == comparable(runs["device"])
    assert sorted(p.name for p in (runs["disk"] / "state").iterdir()) == [
        "convs.1.conv.2.tables",
        "convs.2.conv.2.tables",
    ]
    assert not (runs["device"] / "state").exists()
    for command in (["evaluate"], ["evaluate", "--inference", "stale"]):
        capsys.readouterr()
        printed = []
        for run in runs.values():
            assert main([command[0], str(run), *command[1:]]) == 0
            printed.append(capsys.readouterr().out.split("\n", 1)[1])
        assert printed[0] == printed[1]


def started(arguments, **options):
    """`vqgnn train` as a process of its own."""
    root = Path(__file__).resolve().parents[1]
    search = os.pathsep.join([str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "vqgnn.cli", "train", *arguments]
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": search}, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(("method", "delays"), [("vq", (0.0, 0.03)), ("lmc", (0.05,))])
def test_killed_and_resumed(tmp_path, method, delays):
    """kill -9 while a checkpoint is written and in mid-epoch; the run then ends as if nothing had happened."""
    arguments = [*SMALL[:-4], "--threads", "1", "--method", method, "--epochs", "12", "--place", "disk"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["train", *arguments, "--out", str(whole)]) == 0
    kills, seen = 0, 0
    for delay in delays:
        go_on = ["--resume"] if (broken / "config.json").exists() else arguments
        process = started([*go_on, "--out", str(broken)])
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            path = broken / "metrics.jsonl"
            if path.exists() and len(path.read_text().splitlines()) > seen:
                break
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
        seen = len((broken / "metrics.jsonl").read_text().splitlines())
    assert kills == len(delays)
    (broken / "state" / ".convs.1.conv.9.tables.left").write_bytes(b"half")
    assert main(["train", "--resume", "--out", str(broken)]) == 0
    assert comparable(broken) == comparable(whole)
    assert sorted(os.listdir(broken / "state")) == sorted(os.listdir(whole / "state"))
    for path in (whole / "state").iterdir():
        assert path.read_bytes() == (broken / "state" / path.name).read_bytes(), path.name
    saved = [torch.load(path / "checkpoint.pt", weights_only=True) for path in (broken, whole)]
    for name, weight in saved[1]["averaged"].items():
        assert torch.equal(saved[0]["averaged"][name], weight), name


@pytest.fixture
def run(tmp_path, capsys):
    """A run of two epochs with its state on disk."""
    path = tmp_path / "run"
    assert main(["train", *SMALL, "--epochs", "2", "--place", "disk", "--out", str(path)]) == 0
    capsys.readouterr()
    return path


def test_faults_of_a_runs_tables(run, tmp_path, capsys):
    table = run / "state" / "convs.1.conv.2.tables"
    good = table.read_bytes()
    other = {}
    for name, options in {
        "graph": ["--dataset", GRAPH + ",seed=1"],
        "codec": ["--codec", "pq:d=4,k=5"],
    }.items():
        out = tmp_path / name
        assert main(["train", *SMALL, "--epochs", "2", "--place", "disk", *options, "--out", str(out)]) == 0
        other[name] = (out / "state" / "convs.1.conv.2.tables").read_bytes()
    capsys.readouterr()
    for content, words in (
        (other["graph"], "another graph"),
        (other["codec"], "codec pq:d=4,k=5, this run's is pq:d=4,k=4"),
        ((run / "state" / "convs.2.conv.2.tables").read_bytes(), "store convs.2.conv, this run's is convs.1.conv"),
        (good[:-1], "cut off"),
        (good[:5000], "cut off"),
        (b"", "not a file of node state"),
        (None, "is missing"),
    ):
        table.unlink(missing_ok=True)
        if content is not None:
            table.write_bytes(content)
        for command in (["evaluate", str(run)], ["train", "--resume", "--out", str(run)]):
            fails(capsys, command, str(table), words)
    table.write_bytes(good)
    assert main(["evaluate", str(run)]) == 0


@pytest.mark.parametrize("what", ["tables", "checkpoint"])
def test_disk_full_at_a_checkpoint(run, tmp_path, capsys, monkeypatch, what):
    """The last checkpoint stays good; the run goes on where there is room again."""
    longer = tmp_path / "longer"
    options = [*SMALL, "--epochs", "3", "--place", "disk"]
    assert main(["train", *options, "--out", str(longer)]) == 0
    broken = tmp_path / "broken"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        save = Run.save_checkpoint

        def second_fails(self, state):
            if state["epoch"] == 2:
                full()
            save(self, state)
            if what == "tables":
                patch.setattr(tables.zlib, "crc32", full)

        patch.setattr(Run, "save_checkpoint", second_fails)
        capsys.readouterr()
        assert main(["train", *options, "--out", str(broken)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vqgnn:")]
    assert len(errors) == 1 and "No space left on device" in errors[0] and "--resume" in errors[0]
    assert "convs.1.conv.1.tables" in os.listdir(broken / "state")
    assert main(["train", "--resume", "--out", str(broken)]) == 0
    assert comparable(broken) == comparable(longer)
    assert sorted(os.listdir(broken / "state")) == ["convs.1.conv.3.tables", "convs.2.conv.3.tables"]


@pytest.mark.parametrize(("limit", "words"), [(500, "do not fit"), (20_000, "File too large")])
def test_a_file_that_may_not_grow(tmp_path, limit, words):
    """A limit on file sizes stands for a full disk: at the scratch file, and at the checkpoint that torch writes."""
    assert main(["info", GRAPH]) == 0  # the graph is in the cache
    arguments = [*SMALL, "--epochs", "1", "--place", "disk", "--out", str(tmp_path / "run")]
    process = started(arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, errors = process.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if line.startswith("vqgnn: error: ")]
    assert process.returncode == 2 and len(lines) == 1 and words in lines[0], errors
    assert "Traceback" not in errors


def test_a_checkpoint_from_before_places(run, tmp_path, capsys):
    """Runs of earlier versions have neither the option nor the checkpoint's generation."""
    old = tmp_path / "old"
    assert main(["train", *SMALL, "--epochs", "2", "--out", str(old)]) == 0
    config = json.loads((old / "config.json").read_text())
    del config["place"]
    (old / "config.json").write_text(json.dumps(config))
    state = torch.load(old / "checkpoint.pt", weights_only=True)
    del state["generation"], state["config"]["place"]
    torch.save(state, old / "checkpoint.pt")
    assert main(["evaluate", str(old)]) == 0
    assert main(["train", "--resume", "--out", str(old)]) == 0


def test_state_moves_between_places(run, monkeypatch, capsys):
    """With --place auto a run may go on in memory that began on disk."""
    monkeypatch.setattr(memory, "available", lambda device: None)
    config = json.loads((run / "config.json").read_text())
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    (run / "config.json").write_text(json.dumps(config | {"place": "auto", "epochs": 3}))
    state["config"] |= {"place": "auto", "epochs": 3}
    torch.save(state, run / "checkpoint.pt")
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert not any((run / "state").iterdir())
    assert len(comparable(run)) == 3
