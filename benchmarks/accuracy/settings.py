"""What is run: data sets, methods, and the tables made of them. A run is a value; its hash is its name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

BATCHES = 10  # mini-batches an epoch: of 10 % of the nodes
EVALUATIONS = 40  # at most, in a run
HIDDEN, LAYERS, AVERAGE = 128, 3, 0.98  # AVERAGE: decay a step of the evaluated weights
# What is kept of nodes, and how it is read: rows of runs that did otherwise do not count.
STATES = {"gat": "inputs before dropout, dropped afresh", "": "before dropout, dropped afresh"}
GRADIENTS = "coordinates in a basis"  # what codes say of gradients, where a codec does not
# what an attention keeps of them
PENDING = "gradients of inputs, pending, a mean over epochs by least squares, coordinates: f / 16 - 1"
STEP_SIZES = (0.01, 0.003)  # every method's tuning budget: the better by validation goes on
MODELS = ("gcn", "sage", "gat")
OPTIMIZERS = {"gcn": "rmsprop", "sage": "rmsprop", "gat": "adam"}  # of ours, "auto" below: by validation at seed 0


@dataclass(frozen=True)
class Setting:
    """What every method of a data set shares.

    A mini-batch epoch makes ten steps and a full-batch epoch one, so full batch has more epochs. `guess` is seconds an
    epoch on one core, for the estimate before anything is measured. Large sets have one step size a model: no method is
    tuned. tuning_seeds: at how many seeds step sizes are compared.
    """

    file: str
    dropout: float
    full_epochs: int
    batch_epochs: int
    seeds: int
    guess: float
    options: tuple[tuple[str, Any], ...] = ()
    tuning_seeds: int = 1
    peer_seeds: int | None = None
    step_sizes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by model, where not STEP_SIZES
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MODEL_OPTIONS)


# What the models have, as the strong baselines of Luo et al., arXiv 2406.08993, have it; SAGE has a linear map of a
# node's own row anyway.
MODEL_OPTIONS = {"gcn": {"residual": True}, "gat": {"norm": "layer", "residual": True}}
# No norm: that of a batch with 14 or 6 labels does harm (cora, GCN, full batch: 78.6 with BatchNorm, 80.7 without). GAT
# keeps the linear map: full batch validates the better for it on pubmed (79.4, without 78.6), the same on cora.
# 140 and 60 labels, 500 nodes to validate with: one seed says little of a step size.
PLANETOID = {
    "options": (("weight_decay", 5e-4), ("norm", "none")),
    "models": {"gat": {"residual": True}},
    "tuning_seeds": 5,
}
SETTINGS = {
    "cora": Setting("cora", 0.5, 200, 30, 5, 0.15, **PLANETOID),
    "pubmed": Setting("pubmed", 0.5, 200, 30, 5, 0.4, **PLANETOID),
    # dropout 0.5, 0.7, 0.8: full batch validates at 84.3, 85.2, 85.4 (GCN) and 83.8, 84.6, 85.1 (SAGE)
    "dblp-citation": Setting("dblp-citation", 0.8, 100, 20, 5, 0.5),
    "amazon-photo": Setting("amazon-photo", 0.5, 200, 60, 5, 0.2),
    "minesweeper": Setting("minesweeper", 0.2, 500, 100, 5, 0.2, (("metric", "auc"),)),
    "amazon-computers": Setting("amazon-computers", 0.5, 300, 60, 3, 0.4),
    "coauthor-physics": Setting("coauthor-physics", 0.5, 300, 30, 3, 5.0, step_sizes=dict.fromkeys(MODELS, (0.003,))),
    "debian-bookworm": Setting("debian-bookworm", 0.5, 500, 100, 5, 1.0, peer_seeds=3),
    "ogbn-arxiv-ranks35": Setting(
        "ogbn-arxiv-tape", 0.3, 500, 100, 3, 3.0, (("features", "80:200"),),
        peer_seeds=1, step_sizes={"gcn": (0.01,), "sage": (0.01,), "gat": (0.003,)},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A row of the tables. `trainer`: run by `vqgnn train`; else by `peers.py`, with PyG's own loaders and convs.

    options: of `vqgnn.config.Config`, over the setting's. shared: whether it ignores the model. models: those that it
    is run with. lacks: data sets that it is not run on. epochs: as a share of the setting's mini-batch epochs, or
    None for the full-batch number. step_sizes: where a paper fixes them. variant: another form of a method, which is
    run where it is named.
    """

    label: str
    options: tuple[tuple[str, Any], ...] = ()
    trainer: bool = True
    shared: bool = False
    models: tuple[str, ...] = MODELS
    lacks: tuple[str, ...] = ()
    epochs: float | None = 1.0
    step_sizes: tuple[float, ...] | None = None
    variant: bool = False


def _ours(label: str, method: str, sampler: str = "node", models: tuple[str, ...] = MODELS, **options: Any) -> Method:
    return Method(label, (("method", method), ("sampler", sampler), *options.items()), models=models)


def _variant(
    label: str, method: str, sampler: str = "node", models: tuple[str, ...] = MODELS, **options: Any
) -> Method:
    return replace(_ours(label, method, sampler, models, **options), variant=True)


CODEC = "pq:d=4,k=256"
METHODS = {
    "full": Method("full batch", (("method", "full"),), epochs=None),
    "full-rmsprop": Method(
        "full batch, RMSprop", (("method", "full"), ("optimizer", "rmsprop")), epochs=None, variant=True
    ),
    "vq": _ours("ours: vq, random nodes", "vq", codec=CODEC, optimizer="auto"),
    "vq-fine": _variant("ours, d = 2", "vq", codec="pq:d=2,k=256", optimizer="auto"),
    "vq-channels": _variant(
        "ours, gradients by channel", "vq", codec=f"{CODEC},e=4", optimizer="auto", models=("gcn", "sage")
    ),
    "vq-forward": _variant("ours, no gradients", "vq", codec=CODEC, grad="off", optimizer="auto"),
    "vq-cluster-forward": _variant(
        "ours, clusters, no gradients", "vq", "cluster", codec=CODEC, grad="off", optimizer="auto", models=("gat",)
    ),
    "vq-adam": _variant("ours, Adam", "vq", codec=CODEC, models=("gcn", "sage")),
    "vq-rmsprop": _variant("ours, RMSprop", "vq", codec=CODEC, optimizer="rmsprop", models=("gat",)),
    "vq-projected": _variant(
        "ours, projected states", "vq", codec=CODEC, attention_state="projected", optimizer="auto", models=("gat",)
    ),
    "vq-cluster": _variant("ours, clusters", "vq", "cluster", codec=CODEC, optimizer="auto"),
    "gas": _ours("GAS, fp32 rows, clusters", "gas", "cluster"),
    "gas-rmsprop": _variant("GAS, fp32 rows, clusters, RMSprop", "gas", "cluster", optimizer="rmsprop"),
    # without stored gradients, which attention has none of, it would be GAS
    "lmc": _ours("LMC, fp32 rows, clusters", "lmc", "cluster", models=("gcn", "sage")),
    "lmc-rmsprop": _variant(
        "LMC, fp32 rows, clusters, RMSprop", "lmc", "cluster", optimizer="rmsprop", models=("gcn", "sage")
    ),
    "lmc-mixed": Method(
        "LMC, halo mixed (PyG)", trainer=False, models=("gcn", "sage"),
        lacks=("coauthor-physics", "debian-bookworm", "ogbn-arxiv-ranks35"),  # up to ten times the seconds of "lmc"
    ),
    # Ding et al., appendix F: RMSprop with 3e-3, codes of the features too (K = 256, of which they say that it works as
    # well as their 1024: here that is more than a small set's batch has nodes); the last iterate, and inference
    # in mini-batches with the codes of training
    "vq-paper": replace(
        _ours(
            "VQ-GNN as published", "vq", codec=f"{CODEC},e=4", optimizer="rmsprop", schedule="constant",
            average=0.0, input="codes", inference="stale",
        ),
        step_sizes=(0.003,),
        lacks=("coauthor-physics",),  # codes of 8,415 features a node: 2,104 codebooks
    ),
    # what GraphSAINT's subgraphs lack, without its batches
    "full-edges": Method(
        "full batch, 80 % of the edges dropped",
        (("method", "full"), ("edge_dropout", 0.8)),
        models=("gcn", "sage"),
        epochs=None,
        variant=True,
    ),
    "vq-edges": _variant(
        "ours, 80 % of the edges dropped", "vq", codec=CODEC, optimizer="auto", edge_dropout=0.8, models=("gcn", "sage")
    ),
    # what codes cost: the same with rows as they are
    "lmc-node": _variant("fp32 rows and gradients, random nodes", "lmc", optimizer="auto"),
    "drop": _variant("no halo, exact input layer, random nodes", "drop"),
    "drop-cluster": _variant("no halo, exact input layer, clusters", "drop", "cluster"),
    "cluster-gcn": Method("Cluster-GCN (PyG)", trainer=False),
    "saint-rw": Method("GraphSAINT-RW (PyG)", trainer=False),
    "saint-rw-plain": Method("GraphSAINT-RW (PyG), not normalised", trainer=False, models=("gcn", "sage")),
    "ns-sage": Method("NS-SAGE [20,10,5] (PyG)", trainer=False, models=("sage",), epochs=0.25),
    "mlp": Method("MLP", (("model", "mlp"), ("sampler", "node")), shared=True),
    # one linear map: with the others' step sizes it is far from its end
    "sgc": Method("SGC", trainer=False, shared=True, epochs=None, step_sizes=(0.01, 0.1, 0.3)),
    "sign": Method("SIGN", trainer=False, shared=True),
    "lp": Method("label propagation", trainer=False, shared=True, epochs=0.0),
    "c&s": Method("MLP + Correct & Smooth", trainer=False, shared=True),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training. `changes` to the method's options make the ablations."""

    dataset: str
    model: str
    method: str
    seed: int
    lr: float
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.dataset]

    @property
    def what(self) -> Method:
        return METHODS[self.method]

    @cached_property
    def options(self) -> dict[str, Any]:
        """Of `vqgnn.config.Config`, but for the data file and the threads; `batches` stands for the batch size."""
        setting, method = self.setting, self.what
        epochs = setting.full_epochs if method.epochs is None else math.ceil(setting.batch_epochs * method.epochs)
        options = {
            "model": "gcn" if method.shared else self.model,
            "hidden": HIDDEN,
            "layers": LAYERS,
            "lr": self.lr,
            "dropout": setting.dropout,
            "average": AVERAGE,
            "epochs": max(1, epochs),
            "seed": self.seed,
            "batches": BATCHES,
            **({} if method.shared else setting.models.get(self.model, {})),
            **dict(setting.options),
            **dict(method.options),
            **dict(self.changes),
        }
        if options.get("optimizer") == "auto":
            options["optimizer"] = OPTIMIZERS[self.model]
        options.setdefault("eval_every", math.ceil(options["epochs"] / EVALUATIONS))
        if options.get("method") == "full":
            del options["batches"]
        return options

    @cached_property
    def config(self) -> str:
        """Hash of all that decides the result, but for the seed."""
        options = {key: value for key, value in self.options.items() if key != "seed"}
        what = [self.dataset, self.method, sorted(options.items())]
        if options.get("method") in ("vq", "gas", "lmc"):
            what.append(STATES.get(self.model, STATES[""]))
        codes_of_both = options.get("method") == "vq" and self.model != "gat" and options.get("grad") != "off"
        if codes_of_both and ",e=" not in options["codec"]:
            what.append(GRADIENTS)
        of_inputs = self.model == "gat" and options.get("attention_state") != "projected"
        if of_inputs and options.get("method") in ("vq", "lmc") and options.get("grad") != "off":
            what.append(PENDING)
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        words = (self.dataset, self.model, self.method, f"lr{self.lr:g}", *(f"{k}={v}" for k, v in self.changes))
        return "-".join([*filter(None, words), f"seed{self.seed}"])


Cell = tuple[str, str, str]  # data set, model ("" where the method ignores it), method


def cells(datasets: Iterable[str], models: Iterable[str], methods: Iterable[str]) -> Iterator[Cell]:
    for dataset in datasets:
        for method in methods:
            what = METHODS[method]
            if dataset in what.lacks:
                continue
            for model in [""] if what.shared else models:
                if not model or model in what.models:
                    yield dataset, model, method


def seeds_of(cell: Cell) -> int:
    """How many seeds a cell is to have."""
    dataset, _, method = cell
    setting = SETTINGS[dataset]
    return setting.seeds if method in ("full", "vq") else setting.peer_seeds or setting.seeds


def trials(cell: Cell) -> list[Run]:
    """The runs among which validation accuracy chooses a cell's step size, at seed 0."""
    dataset, model, method = cell
    sizes = METHODS[method].step_sizes or SETTINGS[dataset].step_sizes.get(model, STEP_SIZES)
    return [Run(*cell, 0, lr) for lr in sizes]


# The ablations of Ding et al., appendix G, and ours: what is changed of "vq" on one data set, and its values.
ABLATION_DATASET, ABLATION_MODEL, ABLATION_LR = "amazon-computers", "gcn", 0.01
ABLATION_BASE = (("epochs", 40),)
ABLATIONS: dict[str, list[tuple[str, tuple[tuple[str, Any], ...]]]] = {
    "layers": [(str(n), (("layers", n),)) for n in (1, 2, 3, 4, 5)],
    "codewords K": [(str(k), (("codec", f"pq:d=4,k={k}"),)) for k in (64, 256, 1024, 4096)],
    "gradient coordinates a branch e": [
        ("1", ()), ("2", (("codec", "pq:d=4,k=256,e=2"),)), ("4: its channels", (("codec", "pq:d=4,k=256,e=4"),)),
    ],
    "channels a branch d": [(str(d), (("codec", f"pq:d={d},k=256"),)) for d in (2, 4, 8)],
    "batches an epoch": [(f"{n} ({100 / n:.0f} %)", (("batches", n),)) for n in (20, 10, 5, 2)],
    "sampler": [
        *((name, (("sampler", name),)) for name in ("node", "cluster", "edge", "walk")),
        ("edge, no gradients", (("sampler", "edge"), ("grad", "off"))),
    ],
    "whitening": [("on", ()), ("off", (("whiten", False),))],
    "gradient codewords": [("on", ()), ("off", (("grad", "off"),))],
    "averaged weights": [("on", ()), ("off", (("average", 0.0),))],
    "step size": [("cosine", ()), ("constant", (("schedule", "constant"),)), ("warm-up", (("warmup_epochs", 5.0),))],
    "model": [
        ("BatchNorm, residual", ()),
        ("BatchNorm", (("residual", False),)),
        ("LayerNorm, residual", (("norm", "layer"),)),
        ("LayerNorm", (("norm", "layer"), ("residual", False))),
        ("no norm, residual", (("norm", "none"),)),
    ],
    "BatchNorm statistics": [("running", ()), ("exact pass", (("norms", "exact"),))],
    "constant step size, BatchNorm": [
        ("averaged", (("schedule", "constant"),)),
        ("last weights", (("average", 0.0), ("schedule", "constant"))),
        (
            "last weights, statistics of an exact pass",
            (("average", 0.0), ("norms", "exact"), ("schedule", "constant")),
        ),
    ],
    "optimizer": [
        ("RMSprop", ()),
        ("Adam", (("optimizer", "adam"),)),
        ("Adam, no gradients", (("optimizer", "adam"), ("grad", "off"))),
    ],
    "input layer": [("C X, exact", ()), ("codes", (("input", "codes"),))],
    "store": [
        ("vq, 32 bytes", ()),
        ("gas fp32", (("method", "gas"), ("codec", "fp32"))),
        ("gas int4", (("method", "gas"), ("codec", "int4"))),
        ("lmc fp32", (("method", "lmc"), ("codec", "fp32"))),
        ("lmc int4", (("method", "lmc"), ("codec", "int4"))),
    ],
    "exact sweep of the store": [("never", ()), ("every epoch", (("refresh_every", 1),))],
    "inference": [("exact", ()), ("codes, layer by layer", (("inference", "vq"),)),
                  ("codes of training", (("inference", "stale"),))],
}  # fmt: skip


def ablation(changes: tuple[tuple[str, Any], ...], seed: int = 0) -> Run:
    return Run(ABLATION_DATASET, ABLATION_MODEL, "vq", seed, ABLATION_LR, ABLATION_BASE + changes)


class Timed(NamedTuple):
    """A schedule, and at how many seeds its epochs to an accuracy are counted."""

    method: str
    lr: float = 0.01
    changes: tuple[tuple[str, Any], ...] = ()
    seeds: int = 1


def _short(method: str, *changes: tuple[str, Any], seeds: int = 3) -> Timed:
    return Timed(method, changes=(("batches", 20), *changes, ("epochs", 15)), seeds=seeds)


# What is timed to the accuracy of full batch: of a short run of it, by ours and others with schedules as short as get
# there (ten epochs are too few for all but "vq"), and of one that has converged.
TIMED_DATASET, TIMED_MODEL, TIMED_SHARE = "ogbn-arxiv-ranks35", "sage", 0.99
TIMED_GOALS = ("full batch, 100 epochs", "full batch")
_THIRTY = (("epochs", 30),)
TIMED = {
    "full batch": Timed("full", seeds=3),
    "full batch, 100 epochs": Timed("full", changes=(("epochs", 100),), seeds=3),
    "GraphSAINT-RW (PyG)": Timed("saint-rw"),
    "GraphSAINT-RW (PyG), not normalised": Timed("saint-rw-plain"),
    "Cluster-GCN (PyG)": Timed("cluster-gcn"),
    "GAS": Timed("gas"),
    "ours: vq": Timed("vq", seeds=3),
    "ours: vq, d = 2": Timed("vq-fine"),
    "ours: rows and gradients in int4": Timed("lmc-node", changes=(("codec", "int4"),)),
    "ours: rows and gradients in fp32": Timed("lmc-node"),
    "GraphSAINT-RW (PyG), 30 epochs": Timed("saint-rw", changes=_THIRTY),
    "GraphSAINT-RW (PyG), step size 0.003, 30 epochs": Timed("saint-rw", 0.003, _THIRTY),
    "GraphSAINT-RW (PyG), not normalised, 30 epochs": Timed("saint-rw-plain", changes=_THIRTY),
    "GraphSAINT-RW (PyG), not normalised, step size 0.003, 30 epochs": Timed("saint-rw-plain", 0.003, _THIRTY),
    "Cluster-GCN (PyG), 30 epochs": Timed("cluster-gcn", changes=_THIRTY),
    "GAS, 30 epochs": Timed("gas", changes=_THIRTY),
    "ours: vq, 30 epochs": Timed("vq", changes=_THIRTY),
    "ours: vq, Adam, 30 epochs": Timed("vq-adam", changes=_THIRTY),
    **{
        f"{label}, 20 batches an epoch, 15 epochs": schedule
        for label, schedule in {
            "GraphSAINT-RW (PyG), not normalised": _short("saint-rw-plain"),
            "Cluster-GCN (PyG)": _short("cluster-gcn", seeds=1),
            "GAS": _short("gas", seeds=1),
            "ours: vq": _short("vq"),
            "ours: vq, no gradients": _short("vq-forward"),
            "ours: vq, no gradients, K = 64": _short("vq-forward", ("codec", "pq:d=4,k=64")),
            "ours: vq, no gradients, Adam": _short("vq-adam", ("grad", "off")),
            "ours: int4 rows": _short("vq-adam", ("codec", "int4"), ("method", "gas")),
        }.items()
    },
}  # fmt: skip


def timed(label: str, seed: int = 0) -> Run:
    what = TIMED[label]
    return Run(TIMED_DATASET, TIMED_MODEL, what.method, seed, what.lr, what.changes)


# GCN of these has its memory measured on every data set.
MEASURED = ("full", "vq", "gas", "cluster-gcn", "saint-rw")


def measured(datasets: Iterable[str], models: Iterable[str], methods: Iterable[str]) -> list[Cell]:
    """Of these, the cells whose memory is measured: on the data set that is timed all but variants."""
    datasets, models, methods = set(datasets), set(models), set(methods)
    trained = [name for name, method in METHODS.items() if not (method.variant or method.shared)]
    wanted = [*cells(SETTINGS, ["gcn"], MEASURED), *cells([TIMED_DATASET], MODELS, trained)]
    return [c for c in dict.fromkeys(wanted) if c[0] in datasets and c[1] in models and c[2] in methods]


def brief(cell: Cell) -> Run:
    """Epochs enough to know the most memory that training and evaluation take."""
    return replace(trials(cell)[0], changes=(("epochs", 2), ("eval_every", 1)))


def pace(run: Run) -> Run:
    """The run that stands for all whose epochs do the same work: neither their number nor the step size change it."""
    return replace(run, seed=0, lr=0.01, changes=tuple(change for change in run.changes if change[0] != "epochs"))
