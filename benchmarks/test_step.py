"""An epoch of two training steps, a GCN of 3 x 128 on a graph of ogbn-arxiv's size in batches of half its nodes.

    pytest benchmarks/test_step.py [-k small] [--device cuda] --rows rows.csv

The peers: the official VQ-GNN's algorithm over the same two batches, which loops over 32 branches in message passing
and codebook update (re-implemented from appendix E of the paper, all three layers quantised); and PyG's full batch,
whose one step trains on as many nodes, with the normalised adjacency as a torch CSR matrix, cached. Slicing the batches
out of the graph is not counted.
"""

import pytest
import torch
import torch.nn.functional as F
from epoch_worker import LR, adjacency, new_model
from torch_geometric.data import Data
from torch_geometric.utils import coalesce

import vqgnn
from vqgnn.generate import GeneratedGraph
from vqgnn.graph import Convolution
from vqgnn_kernels import CSR, Rows, aggregate, codebook_update, vq_assign_stats

D = 4  # channels a branch
DECAY, WHITEN_DECAY, EPS = 0.9, 0.9, 1e-5
SIZES = {"small": (2_000, 64), "arxiv": (169_343, 1024)}  # nodes, K


def generated(num_nodes: int, device) -> Data:
    arrays = {key: torch.as_tensor(value) for key, value in GeneratedGraph(n=num_nodes).generate().items()}
    edge_index = arrays["edge_index"].long()
    data = Data(x=arrays["x"].float(), y=arrays["y"].long(), train_mask=arrays["train_mask"])
    data.edge_index = coalesce(torch.cat([edge_index, edge_index.flip(0)], 1))
    data.labels = torch.where(data.train_mask, data.y, -100)  # cross_entropy leaves -100 out; no host waits for a mask
    return data.to(device)


class Branches:
    """The official algorithm's state of one layer: codewords of features and gradients, and every node's codes."""

    def __init__(self, num_nodes: int, f: int, K: int, device):
        self.m = f // D
        self.codebooks = list(torch.randn(self.m, K, 2 * D, device=device))  # whitened
        self.ema_counts = list(torch.ones(self.m, K, device=device))
        self.ema_sums = [c.clone() for c in self.codebooks]
        self.mean, self.var = torch.zeros(self.m, 2 * D, device=device), torch.ones(self.m, 2 * D, device=device)
        self.codes = torch.randint(K, (num_nodes, self.m), device=device)

    def values(self, j: int) -> torch.Tensor:
        """[K, 2 D] codewords, whitening undone."""
        return self.codebooks[j] * (self.var[j] + EPS).sqrt() + self.mean[j]

    def messages(self, x: torch.Tensor, part: dict, gradient: bool) -> torch.Tensor:
        """C_BB x + C_BH times the codewords of the halo (eq. 6; with gradient codewords and C^T eq. 7)."""
        out = part["inside"] @ x
        for j in range(self.m):
            codewords = self.values(j)[:, D:] if gradient else self.values(j)[:, :D]
            message = codewords[self.codes[part["outside"], j]] * part["weight"][:, None]
            out[:, j * D : (j + 1) * D].index_add_(0, part["row"], message)
        return out

    @torch.no_grad()
    def update(self, n_id: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> None:
        """Algorithm 2, a branch at a time: [b, K] distances and a one-hot matrix."""
        for j in range(self.m):
            channels = slice(j * D, (j + 1) * D)
            v = torch.cat([x[:, channels], g[:, channels]], 1)
            self.mean[j].lerp_(v.mean(0), 1 - WHITEN_DECAY)
            self.var[j].lerp_(v.var(0, correction=0), 1 - WHITEN_DECAY)
            v = (v - self.mean[j]) / (self.var[j] + EPS).sqrt()
            codebook, counts, sums = self.codebooks[j], self.ema_counts[j], self.ema_sums[j]
            distance = v.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * v @ codebook.T
            code = distance.argmin(1)
            one_hot = torch.zeros_like(distance).scatter_(1, code[:, None], 1)
            counts.lerp_(one_hot.sum(0), 1 - DECAY)
            sums.lerp_(one_hot.T @ v, 1 - DECAY)
            n = counts.sum()
            codebook.copy_(sums / ((counts + EPS) / (n + len(counts) * EPS) * n)[:, None])
            self.codes[n_id, j] = code


class Messages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer, batch):
        ctx.layer, ctx.batch, ctx.x = layer, batch, x
        return layer.messages(x, batch["forward"], gradient=False)

    @staticmethod
    def backward(ctx, g):
        ctx.layer.last = ctx.x, g  # what the update needs
        return ctx.layer.messages(g, ctx.batch["backward"], gradient=True), None, None


def official_batch(batch) -> dict:
    """A batch of ours with its matrices as the official algorithm takes them."""

    def part(csr: CSR) -> dict:
        b = csr.rowptr.numel() - 1
        row = torch.arange(b, device=csr.col.device).repeat_interleave(csr.rowptr.diff())
        own = csr.col < b
        count = torch.bincount(row[own], minlength=b).cumsum(0)
        rowptr = torch.cat([count.new_zeros(1), count])
        inside = torch.sparse_csr_tensor(rowptr, csr.col[own].long(), csr.weight[own], (b, b), check_invariants=False)
        return {
            "inside": inside,
            "row": row[~own],
            "outside": csr.halo[csr.col[~own].long() - b],
            "weight": csr.weight[~own],
        }

    forward, backward = (part(csr) for csr in batch.graph.csr(Convolution("gcn")))
    return {"n_id": batch.n_id, "x": batch.x, "labels": batch.labels, "forward": forward, "backward": backward}


def official_epoch(data: Data, batches: list, K: int):
    model = new_model(data).to(data.x.device)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=3e-3)
    layers = [Branches(data.num_nodes, conv.in_channels, K, data.x.device) for conv in model.convs]
    batches = [official_batch(batch) for batch in batches]

    def epoch() -> torch.Tensor:
        for batch in batches:
            h = batch["x"].detach().requires_grad_()  # the first layer's codes learn from a gradient too
            for i, (conv, layer) in enumerate(zip(model.convs, layers, strict=True)):
                h = F.linear(Messages.apply(h, layer, batch), conv.lin.weight, conv.bias)
                if i + 1 < len(layers):
                    h = F.dropout(model.norms[i](h).relu(), model.dropout.p)
            loss = F.cross_entropy(h, batch["labels"], ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            for layer in layers:
                layer.update(batch["n_id"], *layer.last)
            optimizer.step()
        return loss.detach()

    return epoch


def full_batch_epoch(data: Data):
    model = new_model(data, cached=True).to(data.x.device)
    optimizer, graph = torch.optim.Adam(model.parameters(), lr=LR), adjacency(data, "csr")

    def epoch() -> torch.Tensor:
        loss = F.cross_entropy(model(data.x, graph), data.labels, ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return epoch


def our_epoch(batches: list, model):
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def epoch() -> torch.Tensor:
        for batch in batches:
            loss = F.cross_entropy(model(batch.x, batch.graph), batch.labels, ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.detach()

    return epoch


def check(batch, K: int) -> None:
    """The official algorithm's messages, their gradients and its update are ours for the same codes and codewords."""
    device, official = batch.x.device, official_batch(batch)
    layer = Branches(int(batch.graph.graph.num_nodes), batch.x.shape[1], K, device)
    layer.mean.normal_()
    csr, csr_t = batch.graph.csr(Convolution("gcn"))
    values = torch.stack([layer.values(j) for j in range(layer.m)])
    codes = layer.codes.to(torch.uint8 if K <= 256 else torch.int16)
    tables = [Rows("pq", codes, None, values[..., part].contiguous()) for part in (slice(D), slice(D, None))]
    x, theirs = (batch.x.clone().requires_grad_() for _ in range(2))
    out, their_out = aggregate(x, csr, tables[0], csr_t, tables[1]), Messages.apply(theirs, layer, official)
    torch.testing.assert_close(out, their_out, rtol=1e-3, atol=1e-3)
    g = torch.randn_like(out)
    out.backward(g)
    their_out.backward(g)
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-3, atol=1e-3)

    state = [torch.stack(t) for t in (layer.codebooks, layer.ema_counts, layer.ema_sums)]
    layer.update(official["n_id"], *layer.last)
    v = torch.cat([part.view(len(g), layer.m, D) for part in (batch.x, g)], 2).view(len(g), -1)
    whitening = layer.mean.flatten(), (layer.var.flatten() + EPS).rsqrt()
    codes, counts, sums = vq_assign_stats(v, state[0], *whitening)
    codebook_update(*state, counts, sums, DECAY, eps=EPS)
    # a row half-way between two codewords, to rounding, may go either way and move these two
    assert (codes.long() != layer.codes[official["n_id"]]).float().mean() < 1e-3
    assert ((state[0] - torch.stack(layer.codebooks)).abs() > 1e-3).float().mean() < 1e-2


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("size", SIZES)
def test_step(versus, device, no_default_device, size):
    """Targets on a GPU: 20 times the official algorithm's speed, and no slower than the full batch."""
    if size != "small" and device.type == "cpu":
        pytest.skip("169k nodes are for --device cuda")
    num_nodes, K = SIZES[size]
    data = generated(num_nodes, device)
    model = new_model(data).to(device)
    with torch.no_grad():
        full_batch = model.eval()(data.x, adjacency(data, "csr"))
    vqgnn.convert(model, data, method="vq", codec=f"pq:d={D},k={K}")
    torch.testing.assert_close(vqgnn.inference.layerwise(model, data), full_batch, rtol=1e-3, atol=1e-3)
    batches = list(vqgnn.BatchLoader(data, batch_size=-(-num_nodes // 2), prefetch=0))
    check(batches[0], K)
    ours = our_epoch(batches, model.train())
    peers = {"official": official_epoch(data, batches, K), "pyg_full_batch": full_batch_epoch(data)}
    losses = {name: [float(epoch()) for _ in range(5)] for name, epoch in {"ours": ours, **peers}.items()}
    assert all(loss[-1] < loss[0] for loss in losses.values()), losses  # all of them learn
    versus(ours, peers, size=f"n={num_nodes} b={num_nodes // 2} K={K}", rounds=7, memory=True)
