"""One method's training epochs, in a process of its own: time, and peak memory above the data.

    python benchmarks/epoch_worker.py vq --epochs 3 --threads 1

prints one JSON object. `test_epoch.py` runs the same `METHODS` interleaved in one process for the times, and this
script once a method for the memory, so that no method inherits another one's allocator.
"""

import argparse
import gc
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader
from torch_geometric.nn.models import GCN
from torch_geometric.utils import coalesce, is_undirected, remove_self_loops

import vqgnn
from vqgnn import memory

try:
    import torch_sparse  # here, so that importing it counts as nobody's memory
except ImportError:
    torch_sparse = None

LAYERS, HIDDEN, DROPOUT, LR = 3, 128, 0.5, 0.01
BATCHES = 10  # ours: random batches of 10 % of the nodes
FANOUT, SEEDS = [20, 10, 5], 8192  # NeighborLoader's


def shared_data() -> Path | None:
    """The folder `shared/data` beside the checkout or above it; None where there is none."""
    for parent in Path(__file__).resolve().parents:
        if (parent / "shared" / "data" / "load.py").exists():
            return parent / "shared" / "data"
    return None


def read_shared(name: str, split: int = 0) -> dict:
    """One graph of `shared/data` as numpy arrays, read by the folder's own loader."""
    folder = shared_data()
    if folder is None:
        raise FileNotFoundError(f"data set {name!r}: no folder shared/data beside this checkout or above it")
    spec = importlib.util.spec_from_file_location("shared_data_load", folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(name, split=split, dense=True)


def load_data(name: str) -> Data:
    """A graph of `shared/data` as a PyG `Data`, made undirected."""
    raw = read_shared(name)
    edge_index = torch.from_numpy(raw["edge_index"].astype(np.int64))
    if not is_undirected(edge_index):
        edge_index = torch.cat([edge_index, edge_index.flip(0)], dim=1)
    edge_index = coalesce(remove_self_loops(edge_index)[0])
    masks = {key: torch.from_numpy(raw[key]) for key in ("train_mask", "val_mask", "test_mask")}
    return Data(x=torch.from_numpy(raw["x"]), y=torch.from_numpy(raw["y"]), edge_index=edge_index, **masks)


def new_model(data: Data, cached: bool = False) -> GCN:
    """The benchmark's model, from a fixed seed. `cached` keeps a full batch's normalised adjacency."""
    torch.manual_seed(0)
    options = {"norm": "batch_norm", "dropout": DROPOUT, "cached": cached}
    return GCN(data.num_features, HIDDEN, LAYERS, int(data.y.max()) + 1, **options)


def adjacency(data: Data, form: str):
    """The graph in one of the forms that PyG's convs take: `edge_index`, `csr` (torch) or `sparse` (torch_sparse)."""
    if form == "edge_index":
        return data.edge_index
    n = data.num_nodes
    if form == "sparse":
        return torch_sparse.SparseTensor.from_edge_index(data.edge_index, sparse_sizes=(n, n)).t()
    row, col = data.edge_index
    rowptr = torch.zeros(n + 1, dtype=torch.int64, device=row.device)
    rowptr[1:] = torch.bincount(row, minlength=n).cumsum(0)
    return torch.sparse_csr_tensor(
        rowptr, col, torch.ones_like(col, dtype=torch.float32), size=(n, n)
    )  # symmetric: its own transpose


def full_batch(form: str) -> Callable[[Data], Callable[[], float]]:
    """PyG's full batch, with the normalised adjacency cached."""

    def build(data: Data):
        model, graph = new_model(data, cached=True), adjacency(data, form)
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)

        def epoch() -> float:
            optimizer.zero_grad()
            out = model(data.x, graph)
            loss = F.cross_entropy(out[data.train_mask], data.y[data.train_mask])
            loss.backward()
            optimizer.step()
            return loss.item()

        return epoch

    return build


def neighbor(data: Data) -> Callable[[], float]:
    """PyG's NeighborLoader over the training nodes, sampled from a CSC in int64 as PyG keeps it."""
    model = new_model(data)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    loader = NeighborLoader(data, FANOUT, input_nodes=data.train_mask, batch_size=SEEDS, shuffle=True)

    def epoch() -> float:
        total = 0.0
        for batch in loader:
            optimizer.zero_grad()
            out = model(batch.x, batch.edge_index)[: batch.batch_size]
            loss = F.cross_entropy(out, batch.y[: batch.batch_size])
            loss.backward()
            optimizer.step()
            total += loss.item() / len(loader)
        return total

    return epoch


def vq(data: Data) -> Callable[[], float]:
    """Ours as `vqgnn train` runs it: 10 % batches of random nodes, K = 256, d = 4, averaged weights."""
    model = new_model(data)
    vqgnn.convert(model, data, method="vq", codec="pq:d=4,k=256", seed=0)
    average = vqgnn.MovingAverage(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    loader = vqgnn.BatchLoader(data, batch_size=-(-data.num_nodes // BATCHES), sampler="node", seed=0)
    scale = len(loader) / int(data.train_mask.sum())
    turn = 0

    def epoch() -> float:
        nonlocal turn
        loader.set_epoch(turn)
        turn += 1
        total = 0.0
        for batch in loader:
            optimizer.zero_grad()
            out = model(batch.x, batch.graph)
            loss = scale * F.cross_entropy(out[batch.train_mask], batch.y[batch.train_mask], reduction="sum")
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            total += loss.item() / len(loader)
        return total

    return epoch


METHODS = {
    "vq": vq,
    "full_csr": full_batch("csr"),
    "full_sparse": full_batch("sparse"),
    "full_edge_index": full_batch("edge_index"),
    "neighbor": neighbor,
}


def status_mb(key: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MB (10^6 bytes). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def settle() -> None:
    """Give freed memory back and restart VmHWM, so that reading the file counts neither for nor against a method."""
    gc.collect()
    memory.give_back()
    Path("/proc/self/clear_refs").write_text("5")


def measure(method: str, name: str, epochs: int) -> dict:
    data = load_data(name)
    settle()
    start = status_mb("VmRSS")
    began = time.perf_counter()
    epoch = METHODS[method](data)
    setup = time.perf_counter() - began
    seconds, cpu_seconds, losses = [], [], []
    for _ in range(epochs):
        wall, cpu = time.perf_counter(), time.process_time()
        losses.append(epoch())
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
    return {
        "method": method,
        "data": name,
        "threads": torch.get_num_threads(),
        "setup_seconds": setup,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "losses": losses,
        "data_mb": start,
        "peak_above_data_mb": status_mb("VmHWM") - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--data", default="ogbn-arxiv-ranks35", help="a name from shared/data")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.method, args.data, args.epochs)))


if __name__ == "__main__":
    main()
