"""One run in a process of its own: `execute(run)` gives its row and its course."""

from __future__ import annotations

import math
import shutil
import statistics
import warnings
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import peers
import torch
from settings import BATCHES, Run
from tqdm import tqdm, trange

from vqgnn import datasets, memory
from vqgnn.config import Config, InputError
from vqgnn.doctor import cpu_name
from vqgnn.files import atomic_write
from vqgnn.runs import Run as RunFolder
from vqgnn.train import Trainer, no_denormals

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "accuracy"
_LAST = 0.2  # share of the epochs over which stability is measured


def shared_data() -> Path:
    """The folder `shared/data` beside the checkout or above it."""
    for parent in ROOT.parents:
        if (parent / "shared" / "data" / "load.py").exists():
            return parent / "shared" / "data"
    raise FileNotFoundError("no folder shared/data beside this checkout or above it, which holds the data sets")


def dataset_file(run: Run) -> Path:
    """The `.npz` of a data set. Coauthor counts become 0/1, as PyG has them, in a copy."""
    source = shared_data() / f"{run.setting.file}.npz"
    if not run.dataset.startswith("coauthor"):
        return source
    path = RUNS / "data" / f"{run.dataset}-binary.npz"
    if not path.exists():
        with np.load(source) as file:
            arrays = dict(file)
        arrays["x_data"] = (arrays["x_data"] > 0).astype(np.uint8)
        with atomic_write(path) as handle:
            np.savez_compressed(handle, **arrays)
    return path


def config_of(run: Run, threads: int, device: str = "cpu") -> Config:
    """A run as `vqgnn train` would be told it."""
    options = {"optimizer": "adam", "norm": "batch", "residual": False}  # whatever `vqgnn train` has by default
    options |= {key: value for key, value in run.options.items() if key in {f.name for f in fields(Config)}}
    path = dataset_file(run)
    if "batches" in run.options:
        with np.load(path) as arrays:
            options["batch_size"] = math.ceil(arrays["y"].shape[0] / run.options["batches"])
    return Config(dataset=str(path), threads=threads, device=device, **options)


def execute(run: Run, threads: int = 1, device: str = "cpu") -> tuple[dict, list[dict]]:
    """(row, course) of a run; one that was interrupted goes on from its last epoch where it is ours."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    if device == "cuda" and not run.what.trainer:
        raise ValueError(f"{run.method} runs on the CPU only; leave --device cuda out or name other --methods")
    config = config_of(run, threads, device)
    dataset = datasets.of_config(config)
    if not run.what.trainer:
        with no_denormals():  # as in the trainer
            metrics, costs = peers.train(run.method, config, dataset, _batches(run))
    else:
        metrics, costs = _train(run, config, dataset)
    row = _row(metrics, dataset.metric if config.metric == "auto" else config.metric)
    return row | costs | {"device": device_name(device)}, _course(metrics)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()} x {torch.get_num_threads()} threads"


def _batches(run: Run) -> int:
    return run.options.get("batches", BATCHES)


def epoch_seconds(runs: list[Run], rounds: int, threads: int = 1) -> list[float]:
    """CPU seconds of each run's epoch: the median of rounds in which all take turns, as a machine's speed changes.

    Training alone, without evaluation; after an epoch to warm up. Freed memory is kept: to give it back and take it
    anew, which glibc does with large tensors, is a third to a half of full batch's time.
    """
    warnings.simplefilter("ignore")
    memory.keep_freed()
    torch.set_num_threads(threads)
    trainers = []
    for run in tqdm(runs, "build", leave=False):
        config = config_of(run, threads)
        dataset = datasets.of_config(config)
        ours = run.what.trainer
        trainers.append(Trainer(config, dataset) if ours else peers.PEERS[run.method](config, dataset, _batches(run)))
    with no_denormals():
        times = [
            [trainer.train_epoch()["cpu_seconds"] for trainer in trainers] for _ in trange(rounds + 1, desc="round")
        ]
    return [statistics.median(seconds) for seconds in zip(*times[1:], strict=True)]


def _train(run: Run, config: Config, dataset: datasets.Dataset) -> tuple[list[dict], dict]:
    path = RUNS / f"{run.name}-{run.config}"
    state, folder = None, None
    if (path / "config.json").exists():
        folder = RunFolder(path)
        if folder.checkpoint_path.exists():
            with suppress(InputError):  # of an older version, or of other data: begun anew
                state = folder.load_checkpoint(dataset.fingerprint())
        if state is None:  # also where a run came to its end and is wanted again
            shutil.rmtree(path)
            folder = None
    trainer = Trainer(config, dataset, fill=state is None, folder=RunFolder.state_folder(path))
    if state is not None:
        trainer.load_state_dict(state, folder)
    folder = folder or RunFolder.create(path, config)
    summary = trainer.fit(folder)
    folder.checkpoint_path.unlink()  # the row is what stays: a hundred checkpoints are gigabytes
    costs = {
        "peak_mb": round(summary["memory_above_data"] / 1e6),
        "state_bytes": summary["store_bytes"],
        "dense_bytes": summary["store_bytes_fp32"],
    }
    return folder.metrics(), costs


def _row(metrics: list[dict], metric: str) -> dict:
    """Validation picks the epoch. Stability: the test score's standard deviation over the last epochs, in points."""
    evaluated = [epoch for epoch in metrics if f"val_{metric}" in epoch]
    best = max(evaluated, key=lambda epoch: epoch[f"val_{metric}"])
    last = [100 * e[f"test_{metric}"] for e in evaluated if e["epoch"] > (1 - _LAST) * metrics[-1]["epoch"]]
    scores = {split: round(best[f"{split}_{metric}"], 5) for split in ("train", "val", "test")}
    return scores | {
        "best_epoch": best["epoch"],
        "stability": round(statistics.pstdev(last), 3) if len(last) > 1 else "",
        "seconds_epoch": round(statistics.median(epoch["seconds"] for epoch in metrics), 4),
        "cpu_seconds_epoch": round(statistics.median(epoch["cpu_seconds"] for epoch in metrics), 4),
        "cpu_seconds_best": round(sum(e["cpu_seconds"] for e in metrics if e["epoch"] <= best["epoch"]), 3),
    }


def _course(metrics: list[dict]) -> list[dict]:
    total, points = 0.0, []
    for epoch in metrics:
        total += epoch["cpu_seconds"]
        score = {
            key.partition("_")[0]: round(value, 5) for key, value in epoch.items() if key.startswith(("val_", "test_"))
        }
        if score:
            points.append({"epoch": epoch["epoch"], "cpu_seconds": round(total, 3), **score})
    return points


def in_child(run: Run, threads: int, device: str, pipe) -> None:
    """For a process of the pool: the result, or the error in a line."""
    try:
        pipe.send(execute(run, threads, device))
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise
    finally:
        pipe.close()
