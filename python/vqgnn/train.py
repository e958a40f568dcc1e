"""Training in mini-batches with exact evaluation of averaged weights, checkpoints, and an eye on the codebooks."""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv, models
from torch_geometric.nn.models.basic_gnn import BasicGNN
from torch_geometric.utils import coalesce
from tqdm import tqdm

from . import memory
from .averaging import MovingAverage
from .config import ATTENTIONS, BEFORE, Config, InputError
from .conversion import METHODS, convert, stores
from .datasets import Dataset
from .disk_graph import MappedData
from .graph import BatchGraph
from .inference import estimate_norms, layerwise, warmup
from .models import Cheb, Hybrid, Transformer, add_residuals
from .nn import limit_attention
from .partitioning import cache_folder
from .places import choose
from .runs import Run
from .serving import new_nodes
from .store import NodeStore
from .tasks import SPLITS, TASKS

MODELS = {
    "gcn": models.GCN,
    "sage": models.GraphSAGE,
    "gin": models.GIN,
    "gat": models.GAT,
    "gatv2": partial(models.GAT, v2=True),
    "transformer": Transformer,
    "hybrid": Hybrid,
    "cheb": Cheb,
}
_WITHOUT_OWN_ROW = ("gcn", "gat", "gatv2", "hybrid")  # models whose layers have no linear map of a node's own row
_ROWS = 65_536  # of features at a time
_OPTIMIZERS = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
_EMBEDDING_STD = 0.1  # at first: small enough that Adam's steps soon turn it
_DEAD, _COLLAPSED = 0.9, 1.5  # share of dead codes, and perplexity, at which a codebook is called collapsed


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line that says what to try."""


class NodeMLP(models.MLP):
    """The reference that ignores the graph, called as the others are."""

    def forward(self, x: Tensor, graph: object = None) -> Tensor:
        return super().forward(x)


class Embedded(nn.Module):
    """A GNN whose input is an embedding of every node, learnt with it from features [n, D] on.

    To the first conv its input is a hidden layer's: what a batch knows of other nodes' comes from a store.
    """

    def __init__(self, gnn: nn.Module, features: Tensor):
        super().__init__()
        self.gnn = gnn
        self.embedding = nn.Embedding.from_pretrained(_EMBEDDING_STD * features, freeze=False)

    def forward(self, x: Tensor, graph: BatchGraph) -> Tensor:
        return self.gnn(self.embedding(graph.n_id), graph)


def model_options(config: Config) -> dict[str, Any]:
    """Arguments that all of PyG's models take."""
    options = {"norm": None if config.norm == "none" else f"{config.norm}_norm", "dropout": config.dropout}
    if config.norm == "layer":
        options["norm_kwargs"] = {"mode": "node"}  # PyG's default is statistics over all rows of the batch
    return options


def build_model(config: Config, in_channels: int, out_channels: int) -> nn.Module:
    """The PyG model of a config, with torch's current random state."""
    options = model_options(config)
    if config.model == "mlp":
        return NodeMLP([in_channels] + [config.hidden] * (config.layers - 1) + [out_channels], **options)
    if config.model in ATTENTIONS:
        options["heads"] = config.heads
    model = MODELS[config.model](in_channels, config.hidden, config.layers, out_channels, **options)
    for conv in model.modules():
        if isinstance(conv, (GATConv, GATv2Conv, TransformerConv)):
            conv.dropout = config.attention_dropout  # PyG's models give them `dropout`
    return with_residuals(model, config, in_channels, out_channels)


def state_bytes(config: Config, num_nodes: int, method: str, codec: str | None) -> int:
    """Of the node state of a hidden layer."""
    default, grad = METHODS[method]
    if default is None:
        return 0
    inputs = config.model in ATTENTIONS and config.attention_state != "projected"
    of_gradients = {"grad": grad and config.model not in ATTENTIONS, "pending": grad and inputs}
    return NodeStore.size_of(num_nodes=num_nodes, dim=config.hidden, codec=codec or default, **of_gradients)


def with_residuals(model: BasicGNN, config: Config, in_channels: int, out_channels: int) -> BasicGNN:
    """The model itself, with a linear map beside every layer where the config says so."""
    residual = config.task == "node" if config.residual is None else config.residual
    if residual and config.model in _WITHOUT_OWN_ROW:
        add_residuals(model, in_channels, config.hidden, out_channels)
    return model


def pick_device(name: str) -> torch.device:
    """The device of `--device`: "auto" is the GPU where torch sees one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was given, but torch sees no CUDA device; use cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _inductive(data: Data) -> tuple[Data, Data]:
    """The graphs that training and validation know: the training nodes' own, and all but the test nodes'.

    The second is `data` itself where no edge joins a test node and another one: there it makes no difference.
    """
    if isinstance(data, MappedData):
        raise InputError("--inductive needs a graph in memory, and this one is on disk; leave it out")
    source, target = data.test_mask[data.edge_index]
    separate = torch.equal(source, target)
    return data.subgraph(data.train_mask), data if separate else data.subgraph(~data.test_mask)


def learning_rate_factor(config: Config, step: int, batches: int) -> float:
    """Of the step size, with so many batches an epoch: linear warm-up, then half a cosine down to 0, or constant."""
    warmup, total = config.warmup_epochs * batches, config.epochs * batches
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@contextmanager
def no_denormals() -> Iterator[None]:
    """Weights that decay to nothing become denormal numbers, by which a CPU multiplies many times slower.

    pubmed, RMSprop, weight decay 5e-4, no norm: an epoch took 0.3 s, and 1.6 s after eight.
    """
    before = float(torch.tensor(1e-38) * 0.01) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


class Trainer:
    """Trains one config on one graph; everything that decides the next step is in `state_dict`.

    The weights that are evaluated, and kept where validation is best, are averages over the last steps: under exact
    inference the last iterate jumps wildly.
    """

    def __init__(self, config: Config, dataset: Dataset, fill: bool = True, folder: Path | None = None):
        """`fill=False` leaves the stores empty: their state is about to be loaded.

        `folder` takes scratch files, where state lies on disk; default: in the user's cache folder.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.memory_loading = memory.peak()
        self.device = pick_device(config.device)
        start, mapped = time.perf_counter(), isinstance(dataset.data, MappedData)
        self.phases: dict[str, float] = {}  # seconds, for a graph on disk
        self.config, self.dataset = config, dataset
        where = self._graph_device()
        # a copy: PyG moves a Data in place, and the caller's stays in RAM
        self.data = dataset.data if where.type == "cpu" else copy.copy(dataset.data).to(where)
        memory.give_back()  # what loading, or generating, has freed
        memory.reset_peak(self.device)
        self.base_memory = memory.resident(self.device)  # what the data, and in RAM the libraries, take
        self.train_data, self.val_data = _inductive(self.data) if config.inductive else (self.data, self.data)
        self.task = TASKS[config.task](config, dataset)
        torch.manual_seed(config.seed)
        model = build_model(config, self.data.num_features, self.task.out_channels)
        if config.learned:
            model = Embedded(model, self.data.x)
        self.model = self.task.with_head(model).to(self.device)
        try:
            self.loader = self.task.loader(config, self.train_data, self.device)
            n, batches = self.train_data.num_nodes, len(self.loader)
            if config.task == "node" and config.norm == "batch" and n < 2 * batches:
                raise ValueError(
                    f"{batches} batches of {n} nodes leave some with one, and BatchNorm needs two; give a larger "
                    "--batch-size, or --norm layer"
                )
            if config.model != "mlp":
                options = {"codec": config.codec, "input": config.input, "seed": config.seed, "fill": fill}
                options |= {"place": config.place, "folder": folder, "attention_state": config.attention_state}
                options["grad"] = {"auto": None, "on": True, "off": False}[config.grad]
                if config.method == "vq":
                    options["whiten"] = config.whiten
                    if config.task == "link" and config.grad == "auto":
                        # A node is in several batches an epoch, in each for other pairs: the gradient that one batch
                        # leaves is not the node's. Test MRR on ogbn-arxiv-links: 0.59 with it, 0.69 without.
                        options["grad"] = False
                convert(self.model, self.train_data, method=config.method, **options)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.stores = stores(self.model)
        self.averaged = MovingAverage(self.model, config.average)
        on_disk = mapped or any(store.place == "disk" for store in self.stores.values())
        # Rows that an evaluation keeps: in files, and of half the size, where the graph itself does not fit.
        self.kept = {"folder": folder or cache_folder() / "state"} if on_disk else {}
        self.kept |= {"dtype": torch.float16} if mapped else {}
        kind = _OPTIMIZERS[config.optimizer]
        self.optimizer = kind(self.model.parameters(), config.lr, weight_decay=config.weight_decay)
        if mapped:
            self._note_setup(time.perf_counter() - start)
        self.num_terms = self.task.count(self.train_data)  # of the full-batch mean loss
        self.epoch = 0  # epochs done
        self.best: dict[str, Any] = {"epoch": 0, "scores": {}, "weights": {}}
        self._warned: set[tuple[str, str]] = set()
        self.memory_setup = self._peak_since_last()

    def _graph_device(self) -> torch.device:
        """Where the graph lies: on a GPU if half of its free memory takes the graph and the node state; else in RAM."""
        config, data, cpu = self.config, self.dataset.data, torch.device("cpu")
        if self.device.type == "cpu" or isinstance(data, MappedData) or config.place not in ("auto", "device"):
            return cpu
        layers = config.layers if config.learned else config.layers - 1  # with a state: the features need none
        state = layers * state_bytes(config, data.num_nodes, config.method, config.codec)
        edges = 2 * (8 + 2 * (4 + 4)) * data.num_edges  # edge_index, and C with its transpose
        place, _ = choose(2 * data.x.nbytes + edges + state, self.device)
        return self.device if place == "device" else cpu

    def _note_setup(self, seconds: float) -> None:
        """What a user of a large graph waits for, by phase; what is derived from the graph is kept in its folder."""
        folder = self.data.folder
        product = sum(value for name, value in folder.seconds.items() if name.endswith(".product"))
        matrix = sum(folder.seconds.values()) - product
        self.phases = {"generating": sum(folder.meta["seconds"].values()), "matrix": matrix, "C X": product}
        self.phases["filling the store"] = seconds - matrix - product
        folder.release()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the tables of stores on disk, which `save` writes to files of their own."""
        return {
            "epoch": self.epoch,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stores": {name: _without_tables(store) for name, store in self.stores.items()},
            "random_state": torch.get_rng_state(),
            "random_state_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any], run: Run | None = None) -> None:
        """Go on from a checkpoint; `run` has the tables that it names, if they were on disk."""
        if not _same_config(state["config"], self.config):
            raise InputError("the checkpoint was made with another config than the run's config.json; start a new run")
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._load_stores(state, run)
        torch.set_rng_state(state["random_state"])
        if state["random_state_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_state_cuda"], self.device)
        self.best = state["best"]

    def _load_stores(self, state: dict[str, Any], run: Run | None) -> None:
        """A store's tables come from the checkpoint or from the files that it names, wherever they lie now."""
        generation = state.get("generation")  # of the files; None: there are none
        for name, store in self.stores.items():
            small = generation is not None
            mine = store.state_dict()
            if any(key in mine and mine[key].shape != value.shape for key, value in state["stores"][name].items()):
                raise InputError(
                    f"the checkpoint keeps node state of {name} in other shapes than {store.codec} has now: an older "
                    "vqgnn made it; use that one, or start a new run"
                )
            missing = store.load_state_dict(state["stores"][name], strict=not small).missing_keys
            if not small:
                continue
            if set(missing) != store.tables.keys() or run is None:
                raise InputError(f"the checkpoint lacks {', '.join(missing)} of {name}; give its whole run folder")
            try:
                path = run.tables_path(name, generation)
                store.load_tables(path, store=name, generation=generation, graph=state["fingerprint"])
            except ValueError as error:
                raise InputError(str(error)) from error

    def save(self, run: Run, fingerprint: dict[str, int | str]) -> None:
        """Write a checkpoint, and before it the tables on disk that it names; the last ones go when it is in place."""
        generation = None
        for name, store in self.stores.items():
            if store.place == "disk":
                generation = self.epoch
                path = run.tables_path(name, generation)
                store.save_tables(path, store=name, generation=generation, graph=fingerprint)
        run.save_checkpoint({"fingerprint": fingerprint, "generation": generation, **self.state_dict()})
        run.keep_tables(generation)

    @no_denormals()
    def fit(self, run: Run) -> dict[str, Any]:
        """Train to the last epoch, writing metrics and a checkpoint after each; return the summary."""
        with run.locked():
            return self._fit(run)

    def _fit(self, run: Run) -> dict[str, Any]:
        fingerprint = self.dataset.fingerprint()
        if self.epoch and not run.metrics():
            raise InputError(f"{run.path / 'metrics.jsonl'} of the first {self.epoch} epochs is gone; start a new run")
        run.keep_metrics(self.epoch)
        batches = len(self.loader)
        total, done = self.config.epochs * batches, self.epoch * batches
        interval = 0.5 if sys.stderr.isatty() else 10  # seconds; a log needs no animation
        with tqdm(total=total, initial=done, unit="batch", mininterval=interval) as bar:
            while self.epoch < self.config.epochs:
                bar.set_description(f"epoch {self.epoch + 1}/{self.config.epochs}")
                metrics = self.train_epoch(bar)
                if self.epoch % self.config.eval_every == 0 or self.epoch == self.config.epochs:
                    metrics |= self.evaluate()
                run.append_metrics(metrics)
                self.save(run, fingerprint)
                bar.set_postfix_str(_bar_text(metrics, self.task.metric))
        summary = self.summary(run.metrics())
        run.write_summary(summary)
        return summary

    def train_epoch(self, bar: tqdm | None = None) -> dict[str, Any]:
        """One pass over all batches; its loss, seconds and the state of the stores."""
        start, start_cpu = time.perf_counter(), time.process_time()
        updates = {name: store.stats().get("updates") for name, store in self.stores.items()}
        every = self.config.refresh_every
        if self.stores and every and self.epoch and self.epoch % every == 0:
            warmup(self.model, self.train_data, **self.kept)
        total, batches = 0.0, len(self.loader)
        for step, batch in enumerate(self._batches()):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * learning_rate_factor(self.config, self.epoch * batches + step, batches)
            loss_sum = self.task.loss_sum(self.model, batch)
            # The batch's share of the full-batch mean loss, scaled so that its gradient estimates the full one.
            loss = loss_sum * (batches / self.num_terms)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.config.lipschitz is not None:
                limit_attention(self.model, self.config.lipschitz)
            self.averaged.update_parameters(self.model)
            total += loss_sum.detach().double()  # stays on the device: reading it here would stall every step
            if bar is not None:
                bar.update()
        total = float(total)
        if not math.isfinite(total):
            raise TrainingError(f"the loss is {total} in epoch {self.epoch + 1}; try a smaller --lr")
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        self.epoch += 1
        after = {name: store.stats() for name, store in self.stores.items()}
        return {
            "epoch": self.epoch,
            "loss": total / self.num_terms,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 4),
            "cpu_seconds": round(cpu_seconds, 4),
            "memory_training": self._peak_since_last(),
            **_store_health(after),
            "warnings": self._warnings(updates, after),
        }

    def _batches(self) -> Iterator:
        self.model.train()
        self.loader.set_epoch(self.epoch)
        return iter(self.loader)

    def predict(self, inference: str = "exact", progress: bool = False, data: Data | None = None) -> Tensor:
        """The averaged weights' output [n, C] for every node of the graph; the training store is only read.

        data: another graph with the same features.
        """
        data = self.data if data is None else data
        if self.config.model == "mlp":
            model = self.averaged.module
            with torch.no_grad():
                return torch.cat([model(x.to(self.device)) for x in data.x.split(_ROWS)]).to(data.x.device)
        if inference == "exact":
            return layerwise(self.averaged.module, data, **self.kept, progress=progress)
        if not self.stores:
            raise InputError(f"--inference {inference} needs node states; method {self.config.method!r} keeps none")
        if inference == "stale" and self.config.inductive:
            raise InputError("--inference stale: an inductive run keeps states of training nodes only; use exact")
        try:
            return layerwise(self.averaged.module, data, method=inference, **self.kept, progress=progress)
        except ValueError as error:
            raise InputError(str(error)) from error

    def predict_new(self, x: Tensor, edge_index: Tensor, refresh: bool = False) -> Tensor:
        """The averaged weights' output [k, C] for new nodes (see `serving.new_nodes`), edges made undirected as here.

        refresh: first recompute the known nodes' states by an exact sweep; training cannot go on from them.
        """
        if self.config.model == "mlp":
            with torch.no_grad():
                return self.averaged(x.to(self.device))
        if self.config.inductive:
            raise InputError("an inductive run keeps states of its training nodes only; train without --inductive")
        if self.config.learned:
            raise InputError("--new: new nodes have no learnt embedding; train on features of the nodes")
        x, edges = x.to(self.data.x.device), edge_index.to(self.data.x.device)
        edges = coalesce(edges if self.config.directed else torch.cat([edges, edges.flip(0)], 1))
        model = self.averaged.module
        try:
            if refresh and self.stores:
                warmup(model, self.data, **self.kept)
            return new_nodes(model, self.data, x, edges)
        except ValueError as error:
            raise InputError(f"--new: {error}") from error

    def scores(self, inference: str = "exact") -> dict[str, float]:
        """The task's scores of all splits by the averaged weights; inductive: validation has never met a test node."""
        model = self.averaged.module
        if self.config.norms == "exact" or (self.config.norms == "auto" and self.config.model == "hybrid"):
            estimate_norms(model, self.train_data)
        scores = self.task.scores(model, self._outputs(inference, self.data), self.data)
        if self.val_data is not self.data:
            held_out = self.task.scores(model, self._outputs(inference, self.val_data), self.val_data)
            scores |= {key: value for key, value in held_out.items() if not key.startswith("test_")}
        return scores

    def _outputs(self, inference: str, data: Data) -> Tensor:
        """Of the averaged weights, for scores; as NaN compares as nothing does, these would say anything."""
        out = self.predict(inference, data=data)
        if not all(rows.isfinite().all() for rows in out.split(_ROWS)):
            raise TrainingError(f"the outputs are not finite after epoch {self.epoch}; try a smaller --lr")
        return out

    def evaluate(self) -> dict[str, float]:
        """Exact scores of the averaged weights; the weights are kept where validation is best."""
        start = time.perf_counter()
        self._release()
        scores = self.scores(self.config.inference)
        self._release()
        key = f"val_{self.task.metric}"
        if not self.best["scores"] or scores[key] > self.best["scores"][key]:
            weights = {name: value.clone() for name, value in self.averaged.module.state_dict().items()}
            self.best = {"epoch": self.epoch, "scores": scores, "weights": weights}
        seconds = round(time.perf_counter() - start, 4)
        return {**scores, "eval_seconds": seconds, "memory_evaluation": self._peak_since_last()}

    def _release(self) -> None:
        """Give back RAM between training and evaluation, which keep tensors of other sizes.

        Of a graph on disk its pages, too: a pass over all nodes meets each of them.
        """
        memory.give_back()
        if isinstance(self.data, MappedData):
            self.data.folder.release()

    def use_best(self) -> None:
        """Evaluate and predict with the weights of the best validation epoch."""
        if self.best["weights"]:
            self.averaged.module.load_state_dict(self.best["weights"])

    def summary(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """What the final table shows: times in seconds, sizes in bytes, memory above that of the data."""
        seconds = sorted(epoch["seconds"] for epoch in metrics)
        summary = {
            **self.best["scores"],
            "best_epoch": self.best["epoch"],
            "epochs": self.epoch,
            "seconds_an_epoch": seconds[len(seconds) // 2],
            "seconds_training": round(sum(seconds), 3),
            "store_bytes": sum(store.nbytes for store in self.stores.values()),
            "store_bytes_fp32": sum(store.dense_nbytes for store in self.stores.values()),
        }
        if self.base_memory is not None:
            peaks = {key: max(m.get(key) or 0 for m in metrics) for key in ("memory_training", "memory_evaluation")}
            above = max(self.memory_setup, *peaks.values())
            summary |= {"memory_setup": self.memory_setup, **peaks}
            summary |= {"memory_above_data": above, "memory_peak": self.base_memory + above}
            summary["memory_device"] = self.device.type
        if self.phases:
            evaluation = sorted(epoch["eval_seconds"] for epoch in metrics if "eval_seconds" in epoch)
            middle = evaluation[len(evaluation) // 2]
            phases = self.phases | {"an epoch": summary["seconds_an_epoch"], "evaluation": middle}
            summary["seconds_by_phase"] = {name: round(value, 1) for name, value in phases.items()}
            summary["memory_loading"] = self.memory_loading
            summary["disk_traffic"] = memory.disk_traffic()
        return summary

    def _peak_since_last(self) -> int | None:
        """Most bytes above those of the data since this was last asked."""
        if self.base_memory is None:
            return None
        above = max(0, memory.peak(self.device) - self.base_memory)
        memory.reset_peak(self.device)
        return above

    def _warnings(self, updates: dict[str, int | None], after: dict[str, dict]) -> list[str]:
        """What is wrong with the codebooks after an epoch; each kind is announced once a store."""
        found = []
        for name, stats in after.items():
            if "updates" not in stats:
                continue
            if stats["updates"] <= updates[name]:
                found.append((name, "stuck", f"codebook of {name} was not updated in epoch {self.epoch}"))
            elif stats["dead"] > _DEAD or stats["perplexity"] < _COLLAPSED:
                detail = f"{100 * stats['dead']:.0f} % dead codes, perplexity {stats['perplexity']:.1f}"
                found.append(
                    (name, "collapsed", f"codebook of {name} is collapsed ({detail}); try a smaller K or --lr")
                )
        for name, kind, text in found:
            if (name, kind) not in self._warned:
                self._warned.add((name, kind))
                warnings.warn(text, RuntimeWarning, stacklevel=3)
        return [text for _, _, text in found]


def _without_tables(store: NodeStore) -> dict[str, Any]:
    """A store's state; without its tables where they lie on disk."""
    left_out = store.tables if store.place == "disk" else ()
    return {key: value for key, value in store.state_dict().items() if key not in left_out}


def _same_config(saved: dict[str, Any], config: Config) -> bool:
    """Whether a checkpoint's config is the run's, whose options may be newer than the checkpoint."""
    return {**{f.name: f.default for f in fields(Config)}, **BEFORE, **saved} == asdict(config)


def _store_health(stats: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Staleness (mean over the stores) and, with codebooks, the worst of each figure; `stores` has them one by one."""
    if not stats:
        return {}
    worst = {"relative_error_x": max, "relative_error_grad": max, "perplexity": min, "dead": max}
    health = {"staleness": sum(s["staleness"] for s in stats.values()) / len(stats)}
    for key, pick in worst.items():
        values = [s[key] for s in stats.values() if key in s]
        if values:
            health[key] = pick(values)
    return {**health, "stores": stats}


def _bar_text(metrics: dict[str, Any], metric: str) -> str:
    parts = [f"loss {metrics['loss']:.3f}"]
    parts += [f"{split} {metrics[f'{split}_{metric}']:.3f}" for split in SPLITS if f"{split}_{metric}" in metrics]
    parts.append(f"{metrics['seconds']:.1f} s")
    if "staleness" in metrics:
        parts.append(f"stale {metrics['staleness']:.1f}")
    if "perplexity" in metrics:
        parts.append(f"perplexity {metrics['perplexity']:.0f}, dead {100 * metrics['dead']:.0f} %")
    if metrics["warnings"]:
        parts.append("UNHEALTHY")
    return ", ".join(parts)
