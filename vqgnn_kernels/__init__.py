"""Stateless ops on tensors for vector-quantised mini-batch GNN training."""

from ._backend import backends, set_num_threads, transfer_engine
from ._library import register
from .aggregate import CSR, Rows, aggregate
from .attention_aggregate import attention_aggregate, code_scores, row_scores
from .codebook_update import codebook_rows, codebook_stats, codebook_update
from .csr_slice import csr_slice, csr_slice_values
from .global_attention import global_attention
from .hash_dropout import hash_dropout
from .store_io import pull_rows, push_rows
from .vq_assign import vq_assign, vq_assign_stats

__all__ = [
    "CSR",
    "Rows",
    "aggregate",
    "attention_aggregate",
    "backends",
    "code_scores",
    "codebook_rows",
    "codebook_stats",
    "codebook_update",
    "csr_slice",
    "csr_slice_values",
    "global_attention",
    "hash_dropout",
    "pull_rows",
    "push_rows",
    "register",
    "row_scores",
    "set_num_threads",
    "transfer_engine",
    "vq_assign",
    "vq_assign_stats",
]
