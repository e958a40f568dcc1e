"""Stateless ops on tensors for vector-quantised mini-batch GNN training."""

from ._backend import backends

__all__ = ["backends"]
