"""The rows of finished runs: benchmarks/results/accuracy.csv, one a run, and the courses of some of them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from settings import METHODS, MODELS, SETTINGS, TIMED, Cell, Run, brief, measured, timed, trials

from vqgnn.files import atomic_write

FOLDER = Path(__file__).resolve().parents[1] / "results"
ROWS, CURVES = FOLDER / "accuracy.csv", FOLDER / "accuracy_curves.csv"
SECONDS, MEMORY = FOLDER / "accuracy_seconds.csv", FOLDER / "accuracy_memory.csv"
COLUMNS = [
    *("dataset", "model", "method", "lr", "changes", "seed", "epochs", "best_epoch"),
    *("train", "val", "test", "stability", "seconds_epoch", "cpu_seconds_epoch", "cpu_seconds_best"),
    *("peak_mb", "state_bytes", "dense_bytes", "device", "config"),
]
CURVE_COLUMNS = ["config", "seed", "epoch", "cpu_seconds", "val", "test"]
SECONDS_COLUMNS = ["method", "changes", "cpu_seconds_epoch", "rounds", "device", "config"]
MEMORY_COLUMNS = ["dataset", "model", "method", "peak_mb", "device", "config"]
Rows = dict[tuple[str, int], dict[str, str]]  # by (config, seed)


def read() -> Rows:
    """A repeated run's last row counts."""
    return {(row["config"], int(row["seed"])): row for row in _read(ROWS)}


def read_curves() -> dict[tuple[str, int], list[dict[str, float]]]:
    """[epoch, CPU seconds of training so far, val, test] by (config, seed)."""
    curves: dict[tuple[str, int], list[dict[str, float]]] = {}
    for row in _read(CURVES):
        points = curves.setdefault((row["config"], int(row["seed"])), [])
        point = {key: float(row[key]) for key in CURVE_COLUMNS[2:]}
        if points and point["epoch"] <= points[-1]["epoch"]:  # the run was repeated
            points.clear()
        points.append(point)
    return curves


def read_seconds() -> dict[str, dict[str, str]]:
    """What an epoch of a timed run takes, where all took turns, by the configuration of its `pace`."""
    return {row["config"]: row for row in _read(SECONDS)}


def write_seconds(runs: list[Run], seconds: list[float], rounds: int, device: str) -> None:
    """In place of what was there: numbers of one pass over all are comparable, those of several are not."""
    rows = (
        {"method": run.method, "changes": changes_of(run), "cpu_seconds_epoch": round(value, 4), "rounds": rounds,
         "device": device, "config": run.config}
        for run, value in zip(runs, seconds, strict=True)
    )  # fmt: skip
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, SECONDS_COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(SECONDS) as handle:
        handle.write(text.getvalue().encode())


def read_memory() -> dict[Cell, float]:
    """Most MB above the data in training and evaluation, of what `brief` makes of a cell."""
    known = {row["config"]: float(row["peak_mb"]) for row in _read(MEMORY) if row["peak_mb"]}
    configs = {cell: brief(cell).config for cell in measured(SETTINGS, MODELS, METHODS)}
    return {cell: known[config] for cell, config in configs.items() if config in known}


def append_memory(run: Run, row: dict) -> None:
    about = {"dataset": run.dataset, "model": run.model, "method": run.method, "config": run.config}
    _append(MEMORY, MEMORY_COLUMNS, [about | {key: row[key] for key in ("peak_mb", "device")}])


def changes_of(run: Run) -> str:
    return ";".join(f"{key}={value}" for key, value in run.changes)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def on_gpu(row: dict) -> bool:
    """Its accuracies count as any row's; its seconds and its memory are another machine's."""
    return not row["device"].endswith("threads")


def append(run: Run, row: dict, curve: list[dict]) -> None:
    """Add a finished run; its course too, if it is one of those that are timed."""
    about = {"dataset": run.dataset, "model": run.model, "method": run.method, "seed": run.seed, "config": run.config}
    about["lr"], about["epochs"] = f"{run.lr:g}", run.options["epochs"]
    about["changes"] = changes_of(run)
    _append(ROWS, COLUMNS, [about | row])
    if run.config in {timed(label).config for label in TIMED} and not on_gpu(row):
        _append(CURVES, CURVE_COLUMNS, [{"config": run.config, "seed": run.seed, **point} for point in curve])


def _append(path: Path, columns: list[str], rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def chosen(cell: Cell, rows: Rows) -> Run | None:
    """The trial that validates best in the mean of the seeds that all trials have; None where there is no such seed."""
    found = trials(cell)
    seeds = [seed for seed in range(SETTINGS[cell[0]].tuning_seeds) if all((run.config, seed) in rows for run in found)]
    if not seeds:
        return None
    return max(found, key=lambda run: sum(float(rows[run.config, seed]["val"]) for seed in seeds))
