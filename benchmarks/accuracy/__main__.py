"""The papers' tables on real graphs: every method by one harness, resumable.

    python benchmarks/accuracy run                     # what is missing of all tables
    python benchmarks/accuracy run --dry-run           # how much is missing, and about how long it takes
    python benchmarks/accuracy render                  # docs/results.md, its plots, and README's tables

Every run has a hash of all that decides its result, and one row in results/accuracy.csv: a run that is there is not
made again, one with other settings is. Each method of a data set and model has the same tuning budget: its step sizes
at seed 0 (cora and pubmed: at all), of which the better by validation accuracy is run for the other seeds. Runs go
seed by seed, so that the table is complete for fewer seeds when it is stopped (Ctrl-C, --minutes). At last an epoch of
each method that is timed to an accuracy is timed beside the others, once: results/accuracy_seconds.csv has them; and
the memory of two epochs is measured: results/accuracy_memory.csv. Delete these for the seconds and bytes of newer code.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

import results
from settings import (
    ABLATIONS,
    METHODS,
    MODELS,
    SETTINGS,
    TIMED,
    Cell,
    Run,
    ablation,
    brief,
    cells,
    measured,
    pace,
    seeds_of,
    timed,
    trials,
)

TABLES = ("main", "timed", "memory", "ablations")
ROUNDS = 5  # epochs of each method that are timed side by side
# The guess, times the setting's seconds.
_SLOW = {"ns-sage": 8.0, "lmc": 1.5, "lmc-mixed": 4.0, "saint-rw": 1.5, "vq-paper": 2.0}


def wanted(table: list[Cell], seed: int, rows: results.Rows) -> list[Run]:
    """The runs of a seed: the trials as long as step sizes are compared, afterwards what they chose."""
    runs = []
    for cell in table:
        if seed < SETTINGS[cell[0]].tuning_seeds:
            runs += [replace(run, seed=seed) for run in trials(cell)]
        elif seed < seeds_of(cell) and (best := results.chosen(cell, rows)):
            runs.append(replace(best, seed=seed))
    return runs


def ablations(names: Iterable[str], seeds: int) -> list[Run]:
    """What the ablations need; settings that several tables share are run once."""
    runs = [ablation(changes, seed) for seed in range(seeds) for name in names for _, changes in ABLATIONS[name]]
    return list({(run.config, run.seed): run for run in runs}.values())


def estimate(run: Run, rows: results.Rows) -> float:
    """CPU seconds: from runs of its kind on a CPU, where there are any. An evaluation costs about half an epoch."""
    kind = (run.dataset, run.model, run.method)
    known = [r for r in rows.values() if (r["dataset"], r["model"], r["method"]) == kind and not results.on_gpu(r)]
    known = [float(row["seconds_epoch"]) for row in known]
    guess = run.setting.guess * _SLOW.get(run.method, 1.0) * (2.5 if run.model == "gat" else 1.0)
    epochs = run.options["epochs"]
    return (epochs + epochs / run.options["eval_every"] / 2) * (statistics.median(known) if known else guess)


def execute(run: Run, threads: int, device: str) -> tuple[dict, list[dict]]:
    """In a process of its own, forked from one that has everything imported: its memory is its own.

    With CUDA a new one: a fork cannot use it where the server has looked for a device.
    """
    import worker

    context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=worker.in_child, args=(run, threads, device, sender), daemon=True)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = "the process died"
    process.join()
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


def run_all(runs: list[Run], jobs: int, threads: int, device: str, end: float) -> int:
    """Run, `jobs` at a time, and append each row as it comes; returns how many failed."""
    lock, failed = threading.Lock(), 0

    def one(run: Run) -> str:
        if time.monotonic() > end:
            return f"{run.name}: not started, --minutes are over"
        began = time.monotonic()
        row, curve = execute(run, threads, device)
        with lock:
            results.append(run, row, curve)
        return f"{run.name}: val {row['val']:.4f} test {row['test']:.4f} in {time.monotonic() - began:.0f} s"

    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(one, run): run for run in runs}
        try:
            for number, job in enumerate(as_completed(pending), 1):
                error = job.exception()
                failed += error is not None
                text = f"{pending[job].name}: {error}" if error else job.result()
                print(f"[{number}/{len(runs)}] {text}", flush=True)
        except (KeyboardInterrupt, SystemExit):
            for child in multiprocessing.active_children():
                child.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def run(args: argparse.Namespace) -> int:
    table = list(cells(args.datasets, args.models, args.methods)) if "main" in args.tables else []
    end, failed = time.monotonic() + 60 * args.minutes, 0
    for seed in range(args.seeds):
        rows = results.read()
        runs = wanted(table, seed, rows)
        if "timed" in args.tables:
            runs += [timed(label, seed) for label, schedule in TIMED.items() if seed < schedule.seeds]
        if seed < args.ablation_seeds and "ablations" in args.tables:
            runs += [run for run in ablations(args.ablations, args.ablation_seeds) if run.seed == seed]
        missing = list({(r.config, r.seed): r for r in runs if (r.config, r.seed) not in rows}.values())
        hours = sum(estimate(run, rows) for run in missing) / args.jobs / 3600
        print(f"seed {seed}: {len(runs) - len(missing)} runs are there; {len(missing)} to do, about {hours:.1f} hours")
        if args.dry_run:
            for run in missing:
                print(f"  {run.name}: about {estimate(run, rows):.0f} s")
        else:
            failed += run_all(missing, args.jobs, args.threads, args.device, end)
    if "timed" in args.tables and time.monotonic() < end:
        take_time(args.threads, args.dry_run)
    if "memory" in args.tables:
        failed += take_memory(measured(args.datasets, args.models, args.methods), args.threads, args.dry_run, end)
    return 1 if failed else 0


def take_time(threads: int, dry: bool) -> None:
    """CPU seconds of an epoch of all that is timed, side by side, unless they are there."""
    runs = list({run.config: run for label in TIMED for run in [pace(timed(label))]}.values())
    if {run.config for run in runs} <= results.read_seconds().keys():
        return
    print(
        f"{len(runs)} epochs to be timed side by side, {ROUNDS} times: about {len(runs) * ROUNDS * 4 // 60 + 1} minutes"
    )
    if dry:
        return
    import worker

    seconds = worker.epoch_seconds(runs, ROUNDS, threads)
    for run, value in zip(runs, seconds, strict=True):
        print(f"  {run.name}: {value:.2f} CPU s an epoch")
    results.write_seconds(runs, seconds, ROUNDS, worker.device_name("cpu"))


def take_memory(table: list[Cell], threads: int, dry: bool, end: float) -> int:
    """Peak memory of two epochs of what is not there, one by one; returns how many failed."""
    known, rows, failed = results.read_memory(), results.read(), 0
    runs = [brief(cell) for cell in table if cell not in known]
    if runs:
        minutes = sum(estimate(run, rows) for run in runs) / 60
        print(f"memory: {len(table) - len(runs)} are there; {len(runs)} to be measured, about {minutes:.0f} minutes")
    for run in runs:
        if dry or time.monotonic() > end:
            break
        try:
            row, _ = execute(run, threads, "cpu")
            results.append_memory(run, row)
            print(f"  {run.name}: {row['peak_mb']} MB", flush=True)
        except RuntimeError as error:
            failed += 1
            print(f"  {run.name}: {error}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="run|render")
    runner = commands.add_parser("run", help="make what is missing")
    runner.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    runner.add_argument("--datasets", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    runner.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    runner.add_argument(
        "--methods", nargs="+", default=[name for name, method in METHODS.items() if not method.variant],
        choices=METHODS, metavar="NAME", help="default: all but variants, which are other forms of these",
    )  # fmt: skip
    runner.add_argument("--ablations", nargs="+", default=list(ABLATIONS), choices=ABLATIONS, metavar="NAME")
    runner.add_argument("--seeds", type=int, default=5, help="at most; a data set may have fewer")
    runner.add_argument("--ablation-seeds", type=int, default=1)
    runner.add_argument("--jobs", type=int, default=2, help="runs at a time")
    runner.add_argument("--threads", type=int, default=1, help="threads a run")
    runner.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of ours and full batch; PyG's: CPU")
    runner.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    runner.add_argument("--dry-run", action="store_true", help="only say what is missing and the estimate")
    runner.set_defaults(command=run)
    renderer = commands.add_parser("render", help="tables and plots from the rows that are there")
    renderer.add_argument("--check", action="store_true", help="only say whether page and README are what they give")
    renderer.set_defaults(command=lambda args: __import__("render").render(args.check))
    args = parser.parse_args()
    return args.command(args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without ending the runs
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # before Python 3.13 the server's own path lacks this folder
    multiprocessing.get_context("forkserver").set_forkserver_preload(["worker"])
    sys.exit(main())
