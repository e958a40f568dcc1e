"""The basis that gradients' coordinates are taken in: it finds the largest directions, follows them, does not turn."""

import pytest
import torch

from vqgnn.basis import Basis

DIM, RANK = 48, 12


def rows(directions, count=3000):
    """Rows whose size along direction i falls with i."""
    return torch.randn(count, DIM) * torch.logspace(0, -2, DIM) @ directions.T


def directions():
    return torch.linalg.qr(torch.randn(DIM, DIM))[0]


def captured(basis, x):
    return float((x @ basis.vectors).square().sum() / x.square().sum())


def check_orthonormal(basis):
    torch.testing.assert_close(basis.vectors.T @ basis.vectors, torch.eye(RANK), atol=1e-5, rtol=0)


def test_first_batch_gives_its_principal_directions():
    found = directions()
    x, basis = rows(found), Basis(DIM, RANK)
    basis.update(x)
    check_orthonormal(basis)
    best = torch.linalg.svdvals(x.double()).square()
    assert captured(basis, x) == pytest.approx(float(best[:RANK].sum() / best.sum()), abs=0.01)  # of some of its rows


def test_follows_rows_that_turn():
    found, basis = directions(), Basis(DIM, RANK)
    for _ in range(120):
        turn = 1e-3 * torch.randn(DIM, DIM)
        found = torch.linalg.matrix_exp(turn - turn.T) @ found
        x = rows(found)
        basis.update(x)
    check_orthonormal(basis)
    best = float((x @ found[:, :RANK]).square().sum() / x.square().sum())
    assert captured(basis, x) > best - 0.01


def test_finds_other_directions_step_by_step():
    basis, x = Basis(DIM, RANK), rows(directions())
    basis.update(x)
    found = directions()
    x = rows(found)
    before = captured(basis, x)
    for _ in range(80):
        basis.update(x)
    check_orthonormal(basis)
    best = float((x @ found[:, :RANK]).square().sum() / x.square().sum())
    assert captured(basis, x) > best - 0.01 > before


def test_stands_still_where_rows_do():
    """The same span, so the same vectors, though the sizes within it change: coordinates keep their meaning."""
    found, basis = directions()[:, :RANK], Basis(DIM, RANK)
    basis.update(torch.randn(2000, RANK) * torch.logspace(0, -1, RANK) @ found.T)
    before = basis.vectors.clone()
    for _ in range(20):
        basis.update(torch.randn(2000, RANK) * torch.logspace(-1, 0, RANK) @ found.T)
    torch.testing.assert_close(basis.vectors, before, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [1e-12, 1e6])
def test_few_directions_none_and_any_size(size):
    basis = Basis(DIM, RANK)
    x = size * torch.randn(500, 5) @ torch.randn(5, DIM)  # of lower rank than the basis
    for _ in range(30):
        basis.update(x)
    assert captured(basis, x) == pytest.approx(1, abs=1e-4)
    for _ in range(100):
        basis.update(torch.zeros(10, DIM))
    basis.update(torch.randn(1, DIM))
    check_orthonormal(basis)


def test_nothing_to_begin_with():
    basis = Basis(DIM, RANK)
    basis.update(torch.zeros(10, DIM))
    check_orthonormal(basis)
    x = rows(directions())
    for _ in range(80):
        basis.update(x)
    check_orthonormal(basis)
    assert captured(basis, x) > 0.9
