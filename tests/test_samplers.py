"""Samplers that visit some nodes more often than others: what a batch is, and that weighted losses are unbiased."""

import pytest
import torch
from graphs import awkward_graph
from torch_geometric.data import Data

from vqgnn import BatchLoader, datasets
from vqgnn.config import Config
from vqgnn.samplers import EdgeSampler, WalkSampler
from vqgnn.tasks import NodeTask
from vqgnn.train import Trainer

WEIGHTED = pytest.mark.parametrize("sampler", ["edge", "walk"])


@pytest.fixture(params=["undirected", "directed"])
def data(request):
    return awkward_graph(undirected=request.param == "undirected")


@WEIGHTED
def test_batches_are_joined_nodes(sampler, data):
    """Different nodes, ascending, at most as many as asked for; each has a neighbour there unless it is a dead end."""
    source, target = data.edge_index
    has_sender = torch.zeros(40, dtype=torch.bool)
    has_sender[target] = True
    seen = set()
    loader = BatchLoader(data, batch_size=8, sampler=sampler)
    for _ in range(30):
        for batch in loader:
            n_id = batch.n_id
            seen.update(n_id.tolist())
            assert torch.equal(n_id, n_id.unique()) and n_id.numel() <= 8
            inside = torch.isin(source, n_id) & torch.isin(target, n_id)
            joined = set(data.edge_index[:, inside].flatten().tolist())
            lonely = [i for i in n_id.tolist() if i not in joined]
            assert not any(has_sender[i] for i in lonely)
            assert torch.equal(batch.loss_weight, loader._tensors["loss_weight"][n_id])
    assert seen == set(range(40)) and len(loader) == 5


@pytest.mark.parametrize("sampler", ["node", "cluster", "edge", "walk"])
@pytest.mark.parametrize("multilabel", [False, True], ids=["one label", "labels"])
def test_weighted_loss_is_unbiased(sampler, multilabel, data, tmp_path):
    """The mean of an epoch's loss over many epochs is the full-batch loss within 4 standard errors."""
    if multilabel:
        data.y = torch.nn.functional.one_hot(data.y, 3).float()
    dataset = datasets.Dataset("awkward", data, 3, multilabel)
    task = NodeTask(Config(), dataset)
    # only hubs have a loss, and one that grows with the degree: what a sampler that prefers them overrates
    degree = data.edge_index.flatten().bincount(minlength=40)
    data.train_mask = degree > degree.float().mean()
    logits = torch.randn(40, 3) * degree[:, None]

    def model(x, graph):
        return logits[graph.n_id]

    def epoch_loss():
        return sum(float(task.loss_sum(model, batch)) for batch in loader)

    (whole,) = BatchLoader(data, batch_size=40)
    full = float(task.loss_sum(model, whole))
    loader = BatchLoader(data, batch_size=10, sampler=sampler, prefetch=0, cache_dir=tmp_path)
    if sampler in ("node", "cluster"):
        assert epoch_loss() == pytest.approx(full, rel=1e-5)
        return
    losses = torch.tensor([epoch_loss() for _ in range(250)])
    error = float(losses.std()) / 250**0.5
    assert error < 0.05 * full and abs(float(losses.mean()) - full) < 4 * error
    whole.loss_weight = 1 / loader._tensors["loss_weight"]  # what an epoch expects without weights: it is biased
    assert abs(float(task.loss_sum(model, whole)) - full) > 4 * error


@WEIGHTED
def test_weights_are_one_over_the_expected_visits(sampler, data):
    if sampler == "edge":
        drawn = EdgeSampler(data.edge_index, 40, num_batches=400, batch_size=10)
    else:
        drawn = WalkSampler(data, num_batches=400, batch_size=12)
    visits = torch.zeros(40)
    for _ in range(5):
        for n_id in drawn.draw(torch.Generator().manual_seed(int(visits.sum()))):
            visits[n_id] += 1 / 5
    expected = 1 / drawn.loss_weight
    error = (expected * (1 - expected / 400) / 5).sqrt()  # of a binomial count, mean of 5
    assert ((visits - expected).abs() < 5 * error + 0.03 * expected).all()  # walks: presampled to some percent


def test_weights_by_hand():
    """Edges 0 -> 1, 1 -> 2, a loop at 2, node 3 alone: two draws of four."""
    drawn = EdgeSampler(torch.tensor([[0, 1, 2], [1, 2, 2]]), 4, num_batches=3, batch_size=4)
    once, twice = 1 - (3 / 4) ** 2, 1 - (2 / 4) ** 2
    torch.testing.assert_close(drawn.loss_weight, 1 / (3 * torch.tensor([once, twice, twice, once])))


def test_walks_go_to_senders():
    """Along a directed cycle i -> i + 1, a walk of three steps from 7 meets 7, 6, 5, 4: each node by four roots."""
    edges = torch.stack([torch.arange(10), (torch.arange(10) + 1) % 10])
    drawn = WalkSampler(Data(x=torch.ones(10, 1), edge_index=edges), num_batches=5, batch_size=4)
    for n_id in drawn.draw(torch.Generator().manual_seed(0)):
        assert any(torch.equal(n_id, ((root - torch.arange(4)) % 10).sort().values) for root in range(10))
    torch.testing.assert_close(drawn.loss_weight, torch.full((10,), 1 / (5 * 0.4)))


@WEIGHTED
def test_training(sampler, command_line):
    options = {"hidden": 8, "layers": 2, "codec": "pq:d=4,k=8", "epochs": 8, "dropout": 0.0, "threads": 1}
    config = Config(dataset="generated:n=400,classes=4,features=12", sampler=sampler, **options)
    trainer = Trainer(config, datasets.of_config(config))
    losses = [trainer.train_epoch()["loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0] and trainer.evaluate()["test_acc"] > 0.3
