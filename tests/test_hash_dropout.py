import os
import subprocess
import sys

import pytest
import torch
from marks import needs_cpp

from vqgnn_kernels import hash_dropout
from vqgnn_kernels._dropout import mix

BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
SHAPES = pytest.mark.parametrize(
    "shape", [(7, 1), (5, 7), (3, 64), (40, 500), (3, 4, 33), (65,), (), (0, 4), (4, 0)], ids=str
)


def formula(x, dropout, seed):
    """The docstring's, number by number."""
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1) if x.numel() else x
    out = torch.zeros_like(rows)
    for i, row in enumerate(rows):
        for c, value in enumerate(row):
            first = mix(mix(torch.tensor(seed % 2**32)) ^ i)
            if int(mix(first ^ c)) / 2**32 >= dropout:
                out[i, c] = value * torch.tensor(1 / (1 - dropout), dtype=torch.float32)
    return out.view(x.shape)


@BACKENDS
@pytest.mark.parametrize("shape", [(5, 19), (2, 3, 4), (9,)], ids=str)
def test_matches_formula(monkeypatch, backend, shape):
    monkeypatch.setenv("VQGNN_BACKEND", backend)
    x = torch.randn(shape)
    assert torch.equal(hash_dropout(x, 0.3, 2**40 + 7), formula(x, 0.3, 2**40 + 7))


@needs_cpp
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_backends_agree_to_the_bit(monkeypatch, shape, dtype):
    x = torch.randn(shape).to(dtype)
    results = []
    for backend in ("reference", "cpp"):
        monkeypatch.setenv("VQGNN_BACKEND", backend)
        results.append(hash_dropout(x, 0.7, -3))
    assert results[1].dtype == dtype and results[1].shape == x.shape
    assert torch.equal(*results)


@BACKENDS
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_share_and_seed(monkeypatch, backend, dropout):
    monkeypatch.setenv("VQGNN_BACKEND", backend)
    ones = torch.ones(1000, 200)
    kept = hash_dropout(ones, dropout, 1) * (1 - dropout)
    assert kept.unique().tolist() == pytest.approx([0, 1])
    for mean in (kept.mean(0), kept.mean(1)):  # of columns and of rows: their spread is that of independent draws
        n = ones.numel() // mean.numel()
        assert mean.mean().item() == pytest.approx(1 - dropout, abs=0.005)
        assert mean.std().item() == pytest.approx((dropout * (1 - dropout) / n) ** 0.5, rel=0.2)
    assert torch.equal(hash_dropout(ones, dropout, 1), hash_dropout(ones, dropout, torch.tensor(1)))
    assert not torch.equal(hash_dropout(ones, dropout, 1), hash_dropout(ones, dropout, 2))


@BACKENDS
def test_gradients(monkeypatch, backend):
    monkeypatch.setenv("VQGNN_BACKEND", backend)
    x = torch.randn(6, 9, requires_grad=True)
    factor = hash_dropout(torch.ones(6, 9), 0.4, 5)
    out = hash_dropout(x, 0.4, 5)
    grad = torch.randn(6, 9)
    (first,) = torch.autograd.grad(out.square(), x, grad, create_graph=True)
    torch.testing.assert_close(first, 2 * x * factor**2 * grad)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 2 * factor**2 * grad)


@BACKENDS
def test_what_is_dropped_need_not_be_finite(monkeypatch, backend):
    monkeypatch.setenv("VQGNN_BACKEND", backend)
    dropped = hash_dropout(torch.ones(4, 40), 0.5, 9) == 0
    out = hash_dropout(torch.full((4, 40), torch.inf).masked_fill(dropped, torch.nan), 0.5, 9)
    assert torch.equal(out == 0, dropped) and out[~dropped].isinf().all()


def test_other_layouts_and_no_dropout():
    x = torch.randn(30, 8).t()
    assert torch.equal(hash_dropout(x, 0.5, 1), hash_dropout(x.contiguous(), 0.5, 1))
    assert hash_dropout(x, 0.0) is x


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_bad_share(dropout):
    with pytest.raises(ValueError, match=rf"dropout={dropout} must lie in \[0, 1\)"):
        hash_dropout(torch.ones(2, 2), dropout)


def test_bad_dtype():
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64; it must be float32 or float16 or bfloat16"):
        hash_dropout(torch.ones(2, 2).double(), 0.5)


@needs_cpp
@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_every_instruction_set_drops_the_same(isa, tmp_path):
    """VQGNN_ISA is read once a process, so these kernels run in another one."""
    x = torch.randn(70, 77)
    torch.save(x, tmp_path / "x")
    program = """if True:
        import sys, torch
        from vqgnn_kernels import hash_dropout
        folder = sys.argv[1]
        torch.save(hash_dropout(torch.load(folder + "/x"), 0.6, 11), folder + "/out")
    """
    environment = {**os.environ, "VQGNN_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)
    assert torch.equal(torch.load(tmp_path / "out"), hash_dropout(x, 0.6, 11))


def test_compiled_step():
    def step(x, seed):
        return hash_dropout(x, 0.5, seed).square().sum()

    x, seed = torch.randn(8, 8, requires_grad=True), torch.tensor(3)
    (want,) = torch.autograd.grad(step(x, seed), x)
    (got,) = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(x, seed), x)
    torch.testing.assert_close(got, want)
