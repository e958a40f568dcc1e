"""Stored rows that follow the weights, against rows that were stored with the present ones."""

import pytest
import torch
from graphs import awkward_graph
from torch_geometric.nn.models import GAT, GCN

import vqgnn
from vqgnn.alignment import align


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("f", [1, 7, 32])
def test_an_affine_change_is_undone(f):
    before, w, b = rows(300, f), torch.eye(f) + 0.3 * rows(f, f, seed=1), rows(f, seed=2)
    after = before @ w + b
    found = align(before[100:], before[:100], after[:100], ridge=1e-6)
    torch.testing.assert_close(found, after[100:], rtol=1e-3, atol=1e-3)
    assert (align(before[100:], before[:100], after[:100]) - after[100:]).norm() < 0.05 * (after - before)[100:].norm()


@pytest.mark.parametrize("b", [1, 5])
def test_few_rows_and_constant_channels(b):
    """A batch of one row knows a shift only; nothing moved, nothing changes."""
    stored, halo, shift = rows(b, 8), rows(9, 8, seed=1), rows(8, seed=2)
    stored[:, 3] = 2.0
    fresh = (stored + shift).requires_grad_()
    found = align(halo, stored, fresh)
    torch.testing.assert_close(found, halo + shift)
    assert torch.autograd.grad(found.square().sum(), fresh)[0].isfinite().all()
    torch.testing.assert_close(align(halo, stored, stored), halo)


def test_the_gradient_reaches_the_batchs_rows():
    stored, halo, weight = rows(12, 3).double(), rows(5, 3, seed=1).double(), rows(5, 3, seed=2)
    fresh = (rows(12, 3, seed=3)).requires_grad_()
    found = torch.autograd.grad((align(halo.float(), stored.float(), fresh) * weight).sum(), fresh)[0]
    centred, other = stored - stored.mean(0), halo - stored.mean(0)
    gram = centred.T @ centred
    inverse = torch.linalg.inv(gram + (0.01 * gram.diagonal()).diag())
    share = 1 / 12 + other @ inverse @ centred.T  # d halo / d fresh, the same for every channel
    torch.testing.assert_close(found, (share.T @ weight.double()).float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3), (4, 3)), ((4, 2), (5, 3), (5, 3)), ((4, 3), (0, 3), (0, 3))])
def test_bad_shapes_are_named(shapes):
    with pytest.raises(ValueError, match=r"expected \[h, f\], \[b, f\]"):
        align(*map(torch.zeros, shapes))


@pytest.mark.parametrize("method, codec", [("gas", None), ("gas", "int8"), ("vq", "pq:d=2,k=128")])
@pytest.mark.parametrize("place", ["device", "disk"])
def test_messages_follow_a_linear_change(method, codec, place, tmp_path):
    """Weights of the layer below change after its states were stored: aligned, messages stay right."""
    data = awkward_graph(200, 900, undirected=True)
    errors = {}
    for name in (True, False):
        torch.manual_seed(0)
        model = GAT(6, 8, 2, 3, heads=2, act=None).eval()
        vqgnn.convert(model, data, method=method, codec=codec, align=name, place=place, folder=tmp_path)
        with torch.no_grad():
            model.convs[1].lin.weight.copy_(model.convs[1].lin.weight @ (torch.eye(8) + 0.5 * rows(8, 8)))
        truth = vqgnn.inference.layerwise(model, data)
        batch = next(iter(vqgnn.BatchLoader(data, batch_size=90, seed=0)))
        with torch.no_grad():
            out = model(batch.x, batch.graph)
        errors[name] = float((out - truth[batch.n_id]).norm() / truth[batch.n_id].norm())
        errors["messages", name] = vqgnn.diagnostics.error_bound(model, data, batch)[0].messages
    assert errors[True] < 0.3 * errors[False], errors
    assert errors["messages", True] < 0.3 * errors["messages", False], errors


def test_whole_batches_and_frozen_weights_stay_exact():
    data = awkward_graph(60, 240)
    torch.manual_seed(0)
    model = vqgnn.convert(GAT(6, 8, 3, 3, heads=2).eval(), data, method="gas", align=True)
    truth = vqgnn.inference.layerwise(model, data)
    for size in (60, 13):
        for batch in vqgnn.BatchLoader(data, batch_size=size, seed=0):
            torch.testing.assert_close(model(batch.x, batch.graph), truth[batch.n_id], rtol=1e-3, atol=1e-4)


def test_who_is_aligned():
    data = awkward_graph(30, 90)

    def uses(build, **options):
        model = vqgnn.convert(build(6, 8, 2, 3), data, **options)
        return [conv.store_use.align for conv in model.convs]

    assert uses(GAT, align=True) == [False, True]  # the first layer reads exact features
    assert uses(GAT, align=True, method="lmc") == [False, True]
    assert uses(GAT) == [False, False]
    with pytest.raises(ValueError, match="align=True, grad=True"):
        uses(GAT, align=True, grad=True)
    with pytest.raises(ValueError, match="attention that reads stored rows, not GCNConv"):
        uses(GCN, align=True)
    with pytest.raises(ValueError, match="with method='drop'"):
        uses(GAT, align=True, method="drop")


@pytest.mark.parametrize("v2", [False, True])
def test_limited_attention(v2):
    """Scores move by at most L times what a row does, and vectors within the bound stay."""
    torch.manual_seed(0)
    model = GAT(6, 8, 2, 3, heads=2, v2=v2)
    conv = model.convs[0]
    vectors = [conv.att] if v2 else [conv.att_src, conv.att_dst]
    with torch.no_grad():
        for vector in vectors:
            vector[0, 0] *= 30 / vector[0, 0].norm()
            vector[0, 1] *= 0.5 / vector[0, 1].norm()
    kept = [vector[0, 1].clone() for vector in vectors]
    vqgnn.nn.limit_attention(model, 2.0)
    for vector, small in zip(vectors, kept, strict=True):
        assert vector.norm(dim=-1).flatten().tolist() == pytest.approx([2.0, 0.5])
        assert torch.equal(vector[0, 1], small)


@pytest.mark.parametrize("build, lipschitz", [(GAT, 0.0), (GAT, -1.0), (GCN, 8.0)])
def test_attention_without_a_bound(build, lipschitz):
    with pytest.raises(ValueError, match=f"lipschitz={lipschitz} for a {build.__name__}"):
        vqgnn.nn.limit_attention(build(6, 8, 2, 3), lipschitz)
