"""The folder of a run: config.json, metrics.jsonl, checkpoint.pt, curves.png and summary.json, always resumable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .config import Config, InputError
from .files import atomic_write

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_CHECKPOINT_VERSION = 4
_STATE = "state"  # folder of node states that lie on disk


class _ErrorKept:
    """A file to write that remembers why it could not be written."""

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


class Run:
    """A run folder. `Run.create` makes a new one, `Run(path)` opens one that is there."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"run folder {str(self.path)!r} does not exist; give the folder that `vqgnn train` wrote")
        self.config = Config.read(self.path / "config.json")

    @staticmethod
    def check_free(path: Path) -> None:
        """Never write into another run, or over anything else."""
        empty = path.is_dir() and all(p.name == _STATE and p.is_dir() and not any(p.iterdir()) for p in path.iterdir())
        if path.exists() and not empty:
            raise InputError(f"--out {str(path)!r} exists already; go on with --resume or choose another folder")

    @classmethod
    def create(cls, path: str | Path, config: Config) -> Run:
        path = Path(path)
        cls.check_free(path)
        with atomic_write(path / "config.json") as handle:
            handle.write(config.to_json().encode())
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else trains this run meanwhile: two processes would mix up its metrics and checkpoints."""
        with open(self.path / "config.json", "r+b") as handle:
            try:
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"run {str(self.path)!r} is being trained by another process; wait for it, or choose another --out"
                ) from None
            except OSError:
                pass  # a file system without locks
            yield

    @staticmethod
    def free_name(config: Config, root: str | Path = "runs") -> Path:
        """A folder for this config that is not there yet: runs/generated-gcn-vq, runs/generated-gcn-vq-2, ..."""
        graph = Path(config.dataset.partition(":")[0]).stem
        name = "-".join([graph, config.model] + [config.method] * (config.model != "mlp"))
        number = 1
        while (path := Path(root) / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        return path

    @property
    def checkpoint_path(self) -> Path:
        return self.path / "checkpoint.pt"

    @staticmethod
    def state_folder(path: str | Path) -> Path:
        """Where the run at `path` keeps node states that lie on disk: snapshots, and scratch files without a name."""
        return Path(path) / _STATE

    def tables_path(self, store: str, generation: int) -> Path:
        """The snapshot of a store's tables that the checkpoint of this generation names."""
        return self.state_folder(self.path) / f"{store}.{generation}.tables"

    def keep_tables(self, generation: int | None) -> None:
        """Drop the snapshots of other generations, and what a killed process left half written."""
        for path in [*self.path.glob(f"{_STATE}/*"), *self.path.glob(f".{self.checkpoint_path.name}.*")]:
            if generation is None or not path.match(f"[!.]*.{generation}.tables"):
                path.unlink(missing_ok=True)

    def metrics(self) -> list[dict[str, Any]]:
        """One object an epoch; a last line that was cut off is left out."""
        path = self.path / "metrics.jsonl"
        epochs = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                epochs.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return epochs

    def append_metrics(self, epoch: dict[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a") as handle:
            handle.write(json.dumps(epoch) + "\n")

    def keep_metrics(self, last_epoch: int) -> None:
        """Drop the epochs after `last_epoch`: they will be computed again."""
        lines = [json.dumps(epoch) + "\n" for epoch in self.metrics() if epoch["epoch"] <= last_epoch]
        with atomic_write(self.path / "metrics.jsonl") as handle:
            handle.write("".join(lines).encode())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        with atomic_write(self.checkpoint_path) as handle:
            file = _ErrorKept(handle)
            try:
                torch.save({"version": _CHECKPOINT_VERSION, **state}, file)
            except RuntimeError as error:  # torch's own, which does not tell of a full disk
                raise file.error or error from None

    def load_checkpoint(self, fingerprint: dict[str, int | str]) -> dict[str, Any]:
        """The state saved last, for the graph with this fingerprint only."""
        path = self.checkpoint_path
        if not path.exists():
            raise InputError(f"run {str(self.path)!r} has no checkpoint yet; train it with --resume first")
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises whatever the damaged bytes lead to
            raise InputError(
                f"{path} is not a readable checkpoint ({type(error).__name__}); start a new run"
            ) from error
        if not isinstance(state, dict) or state.get("version") != _CHECKPOINT_VERSION:
            raise InputError(f"{path} is not a checkpoint of this version of vqgnn; start a new run")
        saved = state["fingerprint"]
        if saved != fingerprint:
            sizes = " and ".join(f"{g['nodes']} nodes, {g['edges']} edges" for g in (saved, fingerprint))
            same = saved["nodes"] == fingerprint["nodes"] and saved["edges"] == fingerprint["edges"]
            detail = "features, labels, masks or edges differ" if same else sizes
            raise InputError(
                f"{path} belongs to another graph than {self.config.dataset!r} ({detail}); start a new run"
            )
        return state

    def write_summary(self, summary: dict[str, Any]) -> None:
        with atomic_write(self.path / "summary.json") as handle:
            handle.write((json.dumps(summary, indent=2) + "\n").encode())
