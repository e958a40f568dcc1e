import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("method", ["vq", "drop"])
def test_train_gcn_learns(method, monkeypatch, tmp_path):
    monkeypatch.setenv("VQGNN_CACHE", str(tmp_path))
    spec = importlib.util.spec_from_file_location("train_gcn", EXAMPLES / "train_gcn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main("generated:n=2000,classes=5", method, epochs=6) > 0.4  # chance: 0.2
