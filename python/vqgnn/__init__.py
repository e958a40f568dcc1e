"""Train PyTorch Geometric models in mini-batches that keep every message."""

from . import inference, nn
from .codebook import Codebook
from .convert import convert, stores
from .graph import BatchGraph, Convolution, Graph
from .inference import warmup
from .loader import Batch, BatchLoader
from .partition import partition
from .store import Codec, NodeStore

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BatchGraph",
    "BatchLoader",
    "Codebook",
    "Codec",
    "Convolution",
    "Graph",
    "NodeStore",
    "convert",
    "inference",
    "nn",
    "partition",
    "stores",
    "warmup",
]
