import pytest
import torch

from vqgnn_kernels import Rows, pull_rows, push_rows

WIDTHS = [16, 61, 128]


def table_of(codec, f, dtype=torch.uint8, num_codes=256, d=4):
    if codec == "pq":
        m = -(-f // d)
        return Rows("pq", torch.empty(100, m, dtype=dtype), None, torch.empty(m, num_codes, d))
    if codec in ("int8", "int4"):
        data = torch.empty(100, (f + 1) // 2 if codec == "int4" else f, dtype=torch.uint8)
        return Rows(codec, data, torch.empty(100, 2, dtype=torch.bfloat16))
    return Rows(codec, torch.empty(100, f, dtype=torch.float32 if codec == "fp32" else torch.float16))


N_ID = torch.zeros(64, dtype=torch.int64)


@pytest.mark.parametrize("f", WIDTHS)
@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
def test_rows(codec, f, compiled):
    table = table_of(codec, f)
    compiled(f"push-{codec}-{f}", lambda: push_rows(table, N_ID, torch.empty(64, f)))
    compiled(f"pull-{codec}-{f}", lambda: pull_rows(table, N_ID, f))


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4"])
def test_push_of_bf16(codec, compiled):
    table = table_of(codec, 128)
    compiled(f"push-{codec}-128-bf16", lambda: push_rows(table, N_ID, torch.empty(64, 128, dtype=torch.bfloat16)))


@pytest.mark.parametrize(("dtype", "num_codes"), [(torch.uint8, 256), (torch.int16, 1024)], ids=["uint8", "int16"])
@pytest.mark.parametrize(("f", "d"), [(128, 4), (128, 8), (61, 8), (20, 3), (301, 3)])
def test_codes(f, d, dtype, num_codes, compiled):
    table, case = table_of("pq", f, dtype, num_codes, d), f"{f}-{d}-K{num_codes}"
    compiled(f"push-codes-{case}", lambda: push_rows(table, N_ID, torch.empty(64, table.data.shape[1], dtype=dtype)))
    compiled(f"pull-codes-{case}", lambda: pull_rows(table, N_ID, f))


def test_pull_of_the_whole_table(compiled):
    compiled("pull-all", lambda: pull_rows(table_of("int4", 128), None, 128))
