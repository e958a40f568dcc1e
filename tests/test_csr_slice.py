import threading

import pytest
import torch

from vqgnn_kernels import csr_slice, csr_slice_values
from vqgnn_kernels.csr_slice import reference as truth


def random_csr(num_nodes, num_edges):
    """Random columns, so with isolated nodes, duplicate edges and self-loops."""
    row = torch.randint(num_nodes, (num_edges,)).sort().values
    rowptr = torch.zeros(num_nodes + 1, dtype=torch.int64)
    rowptr[1:] = torch.bincount(row, minlength=num_nodes).cumsum(0)
    return rowptr, torch.randint(num_nodes, (num_edges,), dtype=torch.int32)


def same(ours, want):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, want, strict=True))


@pytest.mark.parametrize("num_edges", [0, 30, 200, 2000])
@pytest.mark.parametrize("b", [0, 1, 7, 40])
def test_matches_reference(b, num_edges):
    rowptr, col = random_csr(40, num_edges)
    values, nodes = torch.rand(num_edges), torch.randperm(40)[:b]
    sliced = csr_slice(rowptr, col, nodes)
    assert same(sliced, truth.csr_slice(rowptr, col, nodes))
    values_b = csr_slice_values(rowptr, nodes, sliced[0], values)
    assert torch.equal(values_b, truth.csr_slice_values(rowptr, nodes, None, values))


def test_slice_is_the_rows_relabelled():
    """By the definition, without the reference."""
    rowptr, col = random_csr(40, 200)
    nodes = torch.randperm(40)[:9]
    rowptr_b, col_b, halo = csr_slice(rowptr, col, nodes)
    back = torch.cat([nodes, halo])
    assert back.unique().numel() == back.numel()
    first_seen = dict.fromkeys(c for c in col_b.tolist() if c >= 9)
    assert list(first_seen) == list(range(9, 9 + halo.numel()))
    for i, node in enumerate(nodes.tolist()):
        mine = col_b[rowptr_b[i] : rowptr_b[i + 1]].long()
        assert back[mine].tolist() == col[rowptr[node] : rowptr[node + 1]].tolist()


def test_scratch_is_clean_after_every_call_and_error():
    """Graphs of several sizes and failing calls in turn: the labels kept between calls must not leak."""
    graphs = [random_csr(n, 5 * n) for n in (30, 200, 60)]
    for _ in range(5):
        for rowptr, col in graphs:
            n = rowptr.shape[0] - 1
            nodes = torch.randperm(n)[: n // 3]
            assert same(csr_slice(rowptr, col, nodes), truth.csr_slice(rowptr, col, nodes))
            with pytest.raises(ValueError, match="nodes holds a node twice"):
                csr_slice(rowptr, col, torch.cat([nodes, nodes[:1]]))
            wild = col.clone()
            wild[int(rowptr[nodes[-1] + 1]) - 1] = n
            if rowptr[nodes[-1] + 1] > rowptr[nodes[-1]]:
                with pytest.raises(ValueError, match="col spans"):
                    csr_slice(rowptr, wild, nodes)


def test_threads_have_their_own_scratch():
    rowptr, col = random_csr(500, 5000)
    batches = [torch.randperm(500)[:50] for _ in range(40)]
    wanted = [truth.csr_slice(rowptr, col, nodes) for nodes in batches]
    good = []

    def work():
        good.append(all(same(csr_slice(rowptr, col, n), want) for n, want in zip(batches, wanted, strict=True)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 4


def test_opcheck():
    rowptr, col = random_csr(20, 80)
    nodes = torch.randperm(20)[:6]
    torch.library.opcheck(torch.ops.vqgnn.csr_slice, (rowptr, col, nodes))
    rowptr_b = csr_slice(rowptr, col, nodes)[0]
    torch.library.opcheck(torch.ops.vqgnn.csr_slice_values, (rowptr, nodes, rowptr_b, torch.rand(80)))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("rowptr has dtype", lambda a: a.update(rowptr=a["rowptr"].int())),
        ("col has dtype", lambda a: a.update(col=a["col"].long())),
        ("nodes has shape", lambda a: a.update(nodes=a["nodes"][None])),
        ("nodes spans 0..20; the graph has nodes 0..19", lambda a: a.update(nodes=torch.tensor([0, 20]))),
        ("nodes spans -1..3", lambda a: a.update(nodes=torch.tensor([3, -1]))),
        ("rowptr must rise", lambda a: a["rowptr"].__setitem__(int(a["nodes"][0]), 81)),
        ("rowptr is empty", lambda a: a.update(rowptr=a["rowptr"][:0], nodes=a["nodes"][:0])),
    ],
)
def test_errors_say_what_to_do(message, change):
    rowptr, col = random_csr(20, 80)
    arguments = {"rowptr": rowptr, "col": col, "nodes": torch.randperm(20)[:6]}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        csr_slice(**arguments)


def test_values_need_their_own_rowptr():
    rowptr, col = random_csr(20, 80)
    nodes = torch.randperm(20)[:6]
    rowptr_b = csr_slice(rowptr, col, nodes)[0]
    for wrong in (rowptr_b + 1, torch.zeros_like(rowptr_b), rowptr_b * 2):
        with pytest.raises(ValueError, match="rowptr_b"):
            csr_slice_values(rowptr, nodes, wrong, torch.rand(80))
