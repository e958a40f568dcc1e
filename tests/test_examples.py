import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from vqgnn.datasets import load

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def imported(example: str):
    spec = importlib.util.spec_from_file_location(example, EXAMPLES / f"{example}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("example", "method", "epochs"),
    [("train_gcn", "vq", 6), ("train_gcn", "drop", 6), ("drop_in", "vq", 3)],
)
def test_examples_learn(example, method, epochs, monkeypatch, tmp_path):
    monkeypatch.setenv("VQGNN_CACHE", str(tmp_path))
    assert imported(example).main("generated:n=2000,classes=5", method, epochs) > 0.4  # chance: 0.2


def test_the_hetero_example_learns(monkeypatch, tmp_path):
    monkeypatch.setenv("VQGNN_CACHE", str(tmp_path))
    data = load("generated:n=1500,classes=5").data
    arrays = {key: data[key].numpy() for key in ("x", "y", "edge_index", "train_mask", "val_mask", "test_mask")}
    arrays["edge_type"] = np.random.default_rng(0).integers(2, size=data.num_edges)
    np.savez(tmp_path / "graph.npz", **arrays)
    assert imported("hetero").main(tmp_path / "graph.npz", "vq", 5) > 0.4  # chance: 0.2


def test_the_lightning_example_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="pip install lightning"):
        runpy.run_path(str(EXAMPLES / "train_lightning.py"))
