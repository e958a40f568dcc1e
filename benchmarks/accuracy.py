"""The README's accuracy table: every method on every graph by the project's own trainer, resumable.

    python benchmarks/accuracy.py                      # run what is missing, one row a run in results/accuracy.csv
    python benchmarks/accuracy.py --dry-run            # say what is missing and about how long it takes
    python benchmarks/accuracy.py --render             # the table, in Markdown

Each run is `vqgnn train` in a process of its own. A row holds a hash of everything that decides its result, so a run
that is there already is skipped and one with other settings is run again. Runs go seed by seed: stopped early
(Ctrl-C, --minutes), the table is complete for fewer seeds.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from epoch_worker import shared_data

from vqgnn.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy.csv"
RUNS = ROOT / "runs" / "accuracy"
COLUMNS = [
    *("dataset", "model", "method", "sampler", "codec", "seed", "epochs", "best_val", "test"),
    *("train_seconds_epoch", "peak_mb", "state_bytes", "dense_bytes", "config"),
]
CODEC = "pq:d=4,k=256"
BATCHES = 10  # mini-batches of 10 % of the nodes


@dataclass(frozen=True)
class Setting:
    """One data set's hyper-parameters, the same for every method but for what counts steps.

    A mini-batch epoch makes ten steps and a full-batch epoch one: full batch gets more epochs, and averages its weights
    over fewer steps. `guess` is seconds an epoch of either on one core, for the estimate before anything is measured.
    """

    file: str
    lr: float
    dropout: float
    full_epochs: int
    batch_epochs: int
    seeds: int
    guess: float
    features: str = ""


SETTINGS = {
    "amazon-computers": Setting("amazon-computers", 0.01, 0.3, full_epochs=300, batch_epochs=240, seeds=3, guess=0.4),
    "debian-bookworm": Setting("debian-bookworm", 0.01, 0.5, full_epochs=500, batch_epochs=100, seeds=3, guess=1.0),
    "ogbn-arxiv-ranks35": Setting(
        "ogbn-arxiv-tape", 0.01, 0.3, full_epochs=100, batch_epochs=30, seeds=1, guess=3.0, features="80:200"
    ),
    "coauthor-physics": Setting("coauthor-physics", 0.003, 0.5, full_epochs=60, batch_epochs=30, seeds=3, guess=5.0),
}
AVERAGE = 0.98  # decay a step of the evaluated weights
EVALUATIONS = 40  # at most: a full-batch epoch is one step and need not be followed by an evaluation
VARIANTS = (("full", ""), ("vq", "node"), ("vq", "cluster"), ("drop", "node"), ("drop", "cluster"), ("mlp", ""))


@dataclass(frozen=True)
class Run:
    dataset: str
    model: str
    method: str
    sampler: str
    seed: int

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.dataset]

    @property
    def codec(self) -> str:
        return CODEC if self.method == "vq" else ""

    @property
    def epochs(self) -> int:
        return self.setting.full_epochs if self.method == "full" else self.setting.batch_epochs

    @property
    def options(self) -> dict[str, object]:
        """What `vqgnn train` is told, but for files and the batch size."""
        setting = self.setting
        options = {
            "model": "mlp" if self.method == "mlp" else self.model,
            "method": self.method,
            "codec": self.codec,
            "sampler": self.sampler,
            "features": setting.features,
            "hidden": 128,
            "layers": 3,
            "lr": setting.lr,
            "dropout": setting.dropout,
            "average": AVERAGE,
            "epochs": self.epochs,
            "eval-every": math.ceil(self.epochs / EVALUATIONS),
            "seed": self.seed,
        }
        if self.method == "mlp":
            del options["method"]
        return {key: value for key, value in options.items() if value != ""}

    @property
    def config(self) -> str:
        """Hash of all that decides the result."""
        what = [self.dataset, self.options] + [BATCHES] * (self.method != "full")
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        words = (self.dataset, self.model, self.method, self.sampler, f"seed{self.seed}", self.config)
        return "-".join(word for word in words if word)


def planned(datasets: list[str], models: list[str], methods: list[str], samplers: list[str], seeds: int) -> list[Run]:
    """Every run wanted, seed by seed; an MLP knows no graph and is run once a seed, not once a model."""
    return [
        Run(dataset, model, method, sampler, seed)
        for seed in range(seeds)
        for dataset in datasets
        for model in models
        for method, sampler in VARIANTS
        if seed < SETTINGS[dataset].seeds
        and method in methods
        and (not sampler or sampler in samplers)
        and (method != "mlp" or model == models[0])
    ]


def dataset_file(name: str) -> Path:
    """The `.npz` that `vqgnn train` reads. Coauthor counts become 0/1, as PyG has them, in a copy."""
    source = shared_data() / f"{SETTINGS[name].file}.npz"
    if not name.startswith("coauthor"):
        return source
    path = RUNS / "data" / f"{name}-binary.npz"
    if not path.exists():
        with np.load(source) as file:
            arrays = dict(file)
        arrays["x_data"] = (arrays["x_data"] > 0).astype(np.uint8)
        with atomic_write(path) as handle:
            np.savez_compressed(handle, **arrays)
    return path


def train(run: Run, threads: int) -> dict:
    """One run in a process of its own; its row."""
    data, folder = dataset_file(run.dataset), RUNS / run.name
    log_path = folder.with_suffix(".log")
    command = [sys.executable, "-m", "vqgnn.cli", "train", "--out", str(folder)]
    if (folder / "config.json").exists():  # interrupted
        command.append("--resume")
    else:
        command += ["--dataset", str(data), "--threads", str(threads)]
        command += [word for key, value in run.options.items() for word in (f"--{key}", str(value))]
        if run.method != "full":
            with np.load(data) as arrays:
                command += ["--batch-size", str(math.ceil(arrays["y"].shape[0] / BATCHES))]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("a") as log:
        done = subprocess.run(command, env=child_environment(threads), stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        last = log_path.read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"{run.name}: exit code {done.returncode}: {' '.join(last)}")
    return row_of(run, folder)


def child_environment(threads: int) -> dict[str, str]:
    """Runs import the package as this process does, and take the threads that they are given."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)}


def row_of(run: Run, folder: Path) -> dict:
    """A finished run folder as a row: validation picks the epoch, exact inference with averaged weights gives both."""
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "dataset": run.dataset,
        "model": run.model,
        "method": run.method,
        "sampler": run.sampler,
        "codec": run.codec,
        "seed": run.seed,
        "epochs": run.epochs,
        "best_val": round(summary["val_acc"], 5),
        "test": round(summary["test_acc"], 5),
        "train_seconds_epoch": round(summary["seconds_an_epoch"], 4),
        "peak_mb": round(summary["memory_above_data"] / 1e6),
        "state_bytes": summary["store_bytes"],
        "dense_bytes": summary["store_bytes_fp32"],
        "config": run.config,
    }


def read_rows(path: Path) -> dict[tuple[str, str], dict]:
    """Rows by (config, seed); a repeated run's last row counts."""
    if not path.exists():
        return {}
    with path.open(newline="") as handle:
        return {(row["config"], row["seed"]): row for row in csv.DictReader(handle)}


def append_row(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def estimate(run: Run, rows: list[dict]) -> float:
    """Seconds a run will take: from runs of its kind where there are any, else from the setting's guess.

    An evaluation costs about half a training epoch.
    """
    kind = (run.dataset, run.model, run.method)
    known = [float(r["train_seconds_epoch"]) for r in rows if (r["dataset"], r["model"], r["method"]) == kind]
    seconds = statistics.median(known) if known else run.setting.guess
    return (run.epochs + min(run.epochs, EVALUATIONS) / 2) * seconds


def run_all(runs: list[Run], jobs: int, threads: int, minutes: float) -> int:
    """Run, `jobs` at a time, and append each row as it comes; returns how many failed."""
    lock = threading.Lock()
    end = time.monotonic() + 60 * minutes
    failed = 0

    def one(run: Run) -> str:
        if time.monotonic() > end:
            return f"{run.name}: not started, --minutes {minutes:g} are over"
        began = time.monotonic()
        row = train(run, threads)
        with lock:
            append_row(RESULTS, row)
        return f"{run.name}: val {row['best_val']:.4f} test {row['test']:.4f} in {time.monotonic() - began:.0f} s"

    for name in sorted({run.dataset for run in runs}):
        dataset_file(name)
    with ThreadPoolExecutor(jobs) as pool:
        pending = [pool.submit(one, run) for run in runs]
        try:
            for number, job in enumerate(as_completed(pending), 1):
                error = job.exception()
                failed += error is not None
                print(f"[{number}/{len(runs)}] {error or job.result()}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def render(rows: list[dict], wanted: list[Run]) -> str:
    """The table: test accuracy in %, mean ± standard deviation over seeds, at the best validation epoch."""
    by_config = {(row["config"], int(row["seed"])): row for row in rows}

    def scores(dataset: str, model: str | None, method: str, sampler: str) -> list[float]:
        cell = (run for run in wanted if (run.dataset, run.method, run.sampler) == (dataset, method, sampler))
        found = (by_config.get((run.config, run.seed)) for run in cell if model in (None, run.model))
        return [100 * float(row["test"]) for row in found if row]

    def text(values: list[float]) -> str:
        if not values:
            return "-"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    def difference(values: list[float], full: list[float]) -> str:
        return f"{statistics.mean(values) - statistics.mean(full):+.2f}" if values and full else "-"

    head = ["data set", "model", *(", ".join(filter(None, variant)) for variant in VARIANTS), "vq - full", "seeds"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for dataset, model in dict.fromkeys((run.dataset, run.model) for run in wanted):
        cells = {variant: scores(dataset, None if variant[0] == "mlp" else model, *variant) for variant in VARIANTS}
        if not any(cells.values()):
            continue
        full = cells["full", ""]
        differences = [difference(cells["vq", sampler], full) for sampler in ("node", "cluster")]
        seeds = sorted({len(values) for values in cells.values() if values})
        columns = [dataset, model.upper(), *map(text, cells.values()), ", ".join(differences)]
        columns.append(str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]}-{seeds[-1]}")
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = list(dict.fromkeys(method for method, _ in VARIANTS))
    parser.add_argument("--datasets", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    parser.add_argument("--models", nargs="+", default=["gcn", "sage"], choices=("gcn", "sage"))
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--samplers", nargs="+", default=["node", "cluster"], choices=("node", "cluster"))
    parser.add_argument("--seeds", type=int, default=3, help="at most; a setting may have fewer")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    parser.add_argument("--dry-run", action="store_true", help="only say what is missing and the estimate")
    parser.add_argument("--render", action="store_true", help="print the table in Markdown and run nothing")
    args = parser.parse_args()

    runs = planned(args.datasets, args.models, args.methods, args.samplers, args.seeds)
    rows = read_rows(RESULTS)
    if args.render:
        print(render(list(rows.values()), runs))
        return 0
    missing = [run for run in runs if (run.config, str(run.seed)) not in rows]
    hours = sum(estimate(run, list(rows.values())) for run in missing) / args.jobs / 3600
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are there; {len(missing)} to do, about {hours:.1f} hours")
    if args.dry_run:
        for run in missing:
            print(f"  {run.name}: about {estimate(run, list(rows.values())):.0f} s")
        return 0
    return 1 if run_all(missing, args.jobs, args.threads, args.minutes) else 0


if __name__ == "__main__":
    sys.exit(main())
