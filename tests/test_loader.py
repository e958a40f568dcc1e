import itertools
import subprocess
import sys
import threading
import time

import pytest
import torch
from graphs import awkward_graph, dense_convolution, dense_rows

from vqgnn import BatchLoader, Convolution, Graph, partition
from vqgnn import loader as loader_module

SAMPLERS = pytest.mark.parametrize("sampler", ["node", "cluster"])  # each node once an epoch
ALL_SAMPLERS = pytest.mark.parametrize("sampler", ["node", "cluster", "edge", "walk"])


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "vqgnn-loader"]


@pytest.fixture
def data():
    return awkward_graph()


@pytest.fixture
def load(data, tmp_path):
    return lambda **options: BatchLoader(data, **{"cache_dir": tmp_path, **options})


def node_ids(loader):
    return [batch.n_id.tolist() for batch in loader]


@SAMPLERS
@pytest.mark.parametrize(
    ("size", "batches"),
    [
        ({}, 10),
        ({"batch_size": 7}, 6),
        ({"batch_size": 1}, 40),
        ({"batch_size": 40}, 1),
        ({"batch_size": 99}, 1),
        ({"num_parts": 5}, 5),
        ({"num_parts": 7, "parts_per_batch": 2}, 4),
        ({"num_parts": 7, "parts_per_batch": 7}, 1),
        ({"num_parts": 100}, 40),
    ],
    ids=str,
)
def test_every_epoch_visits_each_node_once(load, sampler, size, batches):
    loader = load(sampler=sampler, **size)
    for _ in range(2):
        ids = node_ids(loader)
        assert len(ids) == len(loader)
        # METIS leaves parts empty when there are as many parts as nodes
        assert len(ids) == batches or (sampler == "cluster" and batches == 40 and len(ids) > 1)
        assert sorted(itertools.chain(*ids)) == list(range(40))
        assert all(ids) and all(batch == sorted(batch) for batch in ids)


def test_node_batches_have_the_size_asked_for(load):
    assert {len(ids) for ids in node_ids(load(batch_size=10))} == {10}
    assert {len(ids) for ids in node_ids(load(batch_size=9))} == {8}  # 5 even batches, not 4 and a rest of 4


@ALL_SAMPLERS
def test_order_depends_on_seed_and_epoch_alone(load, sampler):
    state = torch.get_rng_state()
    options = {"num_parts": 10, "parts_per_batch": 2, "sampler": sampler}
    first = load(seed=3, **options)
    epochs = [node_ids(first) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    torch.rand(7)
    second = load(seed=3, **options)
    for epoch in (2, 0, 1):
        second.set_epoch(epoch)
        assert node_ids(second) == epochs[epoch]
    assert node_ids(second) == epochs[2]  # goes on counting from there
    assert node_ids(load(seed=4, **options)) != epochs[0]
    torch.set_rng_state(state)


def test_loader_leaves_the_global_generator_alone(load):
    state = torch.get_rng_state()
    node_ids(load())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**63])
def test_any_seed(load, seed):
    assert sorted(itertools.chain(*node_ids(load(seed=seed)))) == list(range(40))


def test_no_shuffle_takes_nodes_in_order(load):
    loader = load(batch_size=10, shuffle=False)
    for _ in range(2):
        assert list(itertools.chain(*node_ids(loader))) == list(range(40))


def test_cluster_batches_are_parts_joined_anew(load, data, tmp_path):
    parts = [set(part.tolist()) for part in partition(data.edge_index, 40, 8, tmp_path)]
    loader = load(num_parts=8, parts_per_batch=2, sampler="cluster")
    unions = {frozenset(a | b) for a, b in itertools.combinations(parts, 2)}
    epochs = [{frozenset(ids) for ids in node_ids(loader)} for _ in range(4)]
    assert all(epoch <= unions for epoch in epochs)
    assert len(set(map(frozenset, epochs))) > 1


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_tensors_are_the_batch_nodes_rows(load, data, prefetch):
    data.position = torch.randn(40, 2, 3)
    data.n_id = torch.arange(40) + 1000  # as NeighborLoader leaves it; must not shadow the batch's own
    data.graph = torch.randn(40)
    data.level = 3
    data.name = "awkward"
    for batch in load(batch_size=9, prefetch=prefetch):
        assert batch.num_nodes == batch.n_id.numel()
        for key in ("x", "y", "train_mask", "position"):
            assert torch.equal(getattr(batch, key), data[key][batch.n_id]), key
        assert batch.graph.n_id is batch.n_id and batch.n_id.max() < 40
        assert batch.edge_index is batch.graph and not hasattr(batch, "level")
        assert f"n_id=[{batch.num_nodes}]" in repr(batch)


def test_labels_and_masks_may_be_replaced(load, data):
    loader = load(batch_size=9, sampler="edge")
    data.y, data.val_mask = data.y + 5, torch.rand(40) < 0.5
    for batch in loader:
        assert torch.equal(batch.y, data.y[batch.n_id]) and torch.equal(batch.val_mask, data.val_mask[batch.n_id])
        assert batch.loss_weight.shape == batch.n_id.shape


def test_edge_tensors_stay_out_though_there_are_as_many_edges_as_nodes():
    data = awkward_graph(weighted=True)
    data.edge_index, data.edge_weight = data.edge_index[:, :40], data.edge_weight[:40]
    batch = next(iter(BatchLoader(data, batch_size=10)))
    assert batch.edge_weight is None and batch.edge_index is batch.graph


def test_one_batch_is_the_graph_itself(load, data):
    (batch,) = load(batch_size=40)
    assert batch.x is data.x and batch.y is data.y and batch.graph.whole
    assert batch.n_id.tolist() == list(range(40))


@ALL_SAMPLERS
def test_prefetching_changes_nothing(load, data, sampler):
    convolution = Convolution("gcn")
    graph = Graph.of(data)
    graph.wanted.add(graph, (convolution, "csr"), (Convolution("mean"), "input_messages"))
    dense = dense_convolution(data, "gcn")
    runs = [load(batch_size=11, sampler=sampler, prefetch=prefetch) for prefetch in (0, 1, 2, 50)]
    for batches in zip(*runs, strict=True):
        for batch in batches:
            assert torch.equal(batch.n_id, batches[0].n_id) and torch.equal(batch.x, batches[0].x)
            # built by the thread already, and right
            torch.testing.assert_close(
                dense_rows(batch.graph._made["csr", convolution][0], batch.n_id, 40),
                dense[batch.n_id],
                atol=1e-6,
                rtol=1e-6,
            )
            assert torch.equal(
                batch.graph._made["input_messages", Convolution("mean")], graph.product(Convolution("mean"))[batch.n_id]
            )


def test_batches_are_built_ahead_but_not_far(load):
    loader = load(batch_size=1, prefetch=2)
    built, build = [], loader._build
    loader._build = lambda n_id, **options: built.append(n_id) or build(n_id, **options)
    batches = iter(loader)
    next(batches)
    deadline = time.monotonic() + 60
    while len(built) < 3 and time.monotonic() < deadline:  # the one taken, two ahead
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(built) == 3
    batches.close()
    assert not loader_threads()


@pytest.mark.parametrize("limit,ahead", [(4 * 6 * 10, 2), (4 * 6 * 10 - 1, 1)])
def test_fewer_wide_batches_are_built_ahead(load, monkeypatch, limit, ahead):
    """Of ten nodes with 6 features: by default, not where a number is given."""
    monkeypatch.setattr(loader_module, "_WIDE", limit)
    assert load(batch_size=10).prefetch == ahead
    assert load(batch_size=10, prefetch=3).prefetch == 3


@pytest.mark.parametrize("thread", ["none", "daemon"])
def test_the_interpreter_may_end_with_a_pass_under_way(thread):
    program = f"""if True:
        import threading, torch, vqgnn
        from torch_geometric.data import Data
        from vqgnn.graph import Graph
        data = Data(x=torch.randn(20_000, 16), edge_index=torch.randint(20_000, (2, 400_000)))
        Graph.of(data).wanted.add(data, (vqgnn.graph.Convolution("sum"), "csr"))
        def use():
            global batches
            batches = iter(vqgnn.BatchLoader(data, batch_size=5_000, prefetch=1))
            next(batches)
            assert [t.daemon for t in threading.enumerate() if t.name == "vqgnn-loader"] == [False]
        if "{thread}" == "none":
            use()
        else:
            user = threading.Thread(target=use, daemon=True)
            user.start()
            user.join()
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("prefetch", [0, 2])
def test_no_two_passes_have_the_same_number(load, prefetch):
    numbers = []
    for loader in (load(prefetch=prefetch), load(prefetch=prefetch)):
        numbers += [{int(batch.graph.visit[0]) for batch in loader} for _ in range(2)]
        assert int(next(iter(loader)).graph.visit[0]) not in set.union(*numbers)
    assert [len(of_pass) for of_pass in numbers] == [1] * 4 and len(set.union(*numbers)) == 4


def test_early_break_ends_the_thread(load):
    loader = load(batch_size=2)
    for _ in loader:
        assert loader_threads()
        break
    assert not loader_threads()
    with pytest.raises(KeyError, match="by the caller"):
        for _ in loader:
            raise KeyError("by the caller")
    assert not loader_threads()
    assert sorted(itertools.chain(*node_ids(loader))) == list(range(40))
    assert not loader_threads()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_thread_reach_the_caller(load, prefetch):
    loader = load(batch_size=10, prefetch=prefetch)
    build = loader._build
    calls = itertools.count()

    def fail(n_id, **options):
        if next(calls) == 2:
            raise OSError("disk gone")
        return build(n_id, **options)

    loader._build = fail
    seen = []
    with pytest.raises(OSError, match="disk gone"):
        for batch in loader:
            seen.append(batch)
    assert len(seen) == 2
    assert not loader_threads()


def test_two_passes_at_once(load):
    loader = load(batch_size=10)
    alone = [node_ids(loader), node_ids(loader)]
    loader.set_epoch(0)
    together = [(a.n_id.tolist(), b.n_id.tolist()) for a, b in zip(loader, loader, strict=True)]
    assert [list(run) for run in zip(*together, strict=True)] == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "metis"}, "sampler='metis' is unknown; choose one of node, cluster, edge, walk"),
        ({"batch_size": 3, "num_parts": 2}, "batch_size=3 and num_parts=2 were both given"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_parts": 3, "parts_per_batch": 4}, r"parts_per_batch=4 must be in 1\.\.num_parts=3"),
        ({"num_parts": 3, "parts_per_batch": 0}, "parts_per_batch=0"),
        ({"num_parts": 0}, "num_parts=0"),
        ({"sampler": "walk", "shuffle": False}, "sampler='walk' draws at random"),
        ({"prefetch": -1}, "prefetch=-1 must be 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_what_has_no_row_a_node_is_not_brought_and_named(data, load):
    data.knn_index = torch.zeros(3, 40, dtype=torch.int64)  # PyG: nodes along the last dimension
    data.train_idx = torch.arange(5)
    batch = next(iter(load(batch_size=10)))
    assert batch.y.shape == (10,) and batch.edge_index is batch.graph and batch.edge_attr is None
    for name in ("knn_index", "train_idx", "to"):
        with pytest.raises(AttributeError, match=rf"a batch has no '{name}'; it has graph, num_nodes and x, .*y"):
            getattr(batch, name)
    assert not hasattr(batch, "__torch_function__")


def test_a_pass_goes_on_though_the_thread_that_began_it_has_ended(load):
    found = []
    starter = threading.Thread(target=lambda: found.append(iter(load(batch_size=4, prefetch=1))) or next(found[0]))
    starter.start()
    starter.join()
    assert len(list(found[0])) == 9
