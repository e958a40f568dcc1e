"""Convs and what must hold for each: the tests run cells, and `python tests/conv_table.py` prints the table.

docs/guide.md has that table; `--check docs/guide.md` tells what of it no longer holds, and the tests do for the cells
that they run.

A cell is a function of a conv's builder and of data that raises AssertionError where it does not hold, and returns what
the table shows. Models are as small as a mistake in them would still show.
"""

import argparse
import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from graphs import awkward_graph
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import MessagePassing

import vqgnn
from vqgnn.inference import layerwise

FEATURES, HIDDEN, CLASSES, EDGE_FEATURES = 6, 8, 3, 4
_DEGREES = torch.tensor([2, 6, 9, 10, 7, 4, 2])  # a histogram, which PNA takes its scales from


class Relative(MessagePassing):
    """A user's own conv: an MLP on every edge."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(aggr="sum")
        self.mlp = nn.Sequential(
            nn.Linear(2 * in_channels, out_channels), nn.Tanh(), nn.Linear(out_channels, out_channels)
        )

    def forward(self, x, edge_index):
        return self.propagate(edge_index, x=x)

    def message(self, x_i, x_j):
        return self.mlp(torch.cat([x_i, x_j - x_i], 1))


class Updating(MessagePassing):
    """A user's own conv whose update reads the nodes' x, too."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(aggr="mean")
        self.lin = nn.Linear(2 * in_channels, out_channels)

    def forward(self, x, edge_index):
        return self.propagate(edge_index, x=x)

    def message(self, x_j):
        return x_j.relu()

    def update(self, inputs, x):
        return self.lin(torch.cat([x, inputs], 1))


class Model(nn.Module):
    """Three convs, made by `build(in_channels, out_channels)`."""

    def __init__(self, build: Callable):
        super().__init__()
        sizes = [FEATURES, HIDDEN, HIDDEN, CLASSES]
        self.convs = nn.ModuleList(map(build, sizes, sizes[1:]))

    def forward(self, x, edge_index, edge_attr=None):
        more = [] if edge_attr is None else [edge_attr]
        for conv in self.convs[:-1]:
            x = conv(x, edge_index, *more).tanh()
        return self.convs[-1](x, edge_index, *more)


class GCNII(nn.Module):
    """Chen et al. 2020, of GCN2Conv: every layer is also given what the first one was."""

    def __init__(self, layers: int = 4):
        super().__init__()
        self.encode, self.decode = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.convs = nn.ModuleList(pyg.GCN2Conv(HIDDEN, 0.2, theta=1.0, layer=k + 1) for k in range(layers))

    def forward(self, x, edge_index):
        x = start = self.encode(x).tanh()
        for conv in self.convs:
            x = conv(x, start, edge_index).tanh()
        return self.decode(x)


class Predicting(nn.Module):
    """A linear layer, then a conv that keeps the channels."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.lin, self.conv = nn.Linear(FEATURES, CLASSES), conv

    def forward(self, x, edge_index):
        return self.conv(self.lin(x), edge_index)


def _mlp(i: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Linear(i, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, o))


CONVS: dict[str, Callable[[], nn.Module]] = {
    "GCNConv": lambda: Model(pyg.GCNConv),
    "SAGEConv": lambda: Model(pyg.SAGEConv),
    "GINConv": lambda: Model(lambda i, o: pyg.GINConv(_mlp(i, o))),
    "GATConv": lambda: Model(lambda i, o: pyg.GATConv(i, o, heads=2, concat=False)),
    "GATv2Conv": lambda: Model(lambda i, o: pyg.GATv2Conv(i, o, heads=2, concat=False)),
    "GATConv(edge_dim)": lambda: Model(lambda i, o: pyg.GATConv(i, o, heads=2, concat=False, edge_dim=EDGE_FEATURES)),
    "GATv2Conv(edge_dim)": lambda: Model(
        lambda i, o: pyg.GATv2Conv(i, o, heads=2, concat=False, edge_dim=EDGE_FEATURES)
    ),
    "TransformerConv": lambda: Model(lambda i, o: pyg.TransformerConv(i, o, heads=2, concat=False, beta=True)),
    "AGNNConv": lambda: Predicting(pyg.AGNNConv()),
    "PNAConv": lambda: Model(
        lambda i, o: pyg.PNAConv(i, o, ["mean", "max", "std"], ["identity", "amplification"], _DEGREES)
    ),
    "GCN2Conv": GCNII,
    "APPNP": lambda: Predicting(pyg.APPNP(K=3, alpha=0.1)),
    "ARMAConv": lambda: Model(lambda i, o: pyg.ARMAConv(i, o, num_stacks=2, num_layers=2)),
    "ChebConv": lambda: Model(lambda i, o: pyg.ChebConv(i, o, K=3)),
    "EGConv": lambda: Model(lambda i, o: pyg.EGConv(i, o, aggregators=["symnorm", "max"], num_heads=1, num_bases=2)),
    "SAGEConv(max)": lambda: Model(lambda i, o: pyg.SAGEConv(i, o, aggr="max")),
    "GraphConv": lambda: Model(pyg.GraphConv),
    "own, edge MLP": lambda: Model(Relative),
    "own, update(x)": lambda: Model(Updating),
}


def _loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="sum")


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def _full(model: nn.Module, data: Data) -> tuple[Tensor, Tensor]:
    """PyG's output for the whole graph, and the gradient of all weights."""
    model = copy.deepcopy(model)
    out = model(data.x, data.edge_index, *([data.edge_attr] if "edge_attr" in data else []))
    _loss(out, data.y).backward()
    return out.detach(), _gradient(model)


def _epoch(model: nn.Module, data: Data, times: int = 1, batch_size: int = 20) -> tuple[Tensor, Tensor]:
    """Outputs and the sum of gradients of the last of some passes over mini-batches, with frozen weights.

    What an attention's batches leave for other nodes adds up to the truth where batches stay the same, and once the
    first epochs have faded from its mean.
    """
    outputs = torch.empty(data.num_nodes, CLASSES)
    same = any(store.pending is not None for store in vqgnn.stores(model).values())
    loader = vqgnn.BatchLoader(data, batch_size=batch_size, seed=1, shuffle=not same, prefetch=0)
    for _ in range(10 * times if same else times):
        model.zero_grad()
        for batch in loader:
            out = model(batch.x, batch.graph)
            _loss(out, batch.y).backward()
            outputs[batch.n_id] = out.detach()
    return outputs, _gradient(model)


def _hops(model: nn.Module) -> int:
    """How many times the model asks neighbours: so many sweeps until every stored state is right."""
    return sum(len(conv.survey.hops) if hasattr(conv, "survey") else 1 for conv in model.modules()
               if isinstance(conv, vqgnn.nn.StoreConv))  # fmt: skip


def _close(mine: Tensor, truth: Tensor) -> str:
    torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-3)
    return "exact"


def _error(mine: Tensor, truth: Tensor) -> float:
    return float((mine - truth).norm() / truth.norm())


def plain(model: nn.Module, data: Data) -> str:
    """Given an edge_index it is PyG's; given all nodes as one batch too, with every gradient (invariant 1)."""
    out, gradient = _full(model, data)
    keys = list(model.state_dict())
    vqgnn.convert(model, data, method="lmc", grad=True)
    assert list(model.state_dict()) == keys
    for mine, truth in zip(_full(model, data), (out, gradient), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-5)
    mine = _epoch(model, data, batch_size=data.num_nodes)
    _close(mine[0], out)
    return _close(mine[1], gradient)


def vq_forward(model: nn.Module, data: Data) -> str:
    """With a code for every row there is nothing to lose (invariant 4)."""
    out, _ = _full(model, data)
    vqgnn.convert(model, data, method="vq", codec=f"pq:d=4,k={data.num_nodes}")
    model.eval()
    _close(_epoch(model, data)[0], out)
    return _close(layerwise(model, data, batch_size=13, method="vq"), out)


def vq_gradient(model: nn.Module, data: Data) -> str:
    """Gradient codewords, with which the mini-batches' gradients nearly add up; without, the sum is biased."""
    _, gradient = _full(model, data)

    def error(grad: bool) -> float:
        codec = f"pq:d=2,k={data.num_nodes},e=2"  # all channels of gradients: what is lost then is the machinery's
        vqgnn.convert(model, data, method="vq", codec=codec, decay=0.5, grad=grad)
        return _error(_epoch(model, data, times=_hops(model) + 4)[1], gradient)

    biased, compensated = error(False), error(True)
    assert compensated < 0.1 and compensated < 0.5 * biased, (biased, compensated)
    return f"{100 * compensated:.1f} % off; without {100 * biased:.0f} %"


def gas(model: nn.Module, data: Data) -> str:
    """From empty stores of exact rows, frozen weights reach the full output (invariant 2)."""
    out, _ = _full(model, data)
    vqgnn.convert(model, data, method="gas", fill=False)
    first, _ = _epoch(model, data)
    assert (first - out).abs().max() > 1e-2, "an empty store must show, or this proves nothing"
    return _close(_epoch(model, data, times=_hops(model))[0], out)


def lmc(model: nn.Module, data: Data) -> str:
    """With rows of gradients too, the mini-batches' gradients add up to the whole graph's (invariant 3)."""
    out, gradient = _full(model, data)
    vqgnn.convert(model, data, method="lmc", grad=True)
    mine = _epoch(model, data, times=3 * _hops(model))
    _close(mine[0], out)
    return _close(mine[1], gradient)


def inference(model: nn.Module, data: Data) -> str:
    """Layer by layer, from stores that know nothing."""
    out, _ = _full(model, data)
    vqgnn.convert(model, data, method="gas", fill=False)
    return _close(layerwise(model, data, batch_size=13), out)


def compiled(model: nn.Module, data: Data) -> str:
    """A compiled training step is the eager one, stores included. PyG's own code runs between the compiled parts."""
    vqgnn.convert(model, data, method="lmc", grad=True)
    other = copy.deepcopy(model)
    fused = all(path.path == "fused" for path in vqgnn.paths(model))
    torch._dynamo.reset()
    step = torch.compile(lambda model, x, graph, y: _loss(model(x, graph), y), backend="aot_eager", fullgraph=fused)
    for batch in vqgnn.BatchLoader(data, batch_size=20, seed=1, prefetch=0):
        loss, again = _loss(model(batch.x, batch.graph), batch.y), step(other, batch.x, batch.graph, batch.y)
        loss.backward()
        again.backward()
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(_gradient(other), _gradient(model))
    for mine, its in zip(vqgnn.stores(other).values(), vqgnn.stores(model).values(), strict=True):
        torch.testing.assert_close(mine.state_dict(), its.state_dict())
    return "full graph" if fused else "convs eager"


def autocast(model: nn.Module, data: Data) -> str:
    """In bfloat16: a loss and gradients near fp32's, states in fp32."""
    vqgnn.convert(model, data, method="lmc", grad=True)
    exact = copy.deepcopy(model)
    batch = next(iter(vqgnn.BatchLoader(data, batch_size=20, seed=1, prefetch=0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = _loss(model(batch.x, batch.graph), batch.y)
    loss.backward()
    expected = _loss(exact(batch.x, batch.graph), batch.y)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0.03)
    error = _error(_gradient(model), _gradient(exact))
    assert error < 0.2, error
    assert all(b.dtype == torch.float32 for s in vqgnn.stores(model).values() for b in s.buffers()
               if b.is_floating_point())  # fmt: skip
    return f"{100 * error:.1f} % off"


CHECKS: dict[str, Callable[[nn.Module, Data], str]] = {
    "plain = PyG": plain,
    "vq forward": vq_forward,
    "vq gradient": vq_gradient,
    "gas": gas,
    "lmc": lmc,
    "layer-wise inference": inference,
    "compile": compiled,
    "autocast bf16": autocast,
}


def _data(conv: str) -> Data:
    data = awkward_graph()
    if "edge_dim" in conv:
        generator = torch.Generator().manual_seed(1)
        data.edge_attr = torch.randn(data.num_edges, EDGE_FEATURES, generator=generator)
    return data


def cell(conv: str, check: str) -> str:
    torch.manual_seed(0)
    return CHECKS[check](CONVS[conv](), _data(conv))


def path(conv: str) -> str:
    return vqgnn.paths(vqgnn.convert(CONVS[conv](), _data(conv), method="drop"))[0].path


def row(conv: str) -> dict[str, str]:
    """By column: the conv, its path, and what every check found (or the error that it raised)."""
    found = {"conv": conv, "path": path(conv)}
    for check in CHECKS:
        try:
            found[check] = cell(conv, check)
        except Exception as error:
            found[check] = f"**{type(error).__name__}**"
    return found


def table(convs: list[str]) -> str:
    """The rows as markdown."""
    columns = ["conv", "path", *CHECKS]
    rows = [columns, ["---"] * len(columns), *(list(row(conv).values()) for conv in convs)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def read(text: str) -> dict[str, dict[str, str]]:
    """By conv, the rows of the table in a markdown text."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head = ["conv", "path", *CHECKS]
    if head not in cells:
        raise ValueError(f"no table with the columns {', '.join(head)}; print one without --check")
    found = {}
    for line in cells[cells.index(head) + 2 :]:
        if len(line) != len(head):
            break
        found[line[0]] = dict(zip(head, line, strict=True))
    return found


def verdict(text: str) -> str:
    """What a cell says, whatever its figures: they depend on the machine and on torch."""
    return re.sub(r"\d+(\.\d+)?", "#", text)


def differences(text: str, convs: list[str]) -> list[str]:
    """Cells of the table in a markdown text that say something else than what is found now."""
    known, lines = read(text), []
    lines += [f"{conv}: a row of the table, but no conv of conv_table.py" for conv in known.keys() - CONVS.keys()]
    for conv in convs:
        if conv not in known:
            lines.append(f"{conv}: has no row")
            continue
        for column, value in row(conv).items():
            if verdict(value) != verdict(known[conv][column]):
                lines.append(f"{conv}, {column}: {value!r}, and the table has {known[conv][column]!r}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("convs", nargs="*", metavar="CONV", help=f"of {', '.join(CONVS)}; default: all")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with the table in FILE instead")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.convs) - set(CONVS))
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; choose from {', '.join(CONVS)}")
    chosen = arguments.convs or list(CONVS)
    if arguments.check is None:
        sys.stdout.write(table(chosen))
    elif wrong := differences(arguments.check.read_text(), chosen):
        sys.exit("\n".join(wrong))
