"""Train PyTorch Geometric models in mini-batches that keep every message."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import diagnostics, inference, nn
    from .averaging import MovingAverage
    from .codebook import Codebook
    from .conversion import convert, paths, stores
    from .diffusion import gdc
    from .graph import BatchGraph, Convolution, Graph
    from .inference import warmup
    from .links import LinkLoader
    from .loader import Batch, BatchLoader
    from .partitioning import partition
    from .serving import new_nodes
    from .store import Codec, NodeStore

__version__ = "0.1.0"

# Loaded at first use: torch and PyG take seconds to import, and `vqgnn --help` needs neither.
_MODULE_OF = {
    "Batch": "loader",
    "BatchGraph": "graph",
    "BatchLoader": "loader",
    "Codebook": "codebook",
    "Codec": "store",
    "Convolution": "graph",
    "Graph": "graph",
    "LinkLoader": "links",
    "MovingAverage": "averaging",
    "NodeStore": "store",
    "convert": "conversion",
    "diagnostics": None,
    "gdc": "diffusion",
    "inference": None,
    "new_nodes": "serving",
    "nn": None,
    "partition": "partitioning",
    "paths": "conversion",
    "stores": "conversion",
    "warmup": "inference",
}
__all__ = [
    "Batch",
    "BatchGraph",
    "BatchLoader",
    "Codebook",
    "Codec",
    "Convolution",
    "Graph",
    "LinkLoader",
    "MovingAverage",
    "NodeStore",
    "convert",
    "diagnostics",
    "gdc",
    "inference",
    "new_nodes",
    "nn",
    "partition",
    "paths",
    "stores",
    "warmup",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vqgnn' has no attribute {name!r}")
    module = _MODULE_OF[name]
    value = importlib.import_module(f".{module or name}", __name__)
    if module is not None:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
