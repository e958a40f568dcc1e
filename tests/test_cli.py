import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vqgnn.cli import main
from vqgnn.config import Config, InputError
from vqgnn.runs import Run

pytestmark = pytest.mark.usefixtures("command_line")
GRAPH = "generated:n=300,classes=3,features=8"
SMALL = ["--dataset", GRAPH, "--hidden", "8", "--layers", "2", "--codec", "pq:d=4,k=4", "--threads", "1"]


@pytest.fixture
def run(tmp_path, capsys):
    """A finished run of two epochs."""
    path = tmp_path / "run"
    assert main(["train", *SMALL, "--epochs", "2", "--out", str(path)]) == 0
    capsys.readouterr()
    return path


def fails(capsys, arguments, *words, code=2):
    """The command ends with this code and one line on stderr that holds these words."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("vqgnn: error: "), captured.err
    for word in words:
        assert word in lines[0]


def comparable(run):
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in epoch.items() if "seconds" not in k and "memory" not in k} for epoch in epochs]


def test_train_evaluate_predict(run, tmp_path, capsys):
    assert {p.name for p in run.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "curves.png", "summary.json",
    }  # fmt: skip
    epoch = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {"epoch", "loss", "train_acc", "val_acc", "test_acc", "seconds", "staleness", "perplexity", "dead"}
    assert wanted <= epoch.keys()
    summary = json.loads((run / "summary.json").read_text())
    for inference in ("exact", "vq", "stale"):
        assert main(["evaluate", str(run), "--inference", inference]) == 0
        out = capsys.readouterr().out
        if inference == "exact":
            assert f"{summary['test_acc']:.4f}" in out
    target = tmp_path / "pred.npz"
    assert main(["predict", str(run), "--out", str(target)]) == 0
    with np.load(target) as file:
        assert file["logits"].shape == (300, 3) and (file["pred"] == file["logits"].argmax(1)).all()


def test_final_table(tmp_path, capsys):
    assert main(["train", *SMALL, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for words in ("train accuracy", "val accuracy", "test accuracy", "time an epoch", "peak memory", "fp32 histories"):
        assert words in out


def test_info(capsys):
    assert main(["info", GRAPH]) == 0
    out = capsys.readouterr().out
    for words in ("300", "homophily", "vq pq:d=4,k=256", "lmc int8", "162 / 54 / 84"):
        assert words in out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "back-end cpp" in out and "cuda" in out


def test_help_shows_every_default(capsys):
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"[default: {field.default};" in text


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_no_command_shows_the_commands(capsys, arguments):
    main(arguments)
    captured = capsys.readouterr()
    assert all(name in captured.out + captured.err for name in ("train", "evaluate", "predict", "info", "doctor"))


def test_resume_of_a_finished_run(run, capsys):
    before = (run / "metrics.jsonl").read_text()
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before


def test_interrupt_and_resume_bit_for_bit(tmp_path):
    """Ctrl-C in a real process; the run then ends as one that was never interrupted."""
    arguments = [*SMALL, "--epochs", "20", "--eval-every", "5"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["train", *arguments, "--out", str(whole)]) == 0

    command = [sys.executable, "-m", "vqgnn.cli", "train", *arguments, "--out", str(broken)]
    root = Path(__file__).resolve().parents[1]
    search = os.pathsep.join([str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")])
    # in a new session with the default handler: a shell's background job would ignore SIGINT
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": search},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (broken / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"go on with: vqgnn train --resume --out {broken}" in errors and "Traceback" not in errors
    done = len(comparable(broken))
    assert 1 <= done < 20
    assert not [p.name for p in broken.iterdir() if p.name.startswith(".")]  # no half-written file

    assert main(["train", "--resume", "--out", str(broken)]) == 0
    assert comparable(broken) == comparable(whole)
    saved = [torch.load(path / "checkpoint.pt", weights_only=True) for path in (broken, whole)]
    for name, weight in saved[1]["model"].items():
        assert torch.equal(saved[0]["model"][name], weight), name


def test_interrupt_before_the_first_epoch(tmp_path, monkeypatch, capsys):
    from vqgnn.train import Trainer

    out = tmp_path / "run"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupted)
        assert main(["train", *SMALL, "--epochs", "2", "--out", str(out)]) == 130
    assert "go on with" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert len(comparable(out)) == 2


def test_out_is_never_overwritten(run, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    fails(capsys, ["train", *SMALL, "--out", str(run)], "exists already", "--resume")
    assert (run / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_other_options(run, capsys):
    fails(capsys, ["train", "--resume", "--out", str(run), "--hidden", "16"], "--hidden 16 differs from the run's 8")
    assert main(["train", "--resume", "--out", str(run), "--hidden", "8"]) == 0


def test_one_process_trains_a_run(run, capsys):
    with Run(run).locked():
        fails(capsys, ["train", "--resume", "--out", str(run)], "is being trained by another process", "another --out")
    assert main(["train", "--resume", "--out", str(run)]) == 0


def test_resume_needs_a_run(tmp_path, capsys):
    fails(capsys, ["train", "--resume"], "--resume needs --out")
    fails(capsys, ["train", "--resume", "--out", str(tmp_path / "none")], "does not exist")
    fails(capsys, ["evaluate", str(tmp_path)], "config.json")


def test_checkpoint_of_another_graph(run, capsys):
    config = json.loads((run / "config.json").read_text())
    for dataset, words in ((GRAPH + ",seed=1", "differ"), (GRAPH.replace("300", "301"), "301 nodes")):
        (run / "config.json").write_text(json.dumps(config | {"dataset": dataset}))
        for command in (["evaluate", str(run)], ["train", "--resume", "--out", str(run)]):
            fails(capsys, command, "belongs to another graph", words)


def test_checkpoint_of_another_config(run, capsys):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"lr": 0.5}))
    fails(capsys, ["evaluate", str(run)], "another config")


def test_checkpoint_of_an_older_version(run, capsys):
    """Codes used to keep gradients by channel."""
    state = torch.load(run / "checkpoint.pt")
    state["stores"]["convs.1.conv"]["codebook.g_values"] = torch.zeros(4, 16, 4)
    torch.save(state, run / "checkpoint.pt")
    fails(capsys, ["evaluate", str(run)], "older", "start a new run")


@pytest.mark.parametrize("content", [b"", b"noise" * 100, "cut"])
def test_damaged_checkpoint(run, capsys, content):
    path = run / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000] if content == "cut" else content)
    fails(capsys, ["evaluate", str(run)], "not a readable checkpoint")


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "."])
def test_predictions_overwrite_no_other_file(run, capsys, name):
    before = (run / "checkpoint.pt").read_bytes()
    fails(capsys, ["predict", str(run), "--out", str(run / name)], "give")
    assert (run / "checkpoint.pt").read_bytes() == before


def test_metrics_that_are_gone(run, capsys):
    (run / "metrics.jsonl").unlink()
    fails(capsys, ["train", "--resume", "--out", str(run)], "metrics.jsonl of the first", "start a new run")


def test_outputs_that_are_no_numbers(tmp_path, capsys):
    arguments = ["train", *SMALL, "--out", str(tmp_path / "run"), "--lr", "1e38", "--epochs", "1", "--norm", "none"]
    assert main([*arguments, "--batch-size", "100000"]) == 1
    assert "the outputs are not finite after epoch 1; try a smaller --lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "{", '{"hiden": 3}', '{"hidden": "wide"}', '{"hidden": 0}', "[]", '{"hidden": null}', '{"dataset": 5}',
        '{"directed": 1}', '{"lr": [1]}', b"\xff",
    ],
)  # fmt: skip
def test_damaged_config(run, capsys, content):
    (run / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(capsys, ["evaluate", str(run)])


BAD_OPTIONS = {
    "unknown dataset": (["--dataset", "nothing"], "'nothing' is unknown"),
    "missing file": (["--dataset", "nowhere.npz"], "does not exist"),
    "split": (["--split", "1"], "no split 1"),
    "features": (["--features", "4:100"], "8 feature columns"),
    "features form": (["--features", "4-8"], "FROM:TO"),
    "features random": (["--features", "random:many"], "random:D with D >= 1"),
    "features empty": (["--features", "4:4"], "FROM < TO"),
    "codec": (["--codec", "zip"], "codec='zip' is unknown"),
    "codec of method": (["--method", "gas"], "method='gas'"),
    "parts": (["--parts", "5/8"], "1 <= Q <= P"),
    "parts and batch": (["--parts", "8/2", "--batch-size", "5"], "exclude each other"),
    "parts and sampler": (["--parts", "8/2", "--sampler", "walk"], "exclude each other"),
    "model": (["--model", "gan"], "gan"),
    "method": (["--method", "none"], "none"),
    "number": (["--epochs", "many"], "--epochs"),
    "range": (["--dropout", "1.5"], "--dropout"),
    "no input left": (["--dropout", "1"], "must be below 1"),
    "BatchNorm of one node": (["--batch-size", "1"], "BatchNorm needs two"),
    "whitening of rows": (["--method", "gas", "--codec", "fp32", "--no-whiten"], "is for method vq"),
    "sweeps of no store": (["--method", "drop", "--refresh-every", "2"], "which keep node states"),
    "codes of rows": (["--method", "gas", "--codec", "fp32", "--inference", "vq"], "which has codebooks"),
    "seed": (["--seed", "99999999999999999999"], "--seed"),
    "no such option": (["--colour", "red"], "--colour"),
}


@pytest.mark.parametrize(("arguments", "word"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(tmp_path, capsys, arguments, word):
    fails(capsys, ["train", *SMALL, "--out", str(tmp_path / "run"), *arguments], word)
    assert not (tmp_path / "run").exists()


def test_a_graph_without_edges(tmp_path):
    assert main(["train", *SMALL, "--dataset", "generated:nodes=60,edges=0", "--out", str(tmp_path / "run")]) == 0


BAD_FILES = {
    "corrupt": (None, "not a readable"),
    "edge out of range": ({"edge_index": np.array([[0], [99]])}, "its nodes are 0..9"),
    "nan": ({"x": np.full((10, 2), np.nan)}, "NaN"),
    "label": ({"y": np.full(10, 7), "num_classes": np.int64(3)}, "its classes are 0..2"),
    "empty split": ({"val_mask": np.zeros(10, bool)}, "empty val_mask"),
}


@pytest.mark.parametrize(("changes", "word"), BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("command", ["train", "info"])
def test_bad_files(tmp_path, capsys, command, changes, word):
    path = tmp_path / "graph.npz"
    if changes is None:
        path.write_bytes(b"PK not really")
    else:
        ids = np.arange(10)
        base = {"x": np.ones((10, 2)), "y": ids % 3, "edge_index": np.array([[0], [1]])}
        masks = {"train_mask": ids < 4, "val_mask": (ids >= 4) & (ids < 7), "test_mask": ids >= 7}
        np.savez(path, **(base | masks | changes))
    arguments = ["info", str(path)] if command == "info" else ["train", "--dataset", str(path)]
    fails(capsys, arguments, word)


def test_config_checks_what_the_command_line_cannot():
    for changes, words in (
        ({"model": "gan"}, "--model 'gan'"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"lr": -1}, "--lr -1"),
    ):
        with pytest.raises(InputError, match=words):
            Config(**changes)
    assert Config(parts="8/2").sampler == "cluster"
