"""Link prediction: splits, batches, score, and training on real citations."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from graphs import awkward_graph
from torch_geometric.data import Data

import vqgnn
from vqgnn import LinkLoader, datasets
from vqgnn.cli import main
from vqgnn.config import Config, InputError
from vqgnn.link_splits import given_split, random_split
from vqgnn.links import LinkModel, hits, mrr, recall
from vqgnn.train import Trainer

pytestmark = pytest.mark.usefixtures("command_line")
SMALL = {"task": "link", "dataset": "generated:n=300,classes=3,features=8", "batch_size": 600}
SMALL |= {"hidden": 8, "layers": 2, "threads": 1}


def make(graph=None, **changes):
    config = Config(**(SMALL | changes))
    return Trainer(config, graph or datasets.of_config(config))


def pairs_of(edges):
    """The node pairs of edges [2, e], whatever their direction."""
    return {(min(a, b), max(a, b)) for a, b in np.asarray(edges).T.tolist()}


def test_random_split_holds_out_whole_pairs():
    edges = awkward_graph(100, 600, undirected=True).edge_index.numpy()
    message, links = random_split(edges, 100, seed=0)
    joined = {pair for pair in pairs_of(edges) if pair[0] != pair[1]}
    train, val, test = (pairs_of(part) for part in (links.train, links.val, links.test))
    assert train | val | test == joined and len(train) + len(val) + len(test) == len(joined)
    assert len(val) == -(-len(joined) // 20) and len(test) == -(-len(joined) // 10)
    loops = pairs_of(edges) - joined
    assert loops and pairs_of(message) == train | loops
    for negatives in (links.val_negatives, links.test_negatives):
        assert negatives.shape == (2, 100_000) and not pairs_of(negatives) & pairs_of(edges)
        assert (negatives[0] != negatives[1]).all()
    again = random_split(edges, 100, seed=0)[1]
    assert all(torch.equal(value, getattr(again, name)) for name, value in links.tensors().items())
    assert pairs_of(random_split(edges, 100, seed=1)[1].test) != test


def split_file(**changes):
    arrays = {
        "train_edge_id": np.array([0, 2]),
        "val_edge_id": np.array([1]),
        "test_edge_id": np.array([3]),
        "val_neg_dst": np.array([[4, 0]]),
        "test_neg_dst": np.array([[1, 2]]),
    }
    return {key: value for key, value in (arrays | changes).items() if value is not None}


EDGES = np.array([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]], np.int32)


def test_given_split():
    message, links = given_split("file", split_file(), EDGES, 5)
    assert links.train.tolist() == [[0, 2], [1, 3]] and links.val.tolist() == [[1], [2]]
    assert links.val_negatives.tolist() == [[1, 1], [4, 0]] and links.test_negatives.tolist() == [[3, 3], [1, 2]]
    assert message.tolist() == [[0, 2, 4], [1, 3, 0]]  # the edge that is not for training passes messages too
    mask = np.array([True, False, True, False, False])
    assert given_split("file", split_file(message_edge_mask=mask), EDGES, 5)[0].tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_edge_id": None, "test_neg_dst": None}, "lacks val_edge_id, test_neg_dst"),
        ({"train_edge_id": np.array([5])}, r"train_edge_id .* integers 0\.\.4"),
        ({"val_neg_dst": np.array([4, 0])}, "val_neg_dst .* 2-dimensional"),
        ({"val_neg_dst": np.array([[4], [0]])}, "2 rows of val_neg_dst for 1 edges"),
        ({"message_edge_mask": np.ones(4, bool)}, r"must be bool \[5\]"),
    ],
)
def test_given_splits_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        given_split("file", split_file(**changes), EDGES, 5)


USERS, ITEMS = 3, 4
BOUGHT = np.array([[0, 0, 1, 1, 2], [3, 4, 4, 5, 6]])


def recommender_file(**changes):
    arrays = {"num_users": np.int64(USERS), "test_pos": np.array([[0, 2], [6, 3]])} | changes
    return {key: value for key, value in arrays.items() if value is not None}


def test_split_of_a_recommender():
    message, links = given_split("file", recommender_file(val_pos=np.array([[1], [3]])), BOUGHT, 7)
    assert np.array_equal(message, BOUGHT) and np.array_equal(links.train, BOUGHT)
    assert links.val.tolist() == [[1], [3]] and links.test.tolist() == [[0, 2], [6, 3]]
    assert links.metrics == ("recall",) and links.destinations(7) == range(3, 7)
    every = np.stack([np.repeat(np.arange(20), 10), 20 + np.tile(np.arange(10), 20)])
    test, many = every[:, :2], every[:, 2:]
    file = recommender_file(num_users=np.int64(20), test_pos=test)
    message, links = given_split("file", file, many, 30, seed=1)
    assert message.shape == (2, 188) and links.val.shape == (2, 10) and np.array_equal(message, links.train)
    assert sorted(np.concatenate([message, links.val], 1).T.tolist()) == sorted(many.T.tolist())
    other = given_split("file", file, many, 30, seed=2)[1]
    assert not torch.equal(links.val, other.val)
    # edges that are to be found are not learnt, and one that is there twice counts once
    again = given_split("file", file, np.concatenate([many, test, many[:, :50]], 1), 30, seed=1)
    assert np.array_equal(again[0], message) and torch.equal(again[1].val, links.val)
    given = given_split("file", {**file, "val_pos": many[:, 5:9]}, every, 30)
    assert np.array_equal(given[0], np.delete(many, range(5, 9), 1)) and np.array_equal(given[1].train, given[0])


def test_an_edge_to_find_does_not_pass_messages_backwards():
    both = np.concatenate([EDGES, EDGES[::-1]], 1)
    found = [given_split("file", split_file(), both, 5, directed=directed)[0].T.tolist() for directed in (False, True)]
    held_out = [[1, 2], [3, 4]]
    assert all(pair not in found[0] and pair[::-1] not in found[0] for pair in held_out) and len(found[0]) == 6
    assert all(pair not in found[1] and pair[::-1] in found[1] for pair in held_out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_users": None}, "lacks num_users"),
        ({"test_pos": np.array([[0], [7]])}, r"test_pos .* integers 0\.\.6"),
        ({"test_pos": np.array([[3], [6]])}, r"test_pos .* from users 0\.\.2 to items 3"),
        ({"num_users": np.array([3, 4])}, r"num_users \[2\]; it must be one number"),
        ({"val_pos": BOUGHT}, "all of the graph's edges in val_pos and test_pos"),
        ({"num_users": np.int64(4)}, r"the graph's edges .* from users 0\.\.3 to items 4"),
    ],
)
def test_recommenders_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        given_split("file", recommender_file(**changes), BOUGHT, 7)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_have_each_edge_once(prefetch):
    data = awkward_graph()
    edges = data.edge_index[:, ::2]
    loader = LinkLoader(data, edges, batch_size=40, prefetch=prefetch)
    epochs = []
    for _ in range(2):
        found = []
        for batch in loader:
            assert batch.n_id.numel() <= 40 and torch.equal(batch.n_id, batch.n_id.unique())
            assert torch.equal(batch.x, data.x[batch.n_id]) and batch.pairs.unique().numel() == batch.n_id.numel()
            assert batch.labels.sum() * 2 == batch.labels.numel()
            found.append(batch.n_id[batch.pairs][:, batch.labels == 1])
        assert len(found) == len(loader) == -(-4 * edges.size(1) // 40)
        epochs.append(torch.cat(found, 1))
    key = [(edge[0] * 40 + edge[1]).sort().values for edge in (edges, *epochs)]
    assert torch.equal(key[0], key[1]) and torch.equal(key[0], key[2]) and not torch.equal(*epochs)
    loader.set_epoch(0)
    assert torch.equal(next(iter(loader)).n_id, next(iter(LinkLoader(data, edges, batch_size=40))).n_id)


def test_drawn_pairs_with_the_edges_sources():
    data = awkward_graph()
    edges = data.edge_index[:, data.edge_index[0] < 30]
    loader = LinkLoader(data, edges, batch_size=30, destinations=range(30, 40))
    assert len(loader) == -(-3 * edges.size(1) // 30)
    met = set()
    for batch in loader:
        (source, _), (again, drawn) = (part.tolist() for part in batch.n_id[batch.pairs].chunk(2, 1))
        assert source == again and batch.n_id.numel() <= 30
        met |= set(drawn)
    assert met == set(range(30, 40))


def test_few_nodes_make_no_empty_batches():
    data = Data(x=torch.randn(6, 3), edge_index=torch.randint(6, (2, 20)))
    for batch_size in (None, 1, 3, 5):
        pairs = [batch.pairs.size(1) for batch in LinkLoader(data, data.edge_index, batch_size)]
        assert sum(pairs) == 40 and min(pairs) >= 2


@pytest.mark.parametrize(
    ("edges", "options", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.long), {}, r"edges is \[2, 0\]"),
        (torch.zeros(5, 2, dtype=torch.long), {}, r"edges must be a \[2, num_edges\] tensor"),
        (torch.zeros(2, 5), {}, "edges must be int64"),
        (torch.tensor([[0], [6]]), {}, r"edges holds node ids 0\.\.6, allowed are 0\.\.5"),
        (torch.tensor([[0], [1]]), {"destinations": range(3, 3)}, r"destinations=range\(3, 3\) must be a range"),
        (torch.tensor([[0], [1]]), {"destinations": range(0, 6, 2)}, "not empty, of step 1"),
        (torch.tensor([[0], [1]]), {"destinations": range(3, 9)}, r"within data's nodes 0\.\.5"),
    ],
)
def test_edges_that_do_not_fit_are_named(edges, options, message):
    data = Data(x=torch.randn(6, 3), edge_index=torch.randint(6, (2, 20)))
    with pytest.raises(ValueError, match=message):
        LinkLoader(data, edges, **options)


@pytest.mark.parametrize("edges", [[[], []], [[0, 1, 1], [0, 1, 1]]], ids=["none", "loops"])
def test_a_graph_without_joined_nodes_has_no_split(edges):
    with pytest.raises(InputError, match="0 joined pairs of nodes; --task link needs 3"):
        random_split(np.array(edges, np.int64), 6, 0)


def test_whole_graph_batch():
    data = awkward_graph()
    (batch,) = LinkLoader(data, data.edge_index, whole=True)
    assert batch.graph.whole and batch.pairs.size(1) == 2 * data.num_edges


def test_hits_against_hand_counts():
    negative = torch.tensor([0.1, 0.9, 0.5, 0.3])
    assert hits(torch.tensor([0.95, 0.6, 0.4, 0.9]), negative, 1) == 0.25  # above 0.9; a tie is no hit
    assert hits(torch.tensor([0.95, 0.6, 0.4, 0.9]), negative, 2) == 0.75
    assert hits(torch.tensor([0.0]), negative, 5) == 1.0


def test_mrr_against_hand_counts():
    negative = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.2, 0.3], [0.4, 0.4, 0.9]])
    # ranks 2, 1, and between 2 and 4: two are level
    assert mrr(torch.tensor([0.6, 0.7, 0.4]), negative) == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)


@pytest.mark.parametrize("scores", [1, 40, 2**25])
def test_recall_against_a_slow_count(scores, monkeypatch):
    monkeypatch.setattr("vqgnn.links._SCORES", scores)
    users, items, k = 12, 17, 5
    z = torch.randn(users + items, 4)
    every = torch.cartesian_prod(torch.arange(users), torch.arange(users, users + items)).t()
    drawn = every[:, torch.randperm(every.size(1))]
    drawn = drawn[:, drawn[0] != 3]  # a user without an edge
    pairs, met = drawn[:, :40], drawn[:, 40:90]
    shares = []
    for user in pairs[0].unique().tolist():
        wanted, known = ({b for a, b in edges.t().tolist() if a == user} for edges in (pairs, met))
        ranked = sorted(set(range(users, users + items)) - known, key=lambda item: -float(z[user] @ z[item]))
        shares.append(len(wanted & set(ranked[:k])) / len(wanted))
    assert 0 < sum(shares) < len(shares)
    for given in (pairs, torch.cat([pairs, pairs[:, :9]], 1)):  # a pair counts once
        assert recall(z, given, met, users, k) == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize("head", ["dot", "mlp"])
def test_score_of_a_pair(head):
    model = LinkModel(torch.nn.Identity(), 4, head)
    z = torch.randn(5, 4)
    score = model.score(*z[torch.tensor([[0, 3], [1, 3]])])
    product = torch.stack([z[0] * z[1], z[3] * z[3]])
    torch.testing.assert_close(score, product.sum(1) if head == "dot" else model.head(product)[:, 0])


@pytest.mark.parametrize(
    "options",
    [{"method": "vq", "head": "mlp"}, {"method": "gas"}, {"method": "drop"}, {"method": "full"}, {"model": "mlp"}],
    ids=lambda options: "-".join(options.values()),
)
def test_every_method_trains(options):
    trainer = make(hits=1000, epochs=4, **options)
    held_out = pairs_of(torch.cat([trainer.dataset.links.val, trainer.dataset.links.test], 1))
    assert not held_out & pairs_of(trainer.data.edge_index)
    losses = [trainer.train_epoch()["loss"] for _ in range(4)]
    scores = trainer.evaluate()
    assert losses[-1] < losses[0] and scores.keys() >= {"val_hits", "test_hits"}
    assert trainer.best["epoch"] == 4 and trainer.predict().shape == (300, 8)


def test_gradients_of_vq_are_asked_for():
    """A node is in several batches an epoch, whose gradients are not the node's."""
    for options, grad in (({}, False), ({"grad": "on"}, True), ({"method": "lmc"}, True)):
        (store,) = make(**{"method": "vq", **options}).stores.values()
        assert store.grad == grad


@pytest.fixture
def ring(tmp_path):
    """Files of a ring of 200 nodes, each joined to the next three, and of links with negatives of their own."""
    source = np.arange(200).repeat(3)
    edges = np.stack([source, (source + np.tile([1, 2, 3], 200)) % 200])
    np.savez(tmp_path / "ring.npz", edge_index=edges, num_nodes=200)
    order = np.random.default_rng(0).permutation(600)
    parts = {"val": order[:40], "test": order[40:80], "train": order[80:]}
    far = {f"{k}_neg_dst": (edges[0, parts[k]][:, None] + np.arange(20, 180, 16)) % 200 for k in ("val", "test")}
    np.savez(tmp_path / "links.npz", **{f"{k}_edge_id": ids for k, ids in parts.items()}, **far)
    return {"dataset": str(tmp_path / "ring.npz"), "links": str(tmp_path / "links.npz"), "batch_size": 150}


@pytest.mark.parametrize("method", ["vq", "full"])
def test_mrr_by_a_learnt_embedding(method, ring):
    """Nothing but who is joined to whom tells nodes apart."""
    codec = "pq:d=4,k=32" if method == "vq" else None
    more = {"features": "learned:8", "metric": "mrr", "method": method, "codec": codec, "model": "sage"}
    trainer = make(**ring, **more, optimizer="adam", lr=0.05, dropout=0.0, average=0.5, schedule="constant")
    start = trainer.model.gnn.embedding.weight.detach().clone()
    if method == "vq":  # the first conv's input is learnt, so it has a store too
        assert list(trainer.stores) == ["gnn.gnn.convs.0", "gnn.gnn.convs.1"]
    for _ in range(6 if method == "vq" else 60):
        trainer.train_epoch()
    scores = trainer.evaluate()
    assert scores.keys() >= {"val_mrr", "test_mrr", "val_hits", "test_hits"} and trainer.task.metric == "mrr"
    assert scores["test_mrr"] > 0.6  # drawn scores: 0.27
    assert not torch.isclose(trainer.model.gnn.embedding.weight, start).all(1).any()
    with pytest.raises(InputError, match="no learnt embedding"):
        trainer.predict_new(torch.randn(1, 8), torch.tensor([[0], [200]]))


def test_a_recommender(tmp_path, capsys):
    """Users of two tastes; each half of the items is one's."""
    rng = np.random.default_rng(0)
    users = np.arange(60)
    taste = np.stack([users.repeat(50), 60 + 50 * (users.repeat(50) % 2) + np.tile(np.arange(50), 60)])
    bought = rng.random(taste.shape[1]) < 0.4
    wanted = ~bought & (rng.random(taste.shape[1]) < 0.3)
    path, out = tmp_path / "shop.npz", str(tmp_path / "run")
    np.savez(path, edge_index=taste[:, bought], test_pos=taste[:, wanted], num_users=60, num_nodes=160)
    small = ["--hidden", "8", "--layers", "2", "--threads", "1", "--epochs", "6", "--batch-size", "400", "--lr", "0.05"]
    command = ["train", "--dataset", str(path), "--task", "link", "--links", str(path), "--dropout", "0"]
    assert main([*command, "--features", "learned:8", "--codec", "pq:d=4,k=16", *small, "--out", out]) == 0
    assert "test Recall@20" in capsys.readouterr().out
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = max(epochs, key=lambda epoch: epoch["val_recall"])
    # 20 of the 30 items of a user's taste that are left; drawn: 20 of 80 items
    assert best["test_recall"] > 0.5
    assert main(["train", "--resume", "--out", out]) == 0 and main(["evaluate", out]) == 0
    assert f"{best['test_recall']:.4f}" in capsys.readouterr().out


def test_command(tmp_path, capsys):
    out = str(tmp_path / "run")
    small = [
        "--dataset",
        SMALL["dataset"],
        "--batch-size",
        "600",
        "--hidden",
        "8",
        "--layers",
        "2",
        "--threads",
        "1",
        "--epochs",
        "2",
    ]
    assert main(["train", "--task", "link", "--head", "mlp", *small, "--out", out]) == 0
    assert "test Hits@K" in capsys.readouterr().out
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all({"val_hits", "test_hits"} <= epoch.keys() for epoch in epochs)
    assert main(["train", "--resume", "--out", out]) == 0
    assert main(["evaluate", out]) == 0
    assert f"{max(epochs, key=lambda epoch: epoch['val_hits'])['test_hits']:.4f}" in capsys.readouterr().out
    assert main(["predict", out, "--out", str(tmp_path / "z.npz")]) == 0
    with np.load(tmp_path / "z.npz") as file:
        assert file["embeddings"].shape == (300, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "cluster"}, "--sampler cluster is not for --task link"),
        ({"inductive": True}, "--inductive True is not for --task link"),
        ({"task": "node", "links": "file.npz"}, "is for --task link only"),
        ({"task": "node", "metric": "mrr"}, "--metric mrr is not for --task node; use one of auto, auc"),
        ({"metric": "auc"}, "--metric auc is not for --task link; use one of auto, hits, mrr, recall"),
        ({"features": "learned:x"}, "must be learned:D with D >= 1"),
        ({"features": "learned:8", "model": "mlp"}, "--features learned:8 and --model mlp exclude each other"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(InputError, match=message):
        Config(**(SMALL | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "mrr"}, r"--metric mrr needs --links with negatives .*; these links have hits"),
        ({"metric": "recall"}, r"--metric recall needs --links of a recommender"),
        ({"hits": 1_000_000}, "--hits 1000000 needs as many pairs that are no edges; of these there are 100000"),
    ],
)
def test_scores_that_the_links_do_not_give(options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


def test_a_recommender_ranks_by_inner_products():
    dataset = datasets.of_config(Config(**SMALL))
    links = dataclasses.replace(dataset.links, num_users=100)
    with pytest.raises(InputError, match="--head mlp cannot rank all items"):
        make(dataclasses.replace(dataset, links=links), head="mlp")


def test_citations(shared_data):
    """ogbn-arxiv's citations by year; a part of the training edges, for time."""
    links = str(shared_data / "ogbn-arxiv-links.npz")
    config = Config(**(SMALL | {"dataset": str(shared_data / "ogbn-arxiv-tape.npz"), "links": links, "lr": 0.02}))
    dataset = datasets.of_config(config)
    found = dataset.links
    assert (found.train.size(1), found.val.size(1), found.test.size(1)) == (378_578, 5000, 5000)
    assert found.val_negatives.shape == found.test_negatives.shape == (2, 500_000)
    dataset = dataclasses.replace(dataset, links=dataclasses.replace(found, train=found.train[:, :10_000]))
    trainer = make(dataset, dataset=config.dataset, links=links, lr=0.02, batch_size=10_000, hits=5000)
    losses = [trainer.train_epoch()["loss"] for _ in range(2)]
    scores = trainer.evaluate()
    assert losses[1] < losses[0] and scores["test_hits"] > 0.05  # drawn scores: 0.01


@pytest.mark.parametrize("conv, error", [(pyg.GATConv, 1e-4), (pyg.GATv2Conv, 1e-4)])
def test_a_node_in_many_batches_is_given_an_attentions_gradients_once(conv, error):
    """With frozen weights and the same batches their gradients add up to that of all pairs in the whole graph."""
    data = awkward_graph(80, 240, 6, undirected=True)
    torch.manual_seed(0)
    net = pyg.Sequential("x, g", [(conv(6, 8), "x, g -> x"), torch.nn.Tanh(), (conv(8, 8), "x, g -> x")])

    def gradients(method, passes, **options):
        model = vqgnn.convert(copy.deepcopy(net), data, method=method)
        loader = LinkLoader(data, data.edge_index, **options)
        for _ in range(passes):
            model.zero_grad()
            loader.set_epoch(0)
            for batch in loader:
                first, second = model(batch.x, batch.graph)[batch.pairs]
                F.binary_cross_entropy_with_logits((first * second).sum(1), batch.labels, reduction="sum").backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    truth = gradients("full", 1, whole=True)
    assert (gradients("gas", 3, batch_size=40) - truth).norm() > 0.1 * truth.norm()
    assert (gradients("lmc", 30, batch_size=40) - truth).norm() <= error * truth.norm()
