"""Tasks beside transductive single-label classification, and what is measured."""

import dataclasses

import numpy as np
import pytest
import torch

from vqgnn import datasets
from vqgnn.cli import main
from vqgnn.config import Config, InputError
from vqgnn.datasets import Dataset
from vqgnn.tasks import NodeTask, micro_f1, roc_auc
from vqgnn.train import Trainer

pytestmark = pytest.mark.usefixtures("command_line")
SMALL = {
    "dataset": "generated:n=300,classes=3,features=8",
    "hidden": 8,
    "layers": 2,
    "epochs": 2,
    "codec": "pq:d=4,k=8",
    "threads": 1,
}


def make(graph=None, **changes):
    config = Config(**(SMALL | changes))
    return Trainer(config, graph or datasets.of_config(config))


def test_scores_against_hand_counts():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.5]])
    truth = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    # positive: 5 of 6 logits; true: 3; both: (0, 0), (1, 1)
    assert micro_f1(logits, truth) == pytest.approx(2 * 2 / (5 + 3))
    # label 0: positives 2.0, 0.0 against 1.0: one of two pairs; label 1: positive 3.0 above both
    assert roc_auc(logits, truth) == pytest.approx((1 / 2 + 1) / 2)
    # one class: positives 0.0, 0.5 against -1.0, 0.5: right, right, right, a tie
    two = torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.0, -1.0], [0.0, 0.5]])
    assert roc_auc(two, torch.tensor([1, 1, 0, 0])) == pytest.approx((1 + 0.5 + 1 + 0) / 4)


def test_accuracy_by_split():
    dataset = datasets.load(SMALL["dataset"])
    data = dataset.data
    logits = torch.nn.functional.one_hot(data.y, 3).float()
    wrong = data.test_mask.nonzero()[:5, 0]
    logits[wrong] = logits[wrong].roll(1, 1)
    scores = NodeTask(Config(**SMALL), dataset).scores(None, logits, data)
    assert scores == pytest.approx({"train_acc": 1, "val_acc": 1, "test_acc": 1 - 5 / int(data.test_mask.sum())})


def test_auc_needs_two_classes():
    with pytest.raises(InputError, match="two classes or several labels a node, not 3"):
        make(metric="auc")


# Several labels.


@pytest.mark.parametrize(
    ("name", "options", "labels"),
    [("deezer-genres-hu-ro", {"inductive": True}, 27), ("blogcatalog-multilabel", {"features": "random:32"}, 39)],
    ids=["deezer", "blogcatalog"],
)
def test_several_labels(shared_data, name, options, labels):
    trainer = make(dataset=str(shared_data / f"{name}.npz"), dropout=0.0, **options)
    first = trainer.train_epoch()
    metrics = trainer.train_epoch() | trainer.evaluate()
    assert metrics["loss"] < first["loss"] and trainer.predict().shape == (trainer.data.num_nodes, labels)
    assert {"train_f1", "val_f1", "test_f1"} <= metrics.keys()


# Inductive.


def changed(dataset: Dataset, mask: str) -> Dataset:
    """The same graph with other features, labels and edges at the nodes of a split."""
    data = dataset.data.clone()
    nodes = data[mask]
    data.x[nodes] += 100
    data.y[nodes] = (data.y[nodes] + 1) % dataset.num_classes
    touched = nodes[data.edge_index].any(0)
    data.edge_index = data.edge_index[:, ~touched | (torch.arange(touched.numel()) % 2 == 0)]
    return dataclasses.replace(dataset, data=data)


def training_state(trainer):
    """Everything that training decides: losses of two epochs, weights, the stores and what it measured of them."""
    losses = []
    for _ in range(2):
        losses.append(trainer.train_epoch()["loss"])
        scores = trainer.evaluate()
    state = trainer.state_dict()
    tensors = {**state["model"], **{f"average {k}": v for k, v in state["averaged"].items()}}
    tensors |= {f"{name} {k}": v for name, store in state["stores"].items() for k, v in store.items()}
    return losses, tensors, scores


@pytest.mark.parametrize("model", ["gcn", "gat"])
@pytest.mark.parametrize("method", ["vq", "gas", "full"])
def test_inductive_training_never_sees_a_test_node(model, method):
    options = {"model": model, "method": method, "inductive": True, "codec": SMALL["codec"] if method == "vq" else None}
    dataset = datasets.load(SMALL["dataset"])
    losses, tensors, scores = training_state(make(dataset, **options))
    for mask in ("test_mask", "val_mask"):
        other_losses, other_tensors, other_scores = training_state(make(changed(dataset, mask), **options))
        assert losses == other_losses
        assert tensors.keys() == other_tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(value, other_tensors[name]), name
        if mask == "test_mask":  # nor does validation
            assert scores["val_acc"] == other_scores["val_acc"]
    transductive = training_state(make(changed(dataset, "test_mask"), **options | {"inductive": False}))
    assert losses != transductive[0]


def test_inductive_graphs():
    trainer = make(inductive=True)
    data, train, val = trainer.data, trainer.train_data, trainer.val_data
    assert train.num_nodes == int(data.train_mask.sum()) and train.train_mask.all()
    assert torch.equal(train.x, data.x[data.train_mask])
    assert train.num_edges == int(data.train_mask[data.edge_index].all(0).sum())
    assert val.num_nodes == data.num_nodes - int(data.test_mask.sum()) and not val.test_mask.any()
    assert all(store.num_nodes == train.num_nodes for store in trainer.stores.values())
    assert len(trainer.predict()) == data.num_nodes
    trainer.train_epoch()
    assert len(trainer.predict("vq")) == data.num_nodes  # codes by nearest codeword, for nodes never trained on
    with pytest.raises(InputError, match="training nodes only"):
        trainer.predict("stale")


def test_splits_that_are_graphs_of_their_own_need_one_pass():
    dataset = datasets.load(SMALL["dataset"])
    data = dataset.data.clone()
    source, target = data.test_mask[data.edge_index]
    data.edge_index = data.edge_index[:, source == target]
    trainer = make(dataclasses.replace(dataset, data=data), inductive=True)
    assert trainer.val_data is trainer.data


def test_inductive_run_is_evaluated_and_resumed(tmp_path, capsys):
    out = str(tmp_path / "run")
    small = ["--hidden", "8", "--layers", "2", "--codec", "pq:d=4,k=4", "--threads", "1"]
    assert main(["train", "--dataset", SMALL["dataset"], *small, "--inductive", "--epochs", "1", "--out", out]) == 0
    assert main(["train", "--resume", "--out", out]) == 0
    capsys.readouterr()
    assert main(["evaluate", out]) == 0
    assert "test acc" in capsys.readouterr().out
    assert main(["predict", out, "--out", str(tmp_path / "pred.npz")]) == 0
    with np.load(tmp_path / "pred.npz") as file:
        assert file["logits"].shape == (300, 3) and (file["pred"] == file["logits"].argmax(1)).all()


def test_twitch_by_country(shared_data):
    """Train on Germany, validate on England, test on four other countries: six graphs, none joined to another."""
    trainer = make(
        dataset=str(shared_data / "twitch-explicit-6.npz"), features="0:400",
        inductive=True, metric="auc", model="sage", lr=0.003,
    )  # fmt: skip
    assert trainer.train_data.num_nodes == 9498 and trainer.val_data is trainer.data
    trainer.train_epoch()
    scores = trainer.evaluate()
    assert scores.keys() >= {"train_auc", "val_auc", "test_auc"} and scores["train_auc"] > 0.52
