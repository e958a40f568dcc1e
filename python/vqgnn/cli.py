"""The `vqgnn` command. Thin: options become a `Config`, results become text; heavy imports wait for their command."""

from __future__ import annotations

import errno
import inspect
import os
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import memory
from .config import Config, InputError, option_name

if TYPE_CHECKING:
    from .runs import Run
    from .train import Trainer

BAD_INPUT, INTERRUPTED = 2, 130
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    help="Train GNNs in mini-batches that keep every message.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run, as written by `vqgnn train`.", metavar="RUN")]
Inference = Annotated[
    Literal["exact", "vq", "stale"],
    typer.Option(
        help="Neighbours' states: exact, codes refreshed layer by layer, or the training store's (the paper's)."
    ),
]


def _with_options(*names: str):
    """Give a command one option for each of these fields of `Config` (none named: all), passed on as keywords."""

    def decorate(command):
        chosen = [f for f in fields(Config) if not names or f.name in names]
        options = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=typer.Option(f.default, help=f.metadata["help"], min=f.metadata["min"], max=f.metadata["max"]),
                annotation=f.type,
            )
            for f in chosen
        ]
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([*own, *options])
        command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}
        return command

    return decorate


@app.command()
@_with_options()
def train(
    context: typer.Context,
    *,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/GRAPH-MODEL-METHOD]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out (CPU: bit for bit).")] = False,
    **options,
) -> None:
    """Train a GNN; write config, metrics, curves and a checkpoint to a run folder."""
    given = {key: value for key, value in options.items() if _is_given(context, key)}
    if resume:
        if out is None:
            raise InputError("--resume needs --out, the folder of the run to go on with")
        from .runs import Run

        run = Run(out)
        _refuse_changes(run.config, given)
        config = run.config
    else:
        config = Config(**options)
        from .runs import Run

        if out is not None:
            Run.check_free(out)
        run = None
    from . import report
    from .train import Trainer

    dataset = _load(config)
    continued = run is not None and run.checkpoint_path.exists()
    state = run.load_checkpoint(dataset.fingerprint()) if continued else None
    folder = out or Run.free_name(config)
    trainer = Trainer(config, dataset, fill=not continued, folder=Run.state_folder(folder))
    if continued:
        trainer.load_state_dict(state, run)
    run = run or Run.create(folder, config)
    verb = "continuing" if continued else "training"
    print(f"{verb} {run.path}: {config.model}, {len(trainer.loader)} batches an epoch")
    try:
        summary = trainer.fit(run)
    except KeyboardInterrupt:
        _say(f"interrupted after epoch {trainer.epoch}; go on with: vqgnn train --resume --out {run.path}")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        report.curves(run)
    print(report.table(summary))


@app.command()
def evaluate(run: RunFolder, inference: Inference = "exact") -> None:
    """Score a run's best weights on its graph."""
    opened, trainer = _trained(run)
    from . import report

    rows = [(key.replace("_", " "), f"{value:.4f}") for key, value in trainer.scores(inference).items()]
    print(f"{opened.path}, epoch {trainer.best['epoch']}, {inference} inference")
    print(report.aligned(rows))


@app.command()
def predict(
    run: RunFolder,
    out: Annotated[
        Path, typer.Option(help="The .npz file to write: pred [n] or [n, C], logits [n, C]; or embeddings [n, f].")
    ],
    inference: Inference = "exact",
    new: Annotated[
        Path | None,
        typer.Option(
            help="Predict for k new nodes instead, by the known ones' stored states: an .npz file of x [k, f] and "
            "edge_index [2, e], their ids n..n+k-1. Methods vq, gas and lmc keep states."
        ),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="With --new: first recompute the stored states, exactly.")
    ] = False,
) -> None:
    """Write every node's predicted class (or classes) and logits; --task link: embeddings."""
    if new is None and refresh:
        raise InputError("--refresh is for --new; without it every node is computed anew by --inference")
    if new is not None and inference != "exact":
        raise InputError(f"--inference {inference} is not for --new, which reads the stored states; leave it out")
    if out.is_dir() or not os.access(next(folder for folder in out.absolute().parents if folder.exists()), os.W_OK):
        raise InputError(f"--out {str(out)!r} is a folder or cannot be written; give the path of a new .npz file")
    if out.suffix != ".npz" and out.exists():
        raise InputError(f"--out {str(out)!r} exists and is no .npz file; give another path")
    _, trainer = _trained(run)
    import numpy as np

    from .datasets import read_new_nodes
    from .files import atomic_write

    if new is None:
        output = trainer.predict(inference)
    else:
        output = trainer.predict_new(*read_new_nodes(new, trainer.config.columns()), refresh)
    arrays = {key: value.cpu().numpy() for key, value in trainer.task.arrays(output).items()}
    with atomic_write(out) as handle:
        np.savez(handle, **arrays)
    print(f"wrote {out}: {', '.join(f'{key} {list(value.shape)}' for key, value in arrays.items())}")


@app.command()
@_with_options("split", "directed", "features", "hidden", "layers", "batch_size")
def info(
    dataset: Annotated[str, typer.Argument(help="Graph, as for `vqgnn train --dataset`.")] = Config.dataset,
    **options,
) -> None:
    """A graph's statistics, and an estimate of each method's memory."""
    config = Config(dataset=dataset, **options)
    from . import report

    print(report.graph_statistics(_load(config), config))


@app.command()
def doctor() -> None:
    """Versions, devices and back-ends, and why something is off."""
    from . import doctor as checks
    from . import report

    print(report.aligned(checks.report()))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code. VQGNN_TRACEBACK=1 shows where a bad input was noticed."""
    memory.use_one_arena()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: _say(f"warning: {message}")
        try:
            return app(arguments, standalone_mode=False) or 0
        except Exception as error:
            if os.environ.get("VQGNN_TRACEBACK"):
                raise
            return _failed(error)


def _failed(error: Exception) -> int:
    """Say in one line what is wrong, where it is known to be the user's to mend."""
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a value of the wrong type
        text = error.format_message()
        if not text:  # no command was given, and the help has been shown
            return error.exit_code
        _say(f"error: {' '.join(text.split())}")
        return error.exit_code
    if type(error).__name__ == "Abort":  # typer's KeyboardInterrupt
        return INTERRUPTED
    if isinstance(error, InputError):
        _say(f"error: {error}")
        return BAD_INPUT
    if type(error).__name__ == "TrainingError":
        _say(f"error: {error}")
        return 1
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"error: {where}{error.strerror}; free some space; a run that had begun goes on with --resume")
        return BAD_INPUT
    raise error


def _say(text: str) -> None:
    """One line on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"vqgnn: {text}", file=sys.stderr)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_changes(config: Config, given: dict) -> None:
    """A resumed run goes on as it began."""
    for name, value in given.items():
        if value != getattr(config, name):
            raise InputError(
                f"{option_name(name)} {value} differs from the run's {getattr(config, name)}; "
                "leave it out with --resume, or start a new run"
            )


def _load(config: Config):
    from . import datasets

    return datasets.of_config(config)


def _trained(path: Path) -> tuple[Run, Trainer]:
    """A run and its trainer, with the weights of the best epoch."""
    from .runs import Run
    from .train import Trainer

    run = Run(path)
    dataset = _load(run.config)
    state = run.load_checkpoint(dataset.fingerprint())
    trainer = Trainer(run.config, dataset, fill=False, folder=Run.state_folder(path))
    trainer.load_state_dict(state, run)
    trainer.use_best()
    return run, trainer


if __name__ == "__main__":
    sys.exit(main())
