import os
import subprocess
import sys

import pytest
import torch
from marks import needs_cpp

from vqgnn_kernels import _backend, global_attention
from vqgnn_kernels.global_attention import reference as truth

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(b, H, K, F, V, dtype=torch.float32, dead=0.3):
    """query, keys, values, counts; about `dead` of the codewords have no nodes, and NaN for key and value."""
    counts = torch.randint(1, 50, (H, K)).float() * (torch.rand(H, K) >= dead)
    keys, values = torch.randn(H, K, F), torch.randn(H, K, V)
    keys[counts == 0], values[counts == 0] = torch.nan, torch.nan
    return torch.randn(b, H, F).to(dtype), keys.to(dtype), values.to(dtype), counts


def formula(query, keys, values, counts, scale):
    """The docstring's formula in double precision, differentiated by autograd."""
    dead = (counts == 0)[..., None]
    keys, values = keys.double().masked_fill(dead, 0), values.double().masked_fill(dead, 0)
    weight = (scale * torch.einsum("bhf,hkf->bhk", query.double(), keys)).exp() * counts
    return torch.einsum("bhk,hkv->bhv", weight, values) / weight.sum(-1, keepdim=True).clamp(min=1e-300)


def check(arguments, scale=None, tolerance=1e-4):
    """Value and gradients against the formula."""
    *tensors, counts = arguments
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = global_attention(*tensors, counts, scale)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, grad_out)
    want = formula(*tensors, counts, tensors[0].shape[2] ** -0.5 if scale is None else scale)
    want_grads = torch.autograd.grad(want, tensors, grad_out.double())
    assert out.dtype == tensors[0].dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    for grad, want_grad, tensor in zip(grads, want_grads, tensors, strict=True):
        assert grad.dtype == tensor.dtype and grad.shape == tensor.shape
        torch.testing.assert_close(grad.double(), want_grad.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize(
    ("b", "H", "K", "F", "V"),
    [
        (70, 3, 130, 20, 33),
        (5, 1, 1, 1, 1),
        (0, 2, 5, 8, 8),
        (33, 2, 64, 16, 32),
        (64, 1, 257, 64, 48),
        (1, 4, 7, 5, 3),
    ],
    ids=lambda v: str(v),
)
def test_matches_formula(monkeypatch, backend, b, H, K, F, V):
    monkeypatch.setenv("VQGNN_BACKEND", backend)
    check(problem(b, H, K, F, V))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision(monkeypatch, backend, dtype):
    monkeypatch.setenv("VQGNN_BACKEND", backend)
    check(problem(40, 2, 70, 24, 24, dtype), tolerance=3e-2)


def test_half_queries_with_fp32_codewords():
    _, *tables = problem(0, 2, 70, 24, 24)
    check((torch.randn(40, 2, 24).bfloat16(), *tables), tolerance=3e-2)


def test_large_scores_do_not_overflow():
    query, keys, values, counts = problem(40, 2, 150, 8, 8)
    check((query * 5, keys * 5, values, counts), scale=1.5)
    out = global_attention(query * 1e3, keys * 1e3, values, counts, 1.0)
    want, _ = truth.global_attention(query * 1e3, keys * 1e3, values, counts, 1.0)
    torch.testing.assert_close(out, want)


def test_head_without_nodes_gives_zero():
    query, keys, values, counts = problem(40, 3, 90, 8, 8)
    counts[1] = 0
    counts[2, :70] = 0  # a first block without nodes
    check((query, keys, values, counts))
    assert not global_attention(query, keys, values, counts)[:, 1].any()


def test_one_codeword_a_node_is_full_attention():
    query, keys, values = torch.randn(3, 50, 2, 16).unbind()
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)  # not contiguous
    want = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1), keys, values)
    out = global_attention(query, keys, values, torch.ones(2, 50))
    torch.testing.assert_close(out, want.transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_counts_repeat_a_codeword():
    query, keys, values = torch.randn(20, 1, 8), torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    counts = torch.tensor([[3, 1, 0, 2, 5, 1]])
    many = [t.repeat_interleave(counts[0], 1) for t in (keys, values)]
    want = global_attention(query, *many, torch.ones(1, int(counts.sum())))
    torch.testing.assert_close(global_attention(query, keys, values, counts.float()), want, atol=1e-5, rtol=1e-5)


@needs_cpp
def test_result_does_not_depend_on_threads():
    arguments = problem(300, 3, 200, 20, 20)
    leaves = [t.requires_grad_() for t in arguments[:3]]
    results = []
    for threads in (1, 3):
        _backend.set_num_threads(threads)
        out = global_attention(*arguments)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    _backend.set_num_threads(torch.get_num_threads())
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@needs_cpp
@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_other_instruction_sets(isa):
    environment = {**os.environ, "VQGNN_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "matches_formula and cpp"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_opcheck():
    query, keys, values, counts = problem(10, 2, 12, 8, 6, dead=0)
    leaves = [t.requires_grad_() for t in (query, keys, values)]
    torch.library.opcheck(torch.ops.vqgnn.global_attention, (*leaves, counts, 0.5))
    with torch.no_grad():
        out, lse = torch.ops.vqgnn.global_attention(query, keys, values, counts, 0.5)
        arguments = (torch.randn_like(out), *(t.detach() for t in leaves), counts, 0.5, out, lse)
        torch.library.opcheck(torch.ops.vqgnn.global_attention_backward, arguments)


def test_compiles_without_graph_break():
    arguments = problem(10, 2, 12, 8, 6)
    compiled = torch.compile(global_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), global_attention(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"query": a["query"].double()}, "query has dtype torch.float64"),
        (lambda a: {"query": a["query"][0]}, r"query has shape \[2, 8\]"),
        (lambda a: {"keys": a["keys"][..., :-1]}, r"keys has shape \[2, 5, 7\]; it must be \[2, any, 8\]"),
        (lambda a: {"values": a["values"][:, :-1]}, r"values has shape \[2, 4, 6\]; it must be \[2, 5, any\]"),
        (lambda a: {"values": a["values"][..., :0]}, "every size must be at least 1"),
        (lambda a: {"counts": a["counts"].int()}, "counts has dtype torch.int32"),
        (lambda a: {"counts": a["counts"][:1]}, r"counts has shape \[1, 5\]"),
        (lambda a: {"keys": a["keys"].to("meta")}, "keys is on meta, query on cpu"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(zip(("query", "keys", "values", "counts"), problem(4, 2, 5, 8, 6), strict=True))
    with pytest.raises(ValueError, match=message):
        global_attention(**{**arguments, **change(arguments)})
