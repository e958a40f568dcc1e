import pytest
import torch

from vqgnn_kernels import _tiles, csr_slice, csr_slice_values
from vqgnn_kernels.csr_slice import reference as truth
from vqgnn_kernels.csr_slice import triton as kernels


def csr_of(degrees, num_nodes, device):
    """Random columns, so with duplicate edges and self-loops."""
    rowptr = torch.zeros(num_nodes + 1, dtype=torch.int64)
    rowptr[1:] = torch.as_tensor(degrees).cumsum(0)
    col = torch.randint(num_nodes, (int(rowptr[-1]),), dtype=torch.int32)
    return rowptr.to(device), col.to(device)


def check(rowptr, col, nodes):
    values = torch.rand(col.shape[0], device=col.device)
    sliced, want = csr_slice(rowptr, col, nodes), truth.csr_slice(rowptr, col, nodes)
    for ours, wanted in zip(sliced, want, strict=True):
        assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)
    values_b = csr_slice_values(rowptr, nodes, sliced[0], values)
    assert torch.equal(values_b, truth.csr_slice_values(rowptr, nodes, None, values))
    return sliced


@pytest.fixture
def small_tile(monkeypatch):
    """Many programs for few edges, so that rows and the halo's first appearances span them."""
    for name in [name for name in _tiles.TILES if name.startswith("csr_slice")]:
        monkeypatch.setitem(_tiles.TILES, name, (_tiles.Tile({"BLOCK_E": 16}),))


@pytest.mark.parametrize("num_edges", [0, 30, 1300])
@pytest.mark.parametrize("b", [0, 1, 7, 40])
def test_matches_reference(b, num_edges, device):
    degrees = torch.bincount(torch.randint(40, (num_edges,)), minlength=40)
    check(*csr_of(degrees, 40, device), torch.randperm(40)[:b].to(device))


def test_rows_span_programs(device, small_tile):
    """A long row beside empty and short ones, first and last ones among them."""
    degrees = torch.tensor([0, 3, 0, 100, 16, 1, 0, 0, 15, 0] + [2] * 190)
    nodes = torch.tensor([6, 3, 0, 8, 2, 150, 4, 5, 1, 9], device=device)
    check(*csr_of(degrees, 200, device), nodes)


def test_halo_is_in_order_of_first_appearance(device, small_tile):
    """The later program of the grid sees a column again that an earlier one saw first."""
    col = torch.arange(99, 2, -1, dtype=torch.int32).repeat(2).to(device)
    rowptr = torch.zeros(101, dtype=torch.int64, device=device)
    rowptr[1:] = col.shape[0]
    rowptr_b, col_b, halo = csr_slice(rowptr, col, torch.tensor([0, 50], device=device))
    assert halo.tolist() == [c for c in range(99, 2, -1) if c != 50]
    assert rowptr_b.tolist() == [0, 194, 194]
    assert torch.equal(torch.cat([torch.tensor([0, 50], device=device), halo])[col_b.long()], col.long())


def test_no_halo_and_whole_graph(device):
    rowptr, col = csr_of([3] * 20, 20, device)
    assert check(rowptr, col, torch.randperm(20).to(device))[2].numel() == 0
    assert check(rowptr, torch.full_like(col, 4), torch.tensor([4], device=device))[2].numel() == 0
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    check(nothing.new_zeros(1), nothing.int(), nothing)


def test_tensors_need_not_be_contiguous(device):
    rowptr, col = csr_of([3] * 20, 20, device)
    nodes = torch.randperm(20)[:8].to(device)
    strided = [torch.stack([t, torch.full_like(t, 77)], 1)[:, 0] for t in (rowptr, col, nodes)]
    for ours, want in zip(csr_slice(*strided), truth.csr_slice(rowptr, col, nodes), strict=True):
        assert torch.equal(ours, want)


def test_graph_with_positions_in_64_bits(device, monkeypatch):
    monkeypatch.setattr(kernels, "_INT32_EDGES", 0)
    check(*csr_of([5] * 40, 40, device), torch.randperm(40)[:13].to(device))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("nodes spans 0..20; the graph has nodes 0..19", lambda a: a.update(nodes=torch.tensor([0, 20]))),
        ("nodes spans -1..3", lambda a: a.update(nodes=torch.tensor([3, -1]))),
        ("nodes holds a node twice", lambda a: a.update(nodes=torch.tensor([3, 5, 3]))),
        ("nodes holds a node twice", lambda a: a.update(nodes=torch.arange(21) % 20)),
        ("rowptr must rise", lambda a: a["rowptr"].__setitem__(int(a["nodes"][0]), 81)),
        ("rowptr is empty", lambda a: a.update(rowptr=a["rowptr"][:0], nodes=a["nodes"][:0])),
        ("col spans 0..20", lambda a: a["col"].copy_(torch.arange(80, dtype=torch.int32) % 21)),
        ("col spans -1..0", lambda a: a["col"].fill_(0)[::4].fill_(-1)),
    ],
)
def test_bad_entries_are_reported(message, change, device):
    rowptr, col = csr_of([4] * 20, 20, "cpu")
    arguments = {"rowptr": rowptr, "col": col, "nodes": torch.arange(20)}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        csr_slice(**{name: tensor.to(device) for name, tensor in arguments.items()})


def test_bad_columns_of_other_rows_do_not_matter(device):
    rowptr, col = csr_of([4] * 20, 20, device)
    col[-1] = 99
    check(rowptr, col, torch.arange(19, device=device))


def test_values_need_their_own_rowptr(device):
    rowptr, col = csr_of([4] * 20, 20, device)
    nodes = torch.randperm(20)[:6].to(device)
    rowptr_b = csr_slice(rowptr, col, nodes)[0]
    for wrong in (rowptr_b + 1, torch.zeros_like(rowptr_b), rowptr_b * 2):
        with pytest.raises(ValueError, match="rowptr_b"):
            csr_slice_values(rowptr, nodes, wrong, torch.rand(80, device=device))
    with pytest.raises(ValueError, match="nodes spans"):
        csr_slice_values(rowptr, nodes + 20, rowptr_b, torch.rand(80, device=device))
