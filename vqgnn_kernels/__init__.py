"""Stateless ops on tensors for vector-quantised mini-batch GNN training."""

from ._backend import backends
from .codebook_update import codebook_stats, codebook_update
from .vq_assign import vq_assign, vq_assign_stats

__all__ = ["backends", "codebook_stats", "codebook_update", "vq_assign", "vq_assign_stats"]
