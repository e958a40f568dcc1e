"""How a model is called, wherever it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData

from .loader import Batch


def call_model(model: nn.Module, batch: Batch | HeteroData) -> Tensor | dict[str, Tensor]:
    """The default way to call a model on a batch: as it is where the model takes a `Data`."""
    if isinstance(batch, HeteroData):
        return model(batch.x_dict, batch.graph_dict)
    return model(batch) if _takes_data(model) else model(batch.x, batch.graph)


def _takes_data(model: nn.Module) -> bool:
    """Whether forward takes one thing, or has a first one that is called so."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = list(inspect.signature(model.forward).parameters.values())
    first = [parameter.name for parameter in taken if parameter.kind in kinds]
    alone = len(first) == 1 and not any(parameter.kind == inspect.Parameter.VAR_POSITIONAL for parameter in taken)
    return alone or first[:1] in (["data"], ["batch"])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, every module's own mode restored afterwards. Eager: each pass would be compiled anew."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def device_of(model: nn.Module, data: Data) -> torch.device:
    """Where the model computes."""
    found = (tensor.device for tensor in (*model.parameters(), *model.buffers()))
    return next(found, None) or data.x.device


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether rows are the same but for rounding."""
    tolerance = max(1e-4, 16 * torch.finfo(a.dtype).eps)
    return bool((a - b).norm() <= tolerance * a.norm())
