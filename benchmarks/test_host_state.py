"""An epoch of GAS, fp32 histories, with graph and histories in RAM, against both on the device that computes.

    pytest -s benchmarks/test_host_state.py [-k small] [--device cuda] --rows rows.csv

Peers, interleaved in one run: the same epoch with histories (and on a GPU the graph) on the device, target within 10 %;
and the serial form of the transfers, as in pyg_autoscale: every pull and push is waited for by the host, re-implemented
on our engine so that nothing else differs. On the CPU "host" means that rows go through the engine all the same.
"""

import pytest
import torch
import torch.nn.functional as F
from torch_geometric.data import Data
from torch_geometric.nn.models import GCN

import vqgnn
from vqgnn.datasets import load
from vqgnn.transfer import Ticket, TransferEngine

SIZES = {"small": (20_000, 250_000, 10), "large": (2_400_000, 31_000_000, 40)}  # nodes, undirected edges, batches
HIDDEN, LAYERS = 128, 3


class SerialEngine(TransferEngine):
    """Nothing overlaps: the host waits for the device before a transfer, and for the transfer."""

    def _start(self, *arguments) -> Ticket:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        ticket = super()._start(*arguments)
        self.flush()
        return ticket


class Training:
    def __init__(self, data, place: str, device: torch.device, batches: int, serial: bool = False):
        torch.manual_seed(0)
        self.model = GCN(data.num_features, HIDDEN, LAYERS, 40, norm="batch_norm", dropout=0.3).to(device)
        vqgnn.convert(self.model, data, method="gas", place=place, fill=False)
        if serial:
            engine = SerialEngine(device=device)
            for store in vqgnn.stores(self.model).values():
                store._engine = engine
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01)
        self.loader = vqgnn.BatchLoader(data, batch_size=-(-data.num_nodes // batches), device=device)

    def epoch(self) -> torch.Tensor:
        """The sum of its losses; every call trains on the same batches with the same dropout."""
        torch.manual_seed(0)
        self.loader.set_epoch(0)
        total = 0.0
        for batch in self.loader:
            loss = F.cross_entropy(self.model(batch.x, batch.graph), batch.y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        return total


@pytest.mark.parametrize("size", SIZES)
def test_gas_with_state_on_the_host(versus, device, no_default_device, size):
    nodes, edges, batches = SIZES[size]
    if size == "large" and device.type == "cpu":
        pytest.skip("needs --device cuda")
    data = load(f"generated:nodes={nodes},edges={edges},disk=0", 0, False, None).data
    data = Data(x=data.x, y=data.y, edge_index=data.edge_index)
    runs = {
        "ours": Training(data, "host", device, batches),
        "serial": Training(data, "host", device, batches, serial=True),
        "on_the_device": Training(data.clone().to(device), "device", device, batches),
    }
    losses = {name: float(run.epoch()) for name, run in runs.items()}
    assert losses["ours"] == pytest.approx(losses["on_the_device"], rel=1e-3)
    assert losses["ours"] == pytest.approx(losses["serial"], rel=1e-3)
    ours, *peers = runs
    versus(
        runs[ours].epoch, {name: runs[name].epoch for name in peers}, f"n={nodes} e={2 * edges} {batches} batches",
        rounds=7,
    )  # fmt: skip
