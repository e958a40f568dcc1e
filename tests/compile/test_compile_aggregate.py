import pytest
import torch

from vqgnn_kernels import CSR, Rows, aggregate

N, B, H, E = 96, 32, 64, 1024  # enough edges for a chunk


def matrix(weighted=True, halo=True):
    rowptr = torch.linspace(0, E, B + 1).long()
    col = torch.zeros(E, dtype=torch.int32)
    return CSR(rowptr, col, torch.ones(E) if weighted else None, torch.zeros(H, dtype=torch.int64) if halo else None)


def table(codec, f, d=4, num_codes=256):
    if codec == "none":
        return None
    if codec == "pq":
        m = -(-f // d)
        codes = torch.zeros(N, m, dtype=torch.uint8 if num_codes <= 256 else torch.int16)
        return Rows("pq", codes, None, torch.zeros(m, num_codes, d))
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(codec, torch.uint8)
    scale = torch.zeros(N, 2, dtype=torch.bfloat16) if codec in ("int8", "int4") else None
    return Rows(codec, torch.zeros(N, (f + 1) // 2 if codec == "int4" else f, dtype=dtype), scale)


CASES = {
    "none": lambda: (torch.zeros(B, 128), matrix(), None),
    "fp32": lambda: (torch.zeros(B, 128), matrix(), table("fp32", 128)),
    "fp16": lambda: (torch.zeros(B, 128), matrix(), table("fp16", 128)),
    "int8": lambda: (torch.zeros(B, 128), matrix(), table("int8", 128)),
    "int4": lambda: (torch.zeros(B, 128), matrix(), table("int4", 128)),
    "pq d=4 k=256": lambda: (torch.zeros(B, 128), matrix(), table("pq", 128)),
    "pq d=8 k=256": lambda: (torch.zeros(B, 128), matrix(), table("pq", 128, d=8)),
    "pq d=4 k=1024": lambda: (torch.zeros(B, 128), matrix(), table("pq", 128, num_codes=1024)),
    "pq bf16 unweighted": lambda: (torch.zeros(B, 128).bfloat16(), matrix(False, False), table("pq", 128)),
    "fp32 f=47": lambda: (torch.zeros(B, 47), matrix(), table("fp32", 47)),
    "int4 f=47": lambda: (torch.zeros(B, 47), matrix(), table("int4", 47)),
    "pq d=3 f=47": lambda: (torch.zeros(B, 47), matrix(), table("pq", 47, d=3)),
    "pq d=1 f=32": lambda: (torch.zeros(B, 32), matrix(), table("pq", 32, d=1)),
    "pq f=32": lambda: (torch.zeros(B, 32), matrix(), table("pq", 32)),
}


@pytest.mark.parametrize("case", CASES)
def test_compiles_within_budget(case, compiled):
    compiled(case, lambda: aggregate(*CASES[case]()))


@pytest.mark.parametrize("case", ["fp32", "int4", "pq d=4 k=256", "pq d=8 k=256", "pq d=3 f=47"])
def test_dropout_compiles_within_budget(case, compiled):
    compiled(f"{case}, dropout", lambda: aggregate(*CASES[case](), dropout=0.5))
