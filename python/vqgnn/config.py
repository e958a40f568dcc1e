"""The settings of a training run: every default, its range and its help text, once."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

_RANDOM, _LEARNED = "random:", "learned:"
_METRICS = {"node": ("auto", "auc"), "link": ("auto", "hits", "mrr", "recall")}
BEFORE = {"residual": False}  # of runs that are older than an option: what it was then, where not its default
ATTENTIONS = ("gat", "gatv2", "transformer", "hybrid")  # the models with heads


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to do."""


def option(default: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata={"help": text, "min": low, "max": high})


@dataclass(frozen=True)
class Config:
    """Settings of `vqgnn train`; the command line's options are made from these fields."""

    dataset: str = option(
        "generated", "Graph: 'generated[:nodes=N,edges=E,...]', an .npz file, a graph folder, 'cora', ..."
    )
    split: int = option(0, "Which split, where the data set has several.", 0)
    directed: bool = option(False, "Keep the edges' directions instead of making the graph undirected.")
    features: str | None = option(
        None,
        "Use only these feature columns, FROM:TO, e.g. 80:200; or random:D, D fixed random numbers a node; or "
        "learned:D, an embedding of D numbers a node that is learnt with the model.",
    )
    task: Literal["node", "link"] = option(
        "node", "Classify nodes, or predict edges: batches are the end points of edges and of pairs drawn at random."
    )
    links: str | None = option(
        None, "--task link: .npz file of the edges to predict. [default: 85/5/10 % of the edges at random, by --split]"
    )
    hits: int = option(50, "--task link: K of the score Hits@K.", 1)
    head: Literal["dot", "mlp"] = option("dot", "--task link: a pair's score is an inner product, or an MLP's.")
    inductive: bool = option(
        False, "Train on the training nodes and the edges between them alone, validate without the test nodes."
    )
    metric: Literal["auto", "auc", "hits", "mrr", "recall"] = option(
        "auto",
        "Score: accuracy, with several labels micro-F1; or the area under the ROC curve. --task link: Hits@K, of a "
        "recommender Recall@20; or the mean reciprocal rank.",
    )
    model: Literal["gcn", "sage", "gin", "gat", "gatv2", "transformer", "hybrid", "cheb", "mlp"] = option(
        "gcn",
        "Model; 'hybrid' is GAT beside attention to all nodes' codewords, 'cheb' has polynomials of 3 terms, 'mlp' "
        "ignores the graph.",
    )
    method: Literal["vq", "gas", "lmc", "drop", "full"] = option(
        "vq",
        "What a batch knows of the nodes outside it: codes, rows, rows and gradients, nothing; or the whole graph.",
    )
    codec: str | None = option(
        None,
        "How node states are kept: pq:d=D,k=K (codes of D channels; ,e=E: of E coordinates of gradients), fp32, fp16, "
        "int8, int4. [default: method's]",
    )
    input: Literal["auto", "precompute", "rows", "codes"] = option("auto", "How the first layer reads the features.")
    grad: Literal["auto", "on", "off"] = option(
        "auto",
        "Whether gradients of nodes outside a batch are kept and added; 'auto': as method and conv want, not by vq for "
        "--task link.",
    )
    whiten: bool = option(True, "Whether codebooks whiten channels before the search for the nearest codeword.")
    refresh_every: int = option(0, "Epochs between exact sweeps that write all node states anew; 0: none.", 0)
    place: Literal["auto", "device", "host", "disk", "pinned"] = option(
        "auto",
        "Where node states lie: the device's memory, RAM beside a GPU, files; 'auto': the first with twice the room; "
        "'pinned': RAM that the GPU reads in place.",
    )
    sampler: Literal["node", "cluster", "edge", "walk"] = option(
        "node", "Batches of random nodes, METIS clusters, end points of random edges, or random walks."
    )
    batch_size: int | None = option(
        None, "Nodes a batch; --task link: end points of pairs. [default: a tenth of the nodes]", 1
    )
    parts: str | None = option(None, "P/Q: batches of Q out of P METIS clusters; implies --sampler cluster.")
    hidden: int = option(128, "Channels of the hidden layers.", 1)
    layers: int = option(3, "Layers.", 1)
    heads: int = option(4, "Attention heads of gat, gatv2, transformer and hybrid, which share the hidden channels.", 1)
    lipschitz: float | None = option(
        None,
        "Models gat, gatv2 and hybrid: bound of how fast attention scores change with a node's row. [default: none]",
        0,
    )
    attention_state: Literal["input", "projected"] | None = option(
        None,
        "What is kept for an attention: its input (the more accurate), or what it tells neighbours (the leaner). "
        "[default: input]",
    )
    norm: Literal["batch", "layer", "none"] = option("batch", "Normalisation after every hidden layer.")
    residual: bool | None = option(
        None,
        "Add a linear map of each layer's input to its output, where the model's layers have none of their own. "
        "[default: with --task node]",
    )
    dropout: float = option(0.3, "Dropout after every hidden layer.", 0, 1)
    attention_dropout: float = option(0.0, "Dropout of attention weights; states that carry it train badly.", 0, 1)
    edge_dropout: float = option(
        0.0, "Share of a training batch's edges that are dropped, others in every epoch.", 0, 1
    )
    optimizer: Literal["rmsprop", "adam"] = option("rmsprop", "Optimizer; RMSprop is VQ-GNN's choice, too.")
    lr: float | None = option(None, "The optimizer's step size. [default: 0.01; models with attention: 0.003]", 0)
    schedule: Literal["cosine", "constant"] = option("cosine", "Course of the step size after the warm-up.")
    warmup_epochs: float = option(0.0, "Epochs over which the step size rises linearly.", 0)
    weight_decay: float = option(0.0, "The optimizer's weight decay.", 0)
    average: float = option(
        0.98, "Decay a step of the averaged weights that are evaluated; 0: the weights as is.", 0, 1
    )
    epochs: int = option(40, "Passes over the nodes; with --method full a pass is one step.", 1)
    eval_every: int = option(1, "Epochs between evaluations.", 1)
    inference: Literal["exact", "vq", "stale"] = option(
        "exact", "Neighbours' states in these evaluations: exact, codes refreshed layer by layer, or the stores'."
    )
    norms: Literal["auto", "running", "exact"] = option(
        "auto",
        "BatchNorm's statistics there: averages over batches, or of one exact pass over all nodes; 'auto': exact for "
        "hybrid, whose means move with its codewords.",
    )
    seed: int = option(0, "Decides first weights, batches, dropout and codebooks.", 0, 2**63 - 1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where to train; 'auto' is the GPU where there is one.")
    threads: int | None = option(None, "Threads to compute with. [default: torch's choice]", 1)

    def __post_init__(self):
        for f in fields(self):
            value, name, low, high = getattr(self, f.name), option_name(f.name), f.metadata["min"], f.metadata["max"]
            choices = get_args(f.type) if isinstance(f.default, str) else ()
            if choices and value not in choices:
                raise InputError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")
            fits = value is None or ((low is None or value >= low) and (high is None or value <= high))
            if not fits:
                raise InputError(f"{name} {value} is not allowed; it must be {_range(low, high)}")
        for name in ("dropout", "attention_dropout", "edge_dropout"):
            if getattr(self, name) == 1:
                raise InputError(f"{option_name(name)} 1.0 would drop everything; it must be below 1")
        attention = self.model in ATTENTIONS
        if self.lr is None:
            object.__setattr__(self, "lr", 0.003 if attention else 0.01)
        if attention and self.hidden % self.heads:
            raise InputError(f"--heads {self.heads} must divide --hidden {self.hidden}; set --hidden {self.heads * 32}")
        if self.lipschitz is not None and (self.model not in ("gat", "gatv2", "hybrid") or self.lipschitz <= 0):
            raise InputError(
                f"--lipschitz {self.lipschitz} is for --model gat, gatv2 or hybrid, and must be above 0; leave it out"
            )
        if self.attention_dropout and not attention:
            raise InputError(
                f"--attention-dropout {self.attention_dropout} is for --model {', '.join(ATTENTIONS)}; leave it out"
            )
        if self.edge_dropout and self.model in ("mlp", "cheb"):
            raise InputError(f"--edge-dropout {self.edge_dropout} is not for --model {self.model}; leave it out")
        self._check_features()
        num_parts, _ = self.parts_pair()
        if num_parts is not None:
            if self.batch_size is not None:
                raise InputError(f"--batch-size {self.batch_size} and --parts {self.parts} exclude each other")
            if self.sampler not in ("node", "cluster"):
                raise InputError(f"--sampler {self.sampler} and --parts {self.parts} exclude each other")
            object.__setattr__(self, "sampler", "cluster")
        kept = self.method in ("vq", "gas", "lmc") and self.model != "mlp"  # whether there are node states
        needs_codes = "" if self.method == "vq" and kept else "method vq, which has codebooks"
        needs_states = "" if kept else "methods vq, gas and lmc, which keep node states"
        for name, wants in (("whiten", needs_codes), ("refresh_every", needs_states)):
            if wants and getattr(self, name) != getattr(Config, name):
                raise InputError(f"{option_name(name)} {getattr(self, name)} is for {wants}; leave it out")
        if wants := {"exact": "", "vq": needs_codes, "stale": needs_states}[self.inference]:
            raise InputError(f"--inference {self.inference} is for {wants}; use exact")
        if self.task == "link":
            for name, plain in (("sampler", "node"), ("inductive", False)):
                if getattr(self, name) != plain:
                    raise InputError(f"{option_name(name)} {getattr(self, name)} is not for --task link; leave it out")
        if self.metric not in _METRICS[self.task]:
            raise InputError(
                f"--metric {self.metric} is not for --task {self.task}; use one of {', '.join(_METRICS[self.task])}"
            )
        if self.task == "node" and self.links is not None:
            raise InputError(f"--links {self.links} is for --task link only; leave it out, or give --task link")

    @property
    def whole(self) -> bool:
        """Whether a batch is the whole graph."""
        return self.method == "full" and self.model != "mlp"

    @property
    def learned(self) -> bool:
        """Whether the features are learnt."""
        return self.features is not None and self.features.startswith(_LEARNED)

    @property
    def random_width(self) -> int | None:
        """D of `features` "random:D" or "learned:D": for a graph that has none."""
        if self.features is None or not self.features.startswith((_RANDOM, _LEARNED)):
            return None
        return int(self.features.partition(":")[2])

    def columns(self) -> slice | None:
        """`features` as a slice."""
        if self.features is None or self.features.startswith((_RANDOM, _LEARNED)):
            return None
        low, high = _two_ints("--features", self.features, ":", "FROM:TO with 0 <= FROM < TO, e.g. 80:200")
        if not 0 <= low < high:
            raise InputError(f"--features {self.features!r} is empty; it must be FROM:TO with 0 <= FROM < TO")
        return slice(low, high)

    def _check_features(self) -> None:
        if self.columns() is None and self.features is not None:
            kind, _, width = self.features.partition(":")
            if not width.isdecimal() or int(width) < 1:
                raise InputError(f"--features {self.features!r} cannot be read; it must be {kind}:D with D >= 1")
        for name, clashes in (("inductive", self.inductive), ("model", self.model == "mlp")):
            if self.learned and clashes:
                raise InputError(
                    f"--features {self.features} and {option_name(name)} {getattr(self, name)} exclude each other: "
                    "an embedding is of a node that training knows, and a GNN's input"
                )

    def parts_pair(self) -> tuple[int | None, int]:
        """`parts` as (number of parts, parts a batch)."""
        if self.parts is None:
            return None, 1
        total, joined = _two_ints("--parts", self.parts, "/", "P/Q with 1 <= Q <= P, e.g. 80/8")
        if not 1 <= joined <= total:
            raise InputError(f"--parts {self.parts!r} is not possible; it must be P/Q with 1 <= Q <= P")
        return total, joined

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Config":
        """The config of a run folder; an InputError when it is damaged or of another version."""
        try:
            values = BEFORE | json.loads(path.read_text())
            for f in fields(cls):
                if f.name in values and not _is_one(values[f.name], f.type):
                    raise TypeError(f"{f.name} is {values[f.name]!r}")
            return cls(**values)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; is {path.parent} a run folder?") from error
        except (TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no run's config ({error}); start a new run") from error


def _is_one(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a field's type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kinds := get_args(kind):
        return any(_is_one(value, of) for of in kinds)
    return type(value) is kind or (kind is float and type(value) is int)


def option_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _range(low: float | None, high: float | None) -> str:
    return f"at least {low}" if high is None else f"in {low}..{high}"


def _two_ints(name: str, text: str, separator: str, form: str) -> tuple[int, int]:
    first, _, second = text.partition(separator)
    try:
        return int(first), int(second)
    except ValueError:
        raise InputError(f"{name} {text!r} cannot be read; it must be {form}") from None
