import pytest
import torch
from test_store_io import LEVELS, awkward_values, empty_table, same

from vqgnn_kernels import Rows, _tiles, pull_rows, push_rows
from vqgnn_kernels.store_io import reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def to(rows, device):
    return Rows(rows.codec, *(None if t is None else t.to(device, copy=True) for t in rows[1:]))


def check_push(codec, x, num_rows, device):
    n_id = torch.randperm(num_rows)[: len(x)]
    want = empty_table(codec, num_rows, x.shape[1])
    ours = to(want, device)
    push_rows(ours, n_id.to(device), x.to(device))
    reference.push_rows(want, n_id, x)
    assert same(ours.data, want.data)
    if want.scale is not None:
        # A zero's sign, where a row holds zeros of both, is whichever the maximum met first: + 0 drops it.
        assert same(ours.scale.cpu() + 0, want.scale + 0)


@pytest.mark.parametrize("f", [1, 5, 32, 61, 128, 301])
@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
def test_push_matches_reference_to_the_bit(codec, f, device):
    check_push(codec, awkward_values(70, f), 90, device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
def test_push_of_half_precision(codec, dtype, device):
    x = awkward_values(20, 9).clamp(-60_000, 60_000)
    x[4] = 1e-30  # the interpreter reads no subnormal bf16
    check_push(codec, x.to(dtype), 20, device)


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4"])
@pytest.mark.parametrize(("k", "f"), [(0, 8), (3, 0)])
def test_push_of_nothing(codec, k, f, device):
    check_push(codec, torch.randn(k, f), 5, device)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_quantiser_rounds_as_the_reference(codec, device, monkeypatch):
    """Many rows by one program: every magnitude, ties and range ends included."""
    monkeypatch.setitem(_tiles.TILES, "push_quantise_kernel", (_tiles.Tile({"BLOCK_R": 4096, "BLOCK_F": 32}),))
    x = torch.randn(4096, 29) * 2.0 ** torch.randint(-140, 120, (4096, 1)) + torch.randn(4096, 1)
    x[::3] = torch.randint(0, 2 * LEVELS[codec] + 1, (len(x[::3]), 29)) / 2  # halves: ties at scale 1
    x[::3, 0], x[::3, 1] = 0.0, float(LEVELS[codec])
    check_push(codec, x, 4096, device)


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4", "pq"])
def test_push_skips_rows_that_are_not_there(codec, device):
    want = Rows("pq", torch.zeros(9, 5, dtype=torch.uint8)) if codec == "pq" else empty_table(codec, 9, 5)
    x = torch.randint(256, (6, 5), dtype=torch.uint8) if codec == "pq" else torch.randn(6, 5)
    n_id, there = torch.tensor([3, -1, 9, 0, 2**40, 8]), torch.tensor([0, 3, 5])
    padded = Rows(codec, *(None if t is None else torch.cat([t, t, t]).to(device) for t in want[1:]))
    inner = Rows(codec, *(None if t is None else t[9:18] for t in padded[1:]))  # its neighbours are watched too
    push_rows(inner, n_id.to(device), x.to(device))
    pristine = to(want, "cpu")
    reference.push_rows(want, n_id[there], x[there])
    for ours, before, after in zip(padded[1:3], pristine[1:3], want[1:3], strict=True):
        assert ours is None or same(ours, torch.cat([before, after, before]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16], ids=str)
@pytest.mark.parametrize("m", [1, 32, 40])
def test_push_of_codes(dtype, m, device):
    table = torch.zeros(50, m, dtype=dtype, device=device)
    codes, n_id = torch.randint(256 if dtype == torch.uint8 else 1024, (20, m)).to(dtype), torch.randperm(50)[:20]
    push_rows(Rows("pq", table), n_id.to(device), codes.to(device))
    want = torch.zeros(50, m, dtype=dtype)
    want[n_id] = codes
    assert torch.equal(table.cpu(), want)


def test_strided_input(device):
    table = Rows("fp32", torch.zeros(6, 5, device=device))
    x, n_id = torch.randn(5, 4, device=device).T, torch.tensor([5, 9, 1, 9, 2, 9, 0, 9], device=device)[::2]
    push_rows(table, n_id, x)
    assert torch.equal(table.data[n_id], x)


def random_table(codec, num_rows, f):
    table = empty_table(codec, num_rows, f)
    reference.push_rows(table, torch.arange(num_rows), torch.randn(num_rows, f) * 10)
    return table


def check_pull(table, n_id, f, device):
    out = pull_rows(to(table, device), None if n_id is None else n_id.to(device), f)
    torch.testing.assert_close(out.cpu(), reference.pull_rows(table, n_id, f))


@pytest.mark.parametrize("f", [1, 5, 32, 61, 128, 301])
@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
def test_pull(codec, f, device):
    table = random_table(codec, 50, f)
    for n_id in (torch.randint(50, (70,)), torch.zeros(0, dtype=torch.int64), None):
        check_pull(table, n_id, f, device)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16], ids=str)
@pytest.mark.parametrize(("d", "f", "num_codes"), [(1, 7, 256), (3, 20, 5), (4, 128, 200), (8, 61, 256), (4, 301, 1)])
def test_pull_of_codes(dtype, d, f, num_codes, device):
    m, num_codes = -(-f // d), num_codes * 4 if dtype == torch.int16 else num_codes
    codes = torch.randint(num_codes, (40, m)).to(dtype)
    table = Rows("pq", codes, None, torch.randn(m, num_codes, d))
    check_pull(table, torch.randint(40, (30,)), f, device)
    check_pull(table, None, f, device)


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4", "pq"])
def test_pull_of_rows_that_are_not_there_gives_zeros(codec, device):
    if codec == "pq":
        table = Rows("pq", torch.ones(9, 2, dtype=torch.uint8), None, torch.ones(2, 7, 4))
    else:
        table = random_table(codec, 9, 7)
    n_id = torch.tensor([2, -1, 9, 2**40, 8], device=device)
    out = pull_rows(to(table, device), n_id, 7).cpu()
    assert out[1:4].count_nonzero() == 0
    torch.testing.assert_close(out[[0, 4]], reference.pull_rows(table, torch.tensor([2, 8]), 7))


@pytest.mark.parametrize("codec", ["fp32", "int4", "pq"])
def test_table_in_pinned_memory(codec):
    """The table stays on the host; rows and result are on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("pinned memory needs a CUDA device")
    if codec == "pq":
        table = Rows("pq", torch.zeros(40, 5, dtype=torch.uint8), None, torch.randn(5, 256, 4))
        x = torch.randint(256, (30, 5), dtype=torch.uint8)
    else:
        table, x = random_table(codec, 40, 20), torch.randn(30, 20)
    pinned = Rows(codec, *(None if t is None else t.clone().pin_memory() for t in table[1:]))
    n_id = torch.randperm(40)[:30]
    push_rows(pinned, n_id.cuda(), x.cuda())
    out = pull_rows(pinned, n_id.cuda(), 20)
    torch.cuda.synchronize()
    reference.push_rows(table, n_id, x)
    assert out.is_cuda and same(pinned.data, table.data)
    torch.testing.assert_close(out.cpu(), reference.pull_rows(table, n_id, 20))
    with pytest.raises(ValueError, match="pageable host memory"):
        push_rows(table, n_id.cuda(), x.cuda())
