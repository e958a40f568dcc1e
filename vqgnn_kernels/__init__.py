"""Stateless ops on tensors for vector-quantised mini-batch GNN training."""

from ._backend import backends
from .aggregate import CSR, Rows, aggregate
from .csr_slice import csr_slice, csr_slice_values
from .store_io import pull_rows, push_rows

__all__ = ["CSR", "Rows", "aggregate", "backends", "csr_slice", "csr_slice_values", "pull_rows", "push_rows"]
