"""What a value comes from, whatever way it went from there."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric import EdgeIndex

from vqgnn.dependence import Dependence

W = torch.rand(6, 4)


def written(h):
    out = torch.zeros(6, 8)
    out[:, :4].copy_(h)
    return out[:, 4:]  # the same memory; which of its parts was written is not known


def put(h):
    out = torch.zeros(8)
    out[2:][h[:, 0] > 0.5] = 1
    return out


def swapped(h):
    out = torch.zeros(6, 4)
    out.data = h * 2
    return out


def foreach(h):
    out = [torch.zeros(6, 4)]
    torch._foreach_add_(out, [h])
    return out[0]


def chosen(h):
    return W + 1 if h.sum() > 0 else W


def edges(h):
    edge_index = EdgeIndex(torch.stack([torch.arange(6), h.argmax(1)]), sparse_size=(6, 6), sort_order="row")
    return edge_index.matmul(W)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return torch.from_numpy(h.numpy() + 1)


COMES_FROM_IT = {
    "detach": lambda h: h.detach(),
    "data": lambda h: h.data,
    "compared": lambda h: (h > 2) * W,
    "index": lambda h: W[h.argmax(1)],
    "out": lambda h: torch.add(h, W, out=torch.empty(6, 4)),
    "out-kept": lambda h: (out := torch.empty(6, 4), torch.add(h, W, out=out))[0],
    "foreach": foreach,
    "written": written,
    "put": put,
    "swapped": swapped,
    "copied": copy.deepcopy,
    "sparse": lambda h: torch.sparse.mm(h.to_sparse(), W.t()),
    "csr": lambda h: torch.sparse_csr_tensor(torch.arange(7), h.argmax(1), torch.ones(6), (6, 6)) @ W,
    "edge-index": edges,
    "vmap": lambda h: torch.vmap(torch.sum)(h),
    "tangent": lambda h: torch.func.jvp(torch.sin, (W,), (h,))[1],
    "lstm": lambda h: nn.LSTM(4, 4)(h)[0],
    "attention": lambda h: F.scaled_dot_product_attention(h[None], W[None], W[None]),
}
READ = {
    "branch": chosen,
    "number": lambda h: W * float(h[0, 0]),
    "count": lambda h: W * len((h > 0.5).nonzero()),
    "mask": lambda h: W * len(W[h[:, 0] > 0.5]),
    "numpy": lambda h: torch.from_numpy(h.numpy() + 1),
    "list": lambda h: torch.tensor(h.tolist()),
    "dlpack": lambda h: torch.from_dlpack(h),
    "own": Own.apply,
    "control-flow": lambda h: torch.cond(h.sum() > 0, lambda x: x + 1, lambda x: x - 1, (W,)),
}
NOT = {
    "shape": lambda h: torch.zeros_like(h) + h.new_ones(len(h), 4) + W,
    "other": lambda h: W * torch.tensor(2.0),
    "rows": lambda h: W[[0, 1]],
}


@pytest.mark.parametrize("name", [*COMES_FROM_IT, *READ, *NOT])
def test_what_a_value_comes_from(name):
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), Dependence() as dependence:
        h, other = torch.rand(6, 4), torch.rand(6, 4)
        dependence.mark(h, "h")
        dependence.mark(other, "other")
        out = {**COMES_FROM_IT, **READ, **NOT}[name](h)
        assert ("h" in dependence.of(out)) == (name not in NOT)
        assert ("h" in dependence.read) == (name in READ)
        assert "other" not in dependence.of(out) or name == "control-flow"
        assert dependence.of([out, {"of": other}]) >= {"other"}
        assert not dependence.of(dependence.cut(h)) - dependence.read


def test_rows_by_number_tell_the_host_nothing():
    """Nor does a mask that comes from elsewhere: only what decides the shape is read."""
    with torch.no_grad(), Dependence() as dependence:
        h = torch.rand(6, 4)
        dependence.mark(h, "h")
        for rows in (h[[0, 3]], h[:, torch.tensor([1, 0])], h[W[:, 0] > 0.5]):
            assert dependence.of(rows) == {"h"} and not dependence.read
