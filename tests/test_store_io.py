import os
import subprocess
import sys

import pytest
import torch
from marks import needs_cpp

from vqgnn_kernels import Rows, pull_rows, push_rows
from vqgnn_kernels.store_io import reference as truth

LEVELS = {"int8": 255, "int4": 15}


def empty_table(codec, num_rows, f):
    """A table full of NaN or 0xff: what nobody writes must not look right."""
    if codec in LEVELS:
        data = torch.full((num_rows, (f + 1) // 2 if codec == "int4" else f), 255, dtype=torch.uint8)
        return Rows(codec, data, torch.full((num_rows, 2), torch.nan, dtype=torch.bfloat16))
    dtype = torch.float32 if codec == "fp32" else torch.float16
    return Rows(codec, torch.full((num_rows, f), torch.nan, dtype=dtype))


def same(a, b):
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def awkward_values(k, f):
    """Rows of several magnitudes, constant, negative, subnormal, with signed zeros, and one that a half overflows."""
    x = torch.randn(k, f) * 10.0 ** torch.randint(-6, 5, (k, 1))
    x[0], x[1], x[2], x[3] = 0.0, 1.0, -0.3, -0.0
    x[4] = torch.randn(f) * 1e-40
    x[5] = torch.arange(f) / 2
    x[6] = 70_000.0
    x[7, ::2] = 0.0
    x[7, 1::2] = -0.0
    x[8] = 65_519.0
    x[9] = torch.linspace(0, 255, f) if f > 1 else 3.0
    x[10] = torch.arange(f) % 256 + 0.5 * (torch.arange(f) % 3 == 0)  # ties, where the scale comes out as 1
    return x


@pytest.mark.parametrize("f", [1, 5, 128, 130, 300, 301])
@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
def test_matches_reference_to_the_bit(codec, f):
    x, n_id = awkward_values(400, f), torch.randperm(500)[:400]
    ours, want = empty_table(codec, 500, f), empty_table(codec, 500, f)
    push_rows(ours, n_id, x)
    truth.push_rows(want, n_id, x)
    assert same(ours.data, want.data)
    assert ours.scale is None or same(ours.scale, want.scale)
    for rows in (n_id, n_id[:1], n_id[:0]):
        torch.testing.assert_close(pull_rows(ours, rows, f), truth.pull_rows(want, rows, f))
    assert pull_rows(ours, None, f).shape == (500, f)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_quantisation_covers_the_row(codec):
    """Every value comes back within half a step, and the range's ends are within the grid."""
    x = torch.randn(300, 33)
    table = empty_table(codec, 300, 33)
    push_rows(table, torch.arange(300), x)
    scale, offset = table.scale.float().unbind(1)
    assert (offset <= x.amin(1)).all() and (offset + LEVELS[codec] * scale >= x.amax(1) * (1 - 1e-6)).all()
    error = (pull_rows(table, None, 33) - x).abs()
    assert (error <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize(("d", "f"), [(1, 7), (3, 20), (4, 128), (8, 61)])
def test_codes(dtype, d, f):
    m, num_codes = -(-f // d), 256 if dtype == torch.uint8 else 999
    rows = Rows("pq", torch.zeros(50, m, dtype=dtype), None, torch.randn(m, num_codes, d))
    codes, n_id = torch.randint(num_codes, (20, m)).to(dtype), torch.randperm(50)[:20]
    push_rows(rows._replace(codebook=None), n_id, codes)
    assert torch.equal(rows.data[n_id], codes) and rows.data.count_nonzero() == codes.count_nonzero()
    want = torch.cat([rows.codebook[j, codes[:, j].long()] for j in range(m)], 1)[:, :f]
    assert torch.equal(pull_rows(rows, n_id, f), want)
    assert torch.equal(truth.pull_rows(rows, n_id, f), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(dtype):
    x, table = torch.randn(30, 9).to(dtype), empty_table("fp32", 30, 9)
    push_rows(table, torch.arange(30), x)
    assert torch.equal(table.data, x.float())


def test_every_half_survives():
    """All 65,536 halves, but the NaNs, come back exactly from fp16 rows."""
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16).reshape(256, 256)
    table = empty_table("fp16", 256, 256)
    push_rows(table, torch.arange(256), halves)
    out = pull_rows(table, None, 256)
    assert torch.equal(out.nan_to_num(0.5), halves.float().nan_to_num(0.5))


def test_pull_returns_a_copy():
    table = Rows("fp32", torch.zeros(300, 4))
    pull_rows(table, None, 4).add_(1)
    assert table.data.count_nonzero() == 0


@pytest.mark.parametrize("codec", ["fp16", "int4"])
def test_nan_does_not_crash(codec):
    table = empty_table(codec, 3, 40)
    push_rows(table, torch.arange(3), torch.full((3, 40), torch.nan))
    assert pull_rows(table, None, 40).shape == (3, 40)


@needs_cpp
def test_baseline_instructions_agree(tmp_path):
    """VQGNN_ISA is read once a process, so the baseline kernels run in another one."""
    x, tables = awkward_values(400, 43), {}
    for codec in ("fp16", "int8", "int4"):
        tables[codec] = empty_table(codec, 400, 43)
        push_rows(tables[codec], torch.arange(400), x)
    values = {codec: pull_rows(table, None, 43) for codec, table in tables.items()}
    torch.save((x, {codec: tuple(table) for codec, table in tables.items()}, values), tmp_path / "case.pt")
    program = (
        "import sys, torch, vqgnn_kernels as k\n"
        "assert '(base)' in k.backends()['cpp'], k.backends()\n"
        "x, tables, values = torch.load(sys.argv[1])\n"
        "for codec, table in tables.items():\n"
        "    ours = k.Rows(codec, *(None if t is None else torch.zeros_like(t) for t in table[1:]))\n"
        "    k.push_rows(ours, torch.arange(len(x)), x)\n"
        "    assert torch.equal(ours.data.view(torch.uint8), table[1].view(torch.uint8)), codec\n"
        "    torch.testing.assert_close(k.pull_rows(ours, None, x.shape[1]), values[codec])\n"
    )
    environment = {**os.environ, "VQGNN_ISA": "base", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("VQGNN_BACKEND", None)
    command = [sys.executable, "-c", program, str(tmp_path / "case.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_opcheck(codec):
    table = empty_table(codec, 10, 6)
    push_rows(table, torch.arange(10), torch.randn(10, 6))  # opcheck compares, and NaN equals nothing
    n_id = torch.tensor([3, 1])
    torch.library.opcheck(torch.ops.vqgnn.push_rows, (codec, table.data, table.scale, n_id, torch.randn(2, 6)))
    torch.library.opcheck(torch.ops.vqgnn.pull_rows, (codec, table.data, table.scale, None, n_id, 6))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("n_id spans 0..10", lambda t: push_rows(t, torch.tensor([0, 10]), torch.ones(2, 4))),
        ("n_id spans -1..0", lambda t: push_rows(t, torch.tensor([0, -1]), torch.ones(2, 4))),
        ("n_id spans 10..10", lambda t: pull_rows(t, torch.tensor([10]), 4)),
        ("n_id has dtype", lambda t: push_rows(t, torch.tensor([0], dtype=torch.int32), torch.ones(1, 4))),
        ("x has shape", lambda t: push_rows(t, torch.tensor([0]), torch.ones(2, 4))),
        ("x has dtype", lambda t: push_rows(t, torch.tensor([0]), torch.ones(1, 4, dtype=torch.int64))),
        ("rows.data has 4 columns", lambda t: push_rows(t, torch.tensor([0]), torch.ones(1, 5))),
        ("must be contiguous", lambda t: push_rows(t._replace(data=t.data.T), torch.tensor([0]), torch.ones(1, 10))),
    ],
)
def test_errors_write_nothing(message, call):
    table = Rows("fp32", torch.zeros(10, 4))
    with pytest.raises(ValueError, match=message):
        call(table)
    assert table.data.count_nonzero() == 0
