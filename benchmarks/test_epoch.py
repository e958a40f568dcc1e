"""One training epoch of a 3 x 128 GCN on ogbn-arxiv-ranks35 against PyG: time, and peak memory above the data.

    pytest -s benchmarks/test_epoch.py --rows rows.csv

Ours: `vq` with K = 256, d = 4, ten random batches of 10 % of the nodes. The peers: PyG's full batch with a cached
normalised adjacency (torch CSR, and torch_sparse's SparseTensor where it is installed), and PyG's NeighborLoader with
fan-outs 20, 10, 5, which needs torch_sparse. An epoch shows every training label once and is training alone.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import device_name, on_gpu, report
from epoch_worker import METHODS, adjacency, load_data, new_model, shared_data

import vqgnn

DATA = "ogbn-arxiv-ranks35"
HAS_TORCH_SPARSE = importlib.util.find_spec("torch_sparse") is not None
FULL = ["full_csr", "full_sparse"] if HAS_TORCH_SPARSE else ["full_csr"]
WORKER = Path(__file__).with_name("epoch_worker.py")

pytestmark = pytest.mark.skipif(shared_data() is None, reason="no folder shared/data beside this checkout")
needs_torch_sparse = pytest.mark.skipif(
    not HAS_TORCH_SPARSE, reason="PyG's NeighborLoader needs torch_sparse, which is not installed (peer not measured)"
)


@pytest.fixture(scope="module")
def data():
    if on_gpu():
        pytest.skip("on the CPU only; test_step.py is the GPU's")
    return load_data(DATA)


@pytest.fixture(scope="module")
def agreed(data):
    """Before any speed is measured: one model's outputs for every node are the same by ours and by the peers."""
    model = new_model(data).eval()
    with torch.no_grad():
        outputs = {form: model(data.x, adjacency(data, form.removeprefix("full_"))) for form in FULL}
    vqgnn.convert(model, data, method="full")
    ours = vqgnn.inference.layerwise(model, data)
    for form, theirs in outputs.items():
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda text, form=form: f"{form}: {text}")


@pytest.mark.benchmark(group="epoch")
def test_epoch_against_full_batch(versus, data, agreed):
    """Target: at most the time of PyG's full batch in its faster form, i.e. a ratio of 1 or more."""
    peers = {name: METHODS[name](data) for name in FULL}
    versus(METHODS["vq"](data), peers, size=DATA, rounds=5)


@needs_torch_sparse
@pytest.mark.benchmark(group="epoch")
def test_epoch_against_neighbor_loader(versus, data, agreed):
    """Target: at most an eighth of NeighborLoader's time, i.e. a ratio of 8 or more."""
    peers = {"neighbor": METHODS["neighbor"](data)}
    versus(METHODS["vq"](data), peers, size=DATA, rounds=3, slow=("neighbor",), slow_rounds=2)


def test_peak_memory(request, agreed):
    """Target: at most a third of PyG's full batch. Each method runs two epochs in a process of its own."""
    row = {"device": device_name(), "benchmark": request.node.name, "size": DATA}
    for name in ["vq", *FULL]:
        row[f"{name}_peak_above_data_mb"] = run_worker(name, epochs=2)["peak_above_data_mb"]
    for name in FULL:
        row[f"{name}_over_ours"] = row[f"{name}_peak_above_data_mb"] / row["vq_peak_above_data_mb"]
    report(request.config, row)


def run_worker(method: str, epochs: int) -> dict:
    command = [sys.executable, str(WORKER), method, "--epochs", str(epochs), "--threads", str(torch.get_num_threads())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
