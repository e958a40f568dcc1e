"""What a run looks like: curves.png, the final table, and a graph's statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import Config
from .files import atomic_write
from .memory import size
from .runs import Run

_METRICS = {
    "acc": "accuracy",
    "f1": "micro-F1",
    "auc": "ROC-AUC",
    "hits": "Hits@K",
    "mrr": "MRR",
    "recall": "Recall@20",
}


def curves(run: Run, path: Path | None = None) -> Path | None:
    """Loss, scores and codebook health over the epochs as a PNG; None without an epoch or without matplotlib."""
    metrics = run.metrics()
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not metrics:
        return None

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(m["epoch"], m[key]) for m in metrics if m.get(key) is not None]
        return [e for e, _ in points], [v for _, v in points]

    health = [key for key in ("relative_error_x", "relative_error_grad", "dead") if any(key in m for m in metrics)]
    figure = Figure(figsize=(12 if health else 8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if health else 2)
    axes[0].plot(*series("loss"), color="black")
    axes[0].set_title("training loss")
    for key in sorted({k for m in metrics for k in m if k.startswith(("train_", "val_", "test_"))}):
        axes[1].plot(*series(key), label=key.replace("_", " "))
    axes[1].set_title("exact inference, averaged weights")
    for key in health:
        axes[2].plot(*series(key), label=key.replace("_", " "))
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis is not axes[0]:
            axis.legend()
    if health:
        axes[2].set_title("codebooks (worst layer)")
        axes[2].set_ylim(bottom=0)
    path = path or run.path / "curves.png"
    with atomic_write(path) as handle:
        figure.savefig(handle, format="png", dpi=110)
    return path


def table(summary: dict[str, Any]) -> str:
    """The final table of a run."""
    rows = []
    for key, value in summary.items():
        if key.partition("_")[0] in ("train", "val", "test"):
            split, _, metric = key.partition("_")
            rows.append((f"{split} {_METRICS.get(metric, metric)}", f"{value:.4f}"))
    rows.append(("best validation epoch", f"{summary['best_epoch']} of {summary['epochs']}"))
    rows.append(("time an epoch (median)", f"{summary['seconds_an_epoch']:.2f} s"))
    if "memory_peak" in summary:
        above = {key: size(summary[f"memory_{key}"]) for key in ("setup", "training", "evaluation")}
        parts = ", ".join(f"{key} {value}" for key, value in above.items())
        where = " of the GPU" if summary.get("memory_device") == "cuda" else ""
        rows.append((f"peak memory{where}", f"{size(summary['memory_peak'])}; above the data: {parts}"))
    if "seconds_by_phase" in summary:
        rows.append(("time by phase", ", ".join(f"{k} {v:.0f} s" for k, v in summary["seconds_by_phase"].items())))
    if summary.get("disk_traffic"):
        read, written = summary["disk_traffic"]
        rows.append(("disk, this process", f"read {size(read)}, written {size(written)}"))
    if summary["store_bytes"]:
        share = summary["store_bytes_fp32"] / summary["store_bytes"]
        dense = size(summary["store_bytes_fp32"])
        rows.append(("node state", f"{size(summary['store_bytes'])}, fp32 histories {dense} ({share:.1f}x)"))
    return aligned(rows)


def graph_statistics(dataset, config: Config) -> str:
    """A graph's statistics and the memory each method would need, before anything is trained."""
    import torch

    from .disk_graph import MappedData

    data, n = dataset.data, dataset.data.num_nodes
    degree, out_degree = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    known = same = 0
    for source, target in data.edge_chunks() if isinstance(data, MappedData) else [data.edge_index]:
        degree += torch.bincount(target, minlength=n)
        out_degree += torch.bincount(source, minlength=n)
        if not dataset.multilabel:
            first, second = data.y[source], data.y[target]
            known += int(((first >= 0) & (second >= 0)).sum())
            same += int(((first == second) & (first >= 0)).sum())
    counts = [int(data[f"{split}_mask"].sum()) for split in ("train", "val", "test")]
    rows = [
        ("nodes", f"{n:,}"),
        ("edges (both directions)" if not config.directed else "edges (directed)", f"{data.num_edges:,}"),
        ("degree", f"mean {data.num_edges / n:.1f}, median {int(degree.median())}, max {int(degree.max()):,}"),
        ("isolated nodes", f"{int(((degree == 0) & (out_degree == 0)).sum()):,}"),
        ("features", f"{data.num_features:,} ({size(data.x.nbytes)} as fp32)"),
        ("classes", f"{dataset.num_classes}{', several a node' if dataset.multilabel else ''}"),
        ("train / val / test nodes", " / ".join(f"{c:,}" for c in counts)),
    ]
    if not dataset.multilabel:
        share = same / known if known else float("nan")
        rows.append(("homophily", f"{share:.3f} of the edges join equal labels"))
    return aligned(rows) + "\n\n" + aligned(_memory_estimate(dataset, config))


def _memory_estimate(dataset, config: Config) -> list[tuple[str, ...]]:
    """Bytes of node state and of activations for a GNN of the config's size, method by method.

    Activations: a layer keeps its input, its messages, and the results of linear map, norm, ReLU and dropout for
    backward, all [nodes of the batch, hidden] fp32. The input layer reads the features, so it has no state unless
    they are learnt.
    """
    from .conversion import METHODS
    from .places import choose
    from .train import pick_device, state_bytes

    device = pick_device("auto")
    n, hidden_layers, tensors = dataset.data.num_nodes, config.layers - (0 if config.learned else 1), 6
    nodes = config.batch_size or -(-n // 10)
    activations = 4 * config.hidden * tensors * config.layers
    title = f"memory, {config.layers} layers of {config.hidden}"
    rows = [(title, "node state", "activations of a batch", "a batch", "--place auto")]
    for method in ("vq", "lmc", "gas"):
        for text in [METHODS[method][0]] if method == "vq" else ["fp32", "fp16", "int8", "int4"]:
            state = state_bytes(config, n, method, text) * hidden_layers
            place = "{}: {}".format(*choose(state, device))
            rows.append((f"  {method} {text}", size(state), size(nodes * activations), f"{nodes:,} nodes", place))
    rows.append(("  drop", "0", size(nodes * activations), f"{nodes:,} nodes", ""))
    rows.append(("  full", "0", size(n * activations), f"{n:,} nodes", ""))
    return rows


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows of text in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
