"""Why mini-batches on stale state go wrong: what docs/why.md shows.

    python benchmarks/accuracy/why.py                       # rows to results/why.csv, plots to results/plots
    python benchmarks/accuracy/why.py --states              # rows to results/why_states.csv: dropout in stored states
    python benchmarks/accuracy/why.py --attention           # rows to results/why_attention.csv: what costs GAT accuracy
    python benchmarks/accuracy/why.py --codes               # rows to results/why_codes.csv: what a code tells

Trains GCN 3 x 128 on amazon-computers and, every few epochs, compares with the truth: one pass over the whole graph in
training mode (BatchNorm's statistics of all nodes) with the present weights and without dropout.

- What a batch reads of its halo: the relative error |X~ - X| / |X| of each layer's store over all nodes; of it
  quantisation, with fresh codes of X; and how large it would be if a node's row had been kept as decoded when its codes
  were written ("frozen"), or as it was, in full ("stale rows").
- The gradient: of the ten batches' losses, each from a copy of the present state, against the full-batch gradient.
- BatchNorm: the running statistics against those of all nodes.
- Validation accuracy of the last weights and of their average, by exact inference, and by codes of training.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import plots
import results
import torch
import worker
from plots import plt
from settings import BATCHES, Run
from torch import Tensor, nn

import vqgnn
from vqgnn import datasets
from vqgnn.codebook import Codebook
from vqgnn.files import atomic_write
from vqgnn.inference import layerwise
from vqgnn.loader import Batch, BatchLoader
from vqgnn.store import NodeStore
from vqgnn.train import Trainer, build_model, no_denormals

DATASET, MODEL, LR = "amazon-computers", "gcn", 0.01
METHODS = {
    "vq": {"method": "vq"},
    "vq, gradients by channel": {"method": "vq", "codec": "pq:d=4,k=256,e=4"},
    "vq, gradients off": {"method": "vq", "grad": "off"},
    "gas fp32": {"method": "gas"},
    "lmc fp32": {"method": "lmc"},
    "no halo": {"method": "drop"},
}
ROWS = results.FOLDER / "why.csv"


class Watch:
    """Keeps, beside a store, every node's last pushed row, as it was and as it decoded then."""

    def __init__(self, store: NodeStore):
        self.store = store
        self.rows = store.pull()
        self.decoded = self.rows.clone()
        self._push, store.push = store.push, self.push

    def push(self, n_id: Tensor, x: Tensor, *more) -> None:
        self._push(n_id, x, *more)
        self.rows[n_id] = x
        self.decoded[n_id] = self.store.pull(n_id)


class Truth:
    """The present weights on the whole graph: inputs of every conv, gradient, and BatchNorm's statistics."""

    def __init__(self, trainer: Trainer):
        config = trainer.config
        model = build_model(config, trainer.data.num_features, trainer.task.out_channels)
        model.load_state_dict(trainer.model.state_dict())
        vqgnn.convert(model, trainer.data, method="full")
        self.inputs: list[Tensor] = []
        for norm in batch_norms(model):
            norm.momentum = 1.0
        for conv in model.convs:
            conv.register_forward_pre_hook(lambda conv, given: self.inputs.append(given[0].detach()))
        without_dropout(model)
        (batch,) = BatchLoader(trainer.data, trainer.data.num_nodes)
        (trainer.task.loss_sum(model, batch) / trainer.num_terms).backward()
        self.gradient = gradient(model)
        self.statistics = [(norm.running_mean, norm.running_var) for norm in batch_norms(model)]


def batch_norms(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def batch_gradients(trainer: Trainer) -> Tensor:
    """[batches, parameters] of the next epoch's batches, nothing of which stays.

    Losses are scaled as in training: the stored gradients are.
    """
    found, scale = [], len(trainer.loader) / trainer.num_terms
    trainer.loader.set_epoch(trainer.epoch)
    for batch in trainer.loader:
        model = copy.deepcopy(trainer.model)
        without_dropout(model)
        model.zero_grad()
        (trainer.task.loss_sum(model, batch) * scale).backward()
        found.append(gradient(model))
    return torch.stack(found)


def relative(error: Tensor, truth: Tensor) -> float:
    return float(error.norm() / truth.norm())


def measure(trainer: Trainer, watches: dict[str, Watch]) -> dict[tuple[int, str], float]:
    """(layer, what) -> value; layer 0 where it is of the whole model."""
    truth, found = Truth(trainer), {}
    for layer, (name, store) in enumerate(trainer.stores.items(), start=2):
        exact, watch = truth.inputs[layer - 1], watches[name]
        found[layer, "error"] = relative(store.pull() - exact, exact)
        found[layer, "quantisation"] = relative(store.quantised(exact) - exact, exact)
        found[layer, "frozen"] = relative(watch.decoded - exact, exact)
        found[layer, "stale rows"] = relative(watch.rows - exact, exact)
    each = batch_gradients(trainer)
    mean = each.mean(0)
    found[0, "gradient bias"] = relative(mean - truth.gradient, truth.gradient)
    found[0, "gradient cosine"] = float(torch.cosine_similarity(mean, truth.gradient, dim=0))
    spread = (each - mean).norm(dim=1).square().mean().sqrt()
    found[0, "gradient noise"] = float(spread / truth.gradient.norm())
    for layer, (norm, (mean, var)) in enumerate(
        zip(batch_norms(trainer.model), truth.statistics, strict=True), start=1
    ):
        found[layer, "norm mean"] = float(((norm.running_mean - mean).square() / var).mean().sqrt())
        found[layer, "norm deviation"] = float((norm.running_var.sqrt() / var.sqrt() - 1).square().mean().sqrt())
    mask = trainer.data.val_mask

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(1) == trainer.data.y)[mask].float().mean())

    found[0, "last weights"] = accuracy(layerwise(trainer.model, trainer.data))
    found[0, "averaged weights"] = accuracy(trainer.predict())
    if trainer.stores:
        found[0, "averaged weights, codes of training"] = accuracy(trainer.predict("stale"))
    return found


def train(name: str, dropout: float, epochs: int, every: int, schedule: str) -> list[dict]:
    changes = {**METHODS[name], "dropout": dropout, "epochs": epochs, "schedule": schedule}
    config = worker.config_of(Run(DATASET, MODEL, "vq-adam", 0, LR, tuple(({"codec": None} | changes).items())), 1)
    trainer = Trainer(config, datasets.of_config(config))
    watches = {name: Watch(store) for name, store in trainer.stores.items()}
    rows = []
    for epoch in range(1, epochs + 1):
        trainer.train_epoch()
        if epoch % every == 0 or epoch == 1:
            about = {"method": name, "dropout": dropout, "epoch": epoch}
            rows += [about | {"layer": layer, "what": what, "value": round(value, 5)}
                     for (layer, what), value in measure(trainer, watches).items()]  # fmt: skip
            print(f"{name}, dropout {dropout}: epoch {epoch} of {epochs}", file=sys.stderr)
    return rows


# What is stored, and how it is read. Attention keeps W x here, of which dropout of x is none: its rows are read as is.
STATES = ("after dropout", "before dropout", "before dropout, dropped afresh")


def dropout_in_states() -> list[dict]:
    """Best scores with dropout in what is stored, in neither, and afresh in what is read."""
    attention = {"norm": "batch", "residual": False, "optimizer": "adam"}
    experiments = [
        ("amazon-photo", "gat", 0.003, 40, 150, attention | {"attention_dropout": 0.5}),
        ("amazon-photo", "gat", 0.003, 40, 150, attention | {"attention_dropout": 0.0}),
        ("debian-bookworm", "sage", 0.01, 40, 300, {"optimizer": "rmsprop"}),
        ("debian-bookworm", "gcn", 0.01, 40, 300, {"optimizer": "rmsprop"}),
    ]
    rows = []
    for dataset, model, lr, epochs, full_epochs, changes in experiments:
        for method in ("vq", "gas", "drop", "full"):
            stored = ("-",) if method in ("drop", "full") else STATES[:2] if model == "gat" else STATES
            for state in stored:
                run = changes | {"method": method, "codec": None, "epochs": full_epochs if method == "full" else epochs}
                if model == "gat" and method in ("vq", "gas"):
                    run["attention_state"] = "projected"
                found = _best(Run(dataset, model, "vq", 0, lr, tuple(run.items())), state)
                about = {"dataset": dataset, "model": model, "attention_dropout": changes.get("attention_dropout", "")}
                rows.append(about | {"method": method, "stored": state} | found)
                print(rows[-1], file=sys.stderr)
    return rows


# Of one model: of what its random batches take less and less exactly.
ATTENTION = {
    "full batch": {"method": "full", "epochs": 500},
    "loss of a tenth of the nodes": {"method": "full", "exact": "everything"},
    "... gradients of the batch's messages only": {"method": "full", "exact": "messages"},
    "... of the batch's own projections only": {"method": "full", "exact": "projections"},
    "stored inputs, fp32": {"method": "gas"},
    "stored inputs, vq": {"method": "vq", "grad": "off"},
    "stored inputs, gradients pending, fp32": {"method": "lmc"},
    "stored inputs, gradients pending, vq": {"method": "vq"},
    "stored projections, fp32": {"method": "gas", "attention_state": "projected"},
    "stored projections, vq": {"method": "vq", "attention_state": "projected"},
    "stored projections and gradients, fp32": {"method": "lmc", "grad": "on", "attention_state": "projected"},
    "stored projections and gradients, vq": {"method": "vq", "grad": "on", "attention_state": "projected"},
    "the same, scores bounded (--lipschitz 0.5)": {
        "method": "vq",
        "grad": "on",
        "attention_state": "projected",
        "lipschitz": 0.5,
    },
}


class _WholeBatches:
    """A loader of batches that are the whole graph, and in whose loss a tenth of the nodes count.

    exact: "everything"; "messages", other nodes' inputs of all convs but the first are constants; or "projections",
    these are: then only what the batch's own nodes tell has gradients.
    """

    def __init__(self, trainer: Trainer, exact: str):
        (self.batch,) = BatchLoader(trainer.data, trainer.data.num_nodes)
        self.train_mask, self.seed = self.batch.train_mask, trainer.config.seed
        self.inside = torch.zeros_like(self.train_mask)
        for layer in list(trainer.model.convs)[1:]:
            if exact == "messages":
                layer.register_forward_pre_hook(lambda layer, given: (self._own(given[0]), *given[1:]))
            elif exact == "projections":
                layer.conv.lin.register_forward_hook(lambda lin, given, out: self._own(out))

    def _own(self, rows: Tensor) -> Tensor:
        return torch.where(self.inside[:, None], rows, rows.detach()) if torch.is_grad_enabled() else rows

    def __len__(self) -> int:
        return BATCHES

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.inside), generator=torch.Generator().manual_seed(self.seed + 1000 * self.epoch))
        for n_id in order.chunk(BATCHES):
            self.inside.fill_(False)
            self.inside[n_id] = True
            self.batch.train_mask = self.train_mask & self.inside
            yield self.batch


def attention() -> list[dict]:
    """Best scores of GAT on minesweeper (step size 0.003), from exact states and gradients down to what stores have."""
    rows = []
    for name, changes in ATTENTION.items():
        changes = {"codec": None, "optimizer": "adam", **changes}
        exact = changes.pop("exact", None)
        found = _best(Run("minesweeper", "gat", "vq", 0, 0.003, tuple(changes.items())), exact=exact)
        rows.append({"what": name} | found)
        print(rows[-1], file=sys.stderr)
    return rows


CODES = {
    "gradients by channel": {"grad_dim": None},
    "the same, k-means on all nodes": {"grad_dim": None, "decay": 0.0},
    "2 coordinates of gradients a branch": {"grad_dim": 2},
    "1 coordinate": {"grad_dim": 1},
    "no gradients": {"grad": False},
    "d = 2, gradients by channel": {"branch_dim": 2, "grad_dim": None},
    "d = 2, 1 coordinate": {"branch_dim": 2, "grad_dim": 1},
}


class _Pushed:
    """Keeps what is pushed into a store, states and gradients."""

    def __init__(self, store: NodeStore):
        self.rows: list[tuple[Tensor, Tensor]] = []
        self._push, store.push = store.push, self.push

    def push(self, n_id: Tensor, x: Tensor, g: Tensor, *more) -> None:
        self.rows.append((x, g))
        self._push(n_id, x, g, *more)


def codes(epochs: int = 20) -> list[dict]:
    """Relative errors of states and gradients of SAGE on ogbn-arxiv-ranks35 in codebooks of several kinds.

    The rows are an epoch's, in its batches, after `epochs` of training; codebooks see them three times.
    """
    config = worker.config_of(Run("ogbn-arxiv-ranks35", "sage", "vq", 0, 0.01), 1)
    trainer = Trainer(config, datasets.of_config(config))
    with no_denormals():
        for _ in range(epochs):
            trainer.train_epoch()
        pushed = {name: _Pushed(store) for name, store in trainer.stores.items()}
        trainer.train_epoch()
    rows = []
    for layer, watch in enumerate(pushed.values(), 2):
        whole = tuple(torch.cat(part) for part in zip(*watch.rows, strict=True))
        for what, options in CODES.items():
            codebook = Codebook(whole[0].size(1), **options)
            lloyd = options.get("decay") == 0.0
            for x, g in [whole] * 20 if lloyd else 3 * watch.rows:
                codebook.update(x, g if codebook.grad else None)
            stats = codebook.stats()
            rows.append({
                "layer": layer, "codes": what, "bytes": codebook.num_branches, "share": "",
                "error_x": round(stats["relative_error_x"], 3),
                "error_grad": round(stats["relative_error_grad"], 3) if codebook.grad else "",
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
        for part, name in zip(whole, ("states", "gradients"), strict=True):
            part = part - part.mean(0)
            size = torch.linalg.eigvalsh((part.T @ part).double()).flip(0)
            share = size.cumsum(0) / size.sum()
            for rank in (32, 64):
                what = f"{name}: {rank} of {len(size)} directions"
                rows.append({"layer": layer, "codes": what, "share": round(float(share[rank - 1]), 3)})
                print(rows[-1], file=sys.stderr)
    return rows


def _best(run: Run, state: str = "", exact: str | None = None) -> dict[str, float]:
    """Scores (%) at the best validation epoch."""
    config = worker.config_of(run, 1)
    trainer = Trainer(config, datasets.of_config(config))
    if exact is not None:
        trainer.loader = _WholeBatches(trainer, exact)
    for module in trainer.model.modules():
        if state in STATES[:2] and (module is trainer.model or isinstance(module, nn.Dropout)):
            module._forward_pre_hooks.clear()  # of vqgnn.dropout
            module._forward_hooks.clear()
            if state == STATES[1] and isinstance(module, nn.Dropout):
                module.register_forward_hook(_stored_before)
    best: dict[str, float] = {}
    with no_denormals():
        for epoch in range(1, config.epochs + 1):
            trainer.train_epoch()
            if epoch % 4 == 0:
                scores = trainer.scores("exact")
                best = max(best or scores, scores, key=lambda found: found[f"val_{trainer.task.metric}"])
    return {key: round(100 * value, 2) for key, value in best.items()}


def _stored_before(dropout: nn.Dropout, args: tuple, out: torch.Tensor) -> None:
    if dropout.training:
        out._before_dropout = args[0], out._version, 0.0


def plot(rows: list[dict]) -> None:
    """The errors of what is read, the gradient, and the accuracy, by epoch."""

    def course(method: str, layer: int, what: str, dropout: float = 0.0) -> tuple[list[int], list[float]]:
        found = [r for r in rows if (r["method"], int(r["layer"]), r["what"], float(r["dropout"]))
                 == (method, layer, what, dropout)]  # fmt: skip
        return [int(r["epoch"]) for r in found], [float(r["value"]) for r in found]

    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for axis, layer in zip(axes[0], (2, 3), strict=False):
        for what in ("error", "quantisation", "frozen", "stale rows"):
            axis.plot(*course("vq", layer, what), label=f"vq: {what}")
        axis.plot(*course("gas fp32", layer, "error"), "k:", label="gas fp32: error")
        axis.set(title=f"what a batch reads: layer {layer}, no dropout", xlabel="epoch", ylabel="|X~ - X| / |X|")
    for name in METHODS:
        axes[0][2].plot(*course(name, 0, "gradient bias", 0.3), label=name)
        axes[1][0].plot(*course(name, 0, "gradient cosine", 0.3), label=name)
    axes[0][2].set(title="gradient, trained with dropout 0.3: error", xlabel="epoch", yscale="log")
    axes[0][2].set(ylabel="|g - g full| / |g full|")
    axes[1][0].set(title="gradient: cosine with full batch", xlabel="epoch")
    for layer in (1, 2):
        axes[1][1].plot(*course("vq", layer, "norm mean"), label=f"vq, layer {layer}: mean, in deviations")
        axes[1][1].plot(*course("vq", layer, "norm deviation"), "--", label=f"vq, layer {layer}: deviation, relative")
    axes[1][1].set(title="BatchNorm: running statistics, error", xlabel="epoch", yscale="log")
    for what in ("last weights", "averaged weights", "averaged weights, codes of training"):
        axes[1][2].plot(*course("vq", 0, what, 0.3), label=f"vq: {what}")
    axes[1][2].plot(*course("no halo", 0, "averaged weights", 0.3), "k:", label="no halo: averaged weights")
    axes[1][2].set(title="validation accuracy, dropout 0.3", xlabel="epoch", ylim=(0.5, 0.95))
    for axis in axes.flat:
        axis.legend(fontsize=7)
    plots.save(figure, "why")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--every", type=int, default=2, help="epochs between measurements")
    parser.add_argument("--schedule", default="cosine", choices=("cosine", "constant"))
    parser.add_argument("--states", action="store_true", help="the experiment with dropout in stored states alone")
    parser.add_argument("--attention", action="store_true", help="the experiment with attention on minesweeper alone")
    parser.add_argument("--codes", action="store_true", help="what codes tell of ogbn-arxiv-ranks35 alone")
    parser.add_argument("--plot", action="store_true", help="only draw the rows that are there")
    args = parser.parse_args()
    if args.plot:
        with ROWS.open(newline="") as handle:
            plot(list(csv.DictReader(handle)))
        return
    torch.set_num_threads(1)
    if args.states:
        write(results.FOLDER / "why_states.csv", dropout_in_states())
        return
    if args.attention:
        write(results.FOLDER / "why_attention.csv", attention())
        return
    if args.codes:
        write(results.FOLDER / "why_codes.csv", codes())
        return
    rows = []
    for dropout in (0.0, 0.3):
        for name in METHODS:
            rows += train(name, dropout, args.epochs, args.every, args.schedule)
    write(ROWS, rows)
    plot(rows)


def write(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as handle:
        handle.write(text.getvalue().encode())


if __name__ == "__main__":
    main()
