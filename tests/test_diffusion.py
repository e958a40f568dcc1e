"""Graph diffusion against PyG's transform, whose exact mode inverts (or exponentiates) a dense matrix."""

import copy

import pytest
import torch
from graphs import awkward_graph
from torch_geometric.nn import GCNConv
from torch_geometric.transforms import GDC
from torch_geometric.utils import to_dense_adj

import vqgnn
from vqgnn import diffusion

DIFFUSIONS = {
    "ppr": {"method": "ppr", "alpha": 0.15},
    "ppr, far": {"method": "ppr", "alpha": 0.02},
    "heat": {"method": "heat", "t": 5.0},
}


def dense(data):
    """[n, n] from edges and weights; PyG's transform calls the weights edge_attr."""
    weight = data.edge_weight if "edge_weight" in data else data.edge_attr
    return to_dense_adj(data.edge_index, edge_attr=weight, max_num_nodes=data.num_nodes)[0]


def pygs(data, diffusion, sparsification, **options):
    data = copy.copy(data)
    data.edge_attr = data.edge_weight if "edge_weight" in data else None
    data.edge_weight = None
    return GDC(diffusion_kwargs=diffusion, sparsification_kwargs=sparsification, **options)(data)


@pytest.mark.parametrize("undirected", [False, True], ids=["directed", "undirected"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("name", DIFFUSIONS)
def test_thresholds_give_pygs_graph(name, weighted, undirected):
    data = awkward_graph(undirected=undirected, weighted=weighted)
    mine = vqgnn.gdc(data, **DIFFUSIONS[name], eps=0.013, block=7)
    theirs = pygs(data, DIFFUSIONS[name], {"method": "threshold", "eps": 0.013})
    assert 100 < mine.num_edges < 1500  # of 1600: something was left out
    torch.testing.assert_close(dense(mine), dense(theirs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("normalization_out", ["sym", "col", "row", None])
@pytest.mark.parametrize("normalization_in", ["sym", "col", "row"])
@pytest.mark.parametrize("self_loop_weight", [0.0, 0.5])
def test_options_give_pygs_graph(self_loop_weight, normalization_in, normalization_out):
    options = {
        "self_loop_weight": self_loop_weight,
        "normalization_in": normalization_in,
        "normalization_out": normalization_out,
    }
    for undirected in (False, True):
        data = awkward_graph(undirected=undirected)
        mine = vqgnn.gdc(data, eps=0.013, **options)
        theirs = pygs(data, DIFFUSIONS["ppr"], {"method": "threshold", "eps": 0.013}, **options)
        torch.testing.assert_close(dense(mine), dense(theirs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 5, 100])
def test_the_largest_weights_into_every_node_are_kept(k):
    data = awkward_graph(weighted=True)
    mine = vqgnn.gdc(data, top_k=k)
    theirs = pygs(data, DIFFUSIONS["ppr"], {"method": "topk", "k": k, "dim": 0})  # with the zeros among the k largest
    torch.testing.assert_close(dense(mine), dense(theirs), atol=2e-5, rtol=1e-4)
    assert mine.edge_weight.min() > 0 and mine.edge_index[1].bincount().max() <= k


def test_other_data_stay_and_the_given_graph_too():
    data = awkward_graph(weighted=True)
    data.edge_attr = torch.randn(data.num_edges, 2)
    before = copy.deepcopy(data)
    result = vqgnn.gdc(data, top_k=3)
    assert "edge_attr" not in result and result.x is data.x and result.y is data.y
    assert all(torch.equal(data[key], value) for key, value in before)


def test_blocks_do_not_change_the_result():
    data = awkward_graph()
    whole, blocks = vqgnn.gdc(data, top_k=4, block=40), vqgnn.gdc(data, top_k=4, block=3)
    assert torch.equal(whole.edge_index, blocks.edge_index) and torch.equal(whole.edge_weight, blocks.edge_weight)


def test_symmetric_graphs_need_fewer_terms():
    counts = [len(diffusion._series("ppr", 0.15, 5.0, 1e-6, chebyshev)) for chebyshev in (False, True)]
    assert counts[1] <= counts[0] / 3


def test_convs_train_on_the_diffused_graph():
    """Fused, with its weights as they are."""
    data = vqgnn.gdc(awkward_graph(), top_k=6)
    conv = GCNConv(6, 3, normalize=False)
    expected = conv(data.x, data.edge_index, data.edge_weight)
    vqgnn.convert(conv, data, method="lmc", input="codes")
    assert vqgnn.paths(conv)[0].path == "fused"
    for batch in vqgnn.BatchLoader(data, batch_size=13, prefetch=0):
        torch.testing.assert_close(conv(batch.x, batch.graph), expected[batch.n_id])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "katz"}, "method='katz' is unknown; choose one of ppr, heat"),
        ({"alpha": 1.0}, r"alpha=1.0 is not allowed; it must be in \(0, 1\)"),
        ({"top_k": 0}, "top_k=0 is not allowed; it must be at least 1"),
        ({"normalization_in": None}, "normalization_in=None is unknown; choose one of 'sym'"),
        ({"alpha": 1e-7}, "need more than 2048 terms; use a larger alpha"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        vqgnn.gdc(awkward_graph(), **options)


def test_weights_that_do_not_fit_are_refused():
    data = awkward_graph(weighted=True)
    data.edge_weight[3] = -1.0
    with pytest.raises(ValueError, match=r"data\.edge_weight .* must be one number >= 0 for each edge"):
        vqgnn.gdc(data)
