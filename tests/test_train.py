import json

import pytest
import torch

import vqgnn
from vqgnn import datasets, memory, report, train
from vqgnn.config import Config, InputError
from vqgnn.runs import Run
from vqgnn.train import Trainer, TrainingError, learning_rate_factor

SMALL = {
    "dataset": "generated:n=400,classes=4,features=12",
    "hidden": 16,
    "layers": 2,
    "epochs": 3,
    "codec": "pq:d=4,k=8",
}


@pytest.fixture(autouse=True)
def small_world(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VQGNN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make(**changes):
    config = Config(**(SMALL | changes))
    return Trainer(config, datasets.load(config.dataset))


def tensors(state, path=""):
    """Every leaf of a nested state by its path."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in tensors(value, f"{path}/{key}").items()}
    if isinstance(state, list):
        return tensors(dict(enumerate(state)), path)
    return {path: state}


def assert_same(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        assert same, key


def comparable(metrics):
    return [{k: v for k, v in epoch.items() if "seconds" not in k and "memory" not in k} for epoch in metrics]


@pytest.mark.parametrize("model", ["gcn", "sage", "gin", "gat", "gatv2", "transformer", "hybrid", "cheb", "mlp"])
@pytest.mark.parametrize("method", ["vq", "gas", "lmc", "drop", "full"])
def test_every_model_and_method(model, method, device):
    if model == "mlp" and method != "vq":
        pytest.skip("an MLP has no method")
    codec = None if method != "vq" else SMALL["codec"]
    trainer = make(model=model, method=method, codec=codec, device=device.type)
    metrics = trainer.train_epoch() | trainer.evaluate()
    assert metrics["loss"] > 0 and 0 <= metrics["test_acc"] <= 1
    assert ("staleness" in metrics) == (method in ("vq", "gas", "lmc") and model != "mlp")
    assert ("perplexity" in metrics) == (method == "vq" and model != "mlp")


@pytest.mark.parametrize("model", ["gcn", "sage", "gin", "gat", "gatv2", "transformer", "hybrid", "cheb"])
def test_exact_inference_is_the_cpus(model, device):
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    trainer, other = make(model=model, device="cuda"), make(model=model, device="cpu")
    trainer.train_epoch()
    other.averaged.load_state_dict(trainer.averaged.state_dict())
    torch.testing.assert_close(trainer.predict().cpu(), other.predict(), rtol=1e-3, atol=1e-4)


def test_attention_options():
    """--lipschitz holds after every step, and --attention-state reaches the convs that read stored rows."""
    trainer = make(model="gat", lipschitz=0.3)
    trainer.train_epoch()
    convs = [layer.conv for layer in trainer.model.convs]
    for conv in convs:
        for vector in (conv.att_src, conv.att_dst):
            assert float(vector.detach().norm(dim=-1).max()) <= 0.3 * (1 + 1e-5)
    assert [conv.store_use.inputs for conv in convs] == [False, True]
    projected = make(model="gat", attention_state="projected")
    assert not any(layer.conv.store_use.inputs for layer in projected.model.convs)


@pytest.mark.parametrize("model", ["gcn", "gat", "gatv2", "hybrid"])
@pytest.mark.parametrize("method", ["vq", "gas", "full"])
def test_residual_models_without_batchnorm(model, method):
    """--residual adds W x beside every conv; with --norm layer a node's output depends on no other node of a batch."""
    trainer = make(model=model, method=method, codec=None, norm="layer", lr=0.01)
    norm = trainer.model.norms[0]
    assert (type(norm).__name__, norm.mode) == ("LayerNorm", "node")
    trainer.train_epoch()
    assert trainer.evaluate()["train_acc"] > 0.3
    first = trainer.averaged.module.convs[0]
    x, edge_index = trainer.data.x, trainer.data.edge_index
    with torch.no_grad():
        own = first.conv(x, edge_index) + x @ first.skip.weight.T
        torch.testing.assert_close(first(x, edge_index), own)


@pytest.mark.parametrize(
    "options, exact",
    [
        ({}, False),
        ({"norms": "exact"}, True),
        ({"model": "hybrid"}, True),
        ({"model": "hybrid", "norms": "running"}, False),
    ],
)
def test_norm_statistics_of_an_evaluation(options, exact, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "estimate_norms", lambda model, data: calls.append(model))
    make(**options).evaluate()
    assert bool(calls) == exact


def test_where_no_residual_is_added(tmp_path):
    """Layers with a linear map of the node's own row get no second one; runs older than the option had none."""
    links = train.build_model(Config(**SMALL, task="link"), 5, 4)
    assert type(links.convs[0]).__name__ == "GCNConv"
    assert type(make(model="sage").model.convs[0]).__name__ == "SAGEConv"
    plain = make(residual=False)
    assert type(plain.model.convs[0]).__name__ == "GCNConv"
    old = json.loads(plain.config.to_json())
    del old["residual"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert Config.read(tmp_path / "config.json") == plain.config
    state = plain.state_dict()
    del state["config"]["residual"]
    plain.load_state_dict(state)


def test_dropout_of_attention_is_its_own_option():
    for options, want in (({}, 0.0), ({"attention_dropout": 0.4}, 0.4)):
        trainer = make(model="gat", dropout=0.5, **options)
        assert {layer.conv.dropout for layer in trainer.model.convs} == {want} and trainer.model.dropout.p == 0.5


@pytest.mark.parametrize("norm, kind", [("batch", "BatchNorm"), ("layer", "LayerNorm"), ("none", "Identity")])
def test_norms(norm, kind):
    assert type(make(norm=norm).model.norms[0]).__name__ == kind


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lipschitz": 2.0}, "--lipschitz 2.0 is for --model gat, gatv2 or hybrid"),
        ({"attention_dropout": 0.1}, "--attention-dropout 0.1 is for --model gat, gatv2"),
        ({"model": "gat", "lipschitz": 0.0}, "must be above 0"),
        ({"attention_state": "input"}, "no fused attention of GCN reads stored rows"),
        ({"model": "gat", "method": "drop", "codec": None, "attention_state": "input"}, "with method='drop'"),
    ],
)
def test_attention_options_where_there_is_none(changes, words):
    with pytest.raises(InputError, match=words):
        make(**changes)


def test_denormal_numbers_are_flushed_while_it_trains_alone(tmp_path):
    def flushed():
        return float(torch.tensor(1e-38) * 0.01) == 0

    trainer, seen = make(epochs=1), []
    epoch = trainer.train_epoch
    trainer.train_epoch = lambda *args: seen.append(flushed()) or epoch(*args)
    trainer.fit(Run.create(tmp_path / "run", trainer.config))
    assert seen == [True] and not flushed()


def test_training_learns():
    trainer = make(epochs=12, dropout=0.0)
    losses = [trainer.train_epoch()["loss"] for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    scores = trainer.evaluate()
    assert scores["train_acc"] > 0.6  # four classes


def test_batch_losses_add_up_to_the_full_mean():
    trainer = make(method="full", codec=None)
    batch = next(iter(trainer.loader))
    logits = torch.randn(400, 4)
    mask = trainer.data.train_mask
    expected = torch.nn.functional.cross_entropy(logits[mask], trainer.data.y[mask])
    torch.testing.assert_close(trainer.task.loss_sum(lambda *_: logits, batch) / trainer.num_terms, expected)


def test_average_of_zero_evaluates_the_weights_themselves():
    trainer = make(average=0.0)
    trainer.train_epoch()
    assert_same(dict(trainer.averaged.module.state_dict()), dict(trainer.model.state_dict()))


def test_averaged_weights_follow_the_average():
    trainer = make(average=0.9, epochs=1)
    name = "convs.0.conv.lin.weight"
    history = []
    step = trainer.optimizer.step

    def note(*args):
        step(*args)
        history.append(trainer.model.state_dict()[name].clone())

    trainer.optimizer.step = note
    trainer.train_epoch()
    expected = history[0]
    for t, weight in enumerate(history[1:], start=1):
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(trainer.averaged.module.state_dict()[name], expected)


def test_learning_rate_course():
    trainer = make(warmup_epochs=1, epochs=5)
    steps = len(trainer.loader)
    factors = [learning_rate_factor(trainer.config, step, steps) for step in range(5 * steps)]
    assert factors[0] == pytest.approx(1 / (steps + 1)) and factors[steps] == 1.0
    assert factors == sorted(factors[: steps + 1]) + sorted(factors[steps + 1 :], reverse=True)
    assert 0 < factors[-1] < 0.02
    assert learning_rate_factor(make(schedule="constant").config, 7, steps) == 1.0


def test_options_reach_what_they_are_for():
    assert isinstance(make().optimizer, torch.optim.RMSprop)
    assert (make().config.lr, make(model="gat", heads=2).config.lr) == (0.01, 0.003)
    trainer = make(grad="off", whiten=False, optimizer="adam")
    assert isinstance(trainer.optimizer, torch.optim.Adam)
    (store,) = trainer.stores.values()
    assert not store.grad and not store.codebook.whiten
    for grad, kept in (("on", True), ("auto", True), ("off", False)):
        store = make(model="gat", heads=2, grad=grad).stores["convs.1.conv"]
        assert (store.pending is not None) == kept and not store.grad
    store = make(model="gat", heads=2, grad="on", attention_state="projected").stores["convs.1.conv"]
    assert store.grad and store.pending is None


def test_evaluations_read_what_they_are_told():
    trainer = make(inference="stale")
    trainer.train_epoch()
    stale, exact = trainer.scores("stale"), trainer.scores("exact")
    assert trainer.evaluate()["val_acc"] == stale["val_acc"]
    assert stale != exact  # else this shows nothing


def test_norms_of_the_exact_pass_are_evaluated():
    def trained(norms):
        trainer = make(norms=norms)
        trainer.train_epoch()
        trainer.evaluate()
        return trainer

    running, exact = trained("running"), trained("exact")
    norm = "norms.0.module.running_mean"
    assert not torch.equal(running.best["weights"][norm], exact.best["weights"][norm])
    assert_same(running.model.state_dict(), exact.model.state_dict())  # training goes on the same


def test_sweeps_make_states_fresh():
    """Right after a sweep a store holds what one exact pass gives."""
    trainer = make(method="gas", codec=None, refresh_every=1)
    trainer.train_epoch()
    batches = trainer._batches
    found = {}

    def look():
        exact = {}
        vqgnn.inference.visit_inputs(trainer.model, trainer.data, lambda conv, rows: exact.update(rows=rows))
        found["error"] = (trainer.stores["convs.1.conv"].pull() - exact["rows"]).abs().max()
        return batches()

    trainer._batches = look
    trainer.train_epoch()
    assert found["error"] < 1e-5


def test_evaluation_leaves_training_untouched():
    trainer = make()
    trainer.train_epoch()
    before = {key: value for key, value in trainer.state_dict().items() if key != "best"}
    before = torch.load(_saved(before), weights_only=True)
    for inference in ("exact", "vq", "stale"):
        trainer.predict(inference)
    trainer.evaluate()
    assert_same(before, {key: value for key, value in trainer.state_dict().items() if key != "best"})


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "method, model, sampler",
    [
        ("vq", "gcn", "node"), ("gas", "gcn", "node"), ("lmc", "gcn", "node"), ("vq", "gat", "node"),
        ("lmc", "gat", "node"), ("vq", "gat", "walk"),
    ],
)  # fmt: skip
def test_resume_is_bit_for_bit(tmp_path, method, model, sampler):
    """Stop after two of four epochs with the third's metrics already written, resume, compare with an unbroken run."""
    codec = None if method != "vq" else SMALL["codec"]
    options = {"epochs": 4, "method": method, "codec": codec, "model": model, "sampler": sampler}
    config = Config(**(SMALL | options))
    dataset = datasets.load(config.dataset)
    whole = Run.create(tmp_path / "whole", config)
    Trainer(config, dataset).fit(whole)

    broken = Run.create(tmp_path / "broken", config)
    trainer = Trainer(config, dataset)
    save = broken.save_checkpoint

    def fail_at_third(state):
        if state["epoch"] == 3:
            raise KeyboardInterrupt
        save(state)

    broken.save_checkpoint = fail_at_third
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(broken)
    with open(broken.path / "metrics.jsonl", "a") as handle:
        handle.write('{"epoch": 4, "lo')  # and a line that was cut off
    assert [m["epoch"] for m in broken.metrics()] == [1, 2, 3]

    broken = Run(broken.path)
    torch.manual_seed(99)
    trainer = Trainer(config, dataset, fill=False)
    trainer.load_state_dict(broken.load_checkpoint(dataset.fingerprint()))
    trainer.fit(broken)
    assert comparable(broken.metrics()) == comparable(whole.metrics())
    fingerprint = dataset.fingerprint()
    assert_same(broken.load_checkpoint(fingerprint), whole.load_checkpoint(fingerprint))


def test_run_folder_and_summary(tmp_path):
    config = Config(**(SMALL | {"eval_every": 2}))
    dataset = datasets.load(config.dataset)
    run = Run.create(tmp_path / "run", config)
    trainer = Trainer(config, dataset)
    summary = trainer.fit(run)
    assert ["val_acc" in epoch for epoch in run.metrics()] == [False, True, True]
    best = max((m for m in run.metrics() if "val_acc" in m), key=lambda m: (m["val_acc"], -m["epoch"]))
    assert (summary["best_epoch"], summary["test_acc"]) == (best["epoch"], best["test_acc"])
    assert summary["store_bytes_fp32"] == 400 * 16 * 4
    if memory.resident() is not None:
        training = max(m["memory_training"] for m in run.metrics())
        assert 0 <= summary["memory_training"] == training <= summary["memory_above_data"] < summary["memory_peak"]
    assert json.loads((run.path / "summary.json").read_text()) == summary
    trainer.use_best()
    assert trainer.scores()["test_acc"] == summary["test_acc"]
    text = report.table(summary)
    assert all(word in text for word in ("test accuracy", "time an epoch", "peak memory", "node state"))
    assert report.curves(run).read_bytes().startswith(b"\x89PNG")
    assert not [p.name for p in run.path.iterdir() if p.name.startswith(".")]


def test_several_labels(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    n, split = 120, rng.permutation(120)
    x = rng.standard_normal((n, 6)).astype(np.float32)
    np.savez(
        tmp_path / "multi.npz",
        x=x,
        y=(x[:, :3] > 0.5).astype(np.uint8),
        edge_index=rng.integers(0, n, (2, 300)),
        train_mask=split < 60,
        val_mask=(split >= 60) & (split < 90),
        test_mask=split >= 90,
    )
    trainer = make(dataset=str(tmp_path / "multi.npz"))
    metrics = trainer.train_epoch() | trainer.evaluate()
    assert {"train_f1", "val_f1", "test_f1"} <= metrics.keys() and "test_acc" not in metrics


def test_warns_of_a_codebook_that_is_not_updated(monkeypatch):
    trainer = make()
    monkeypatch.setattr(vqgnn.Codebook, "update", lambda self, x, g=None: self.assign(x))
    with pytest.warns(RuntimeWarning, match=r"codebook of convs\.1\.conv was not updated in epoch 1"):
        metrics = trainer.train_epoch()
    assert len(metrics["warnings"]) == 1
    assert "UNHEALTHY" in train._bar_text(metrics, "acc")


def test_warns_of_a_collapsed_codebook(monkeypatch):
    trainer = make()
    stats = vqgnn.Codebook.stats
    monkeypatch.setattr(vqgnn.Codebook, "stats", lambda self: stats(self) | {"dead": 0.95})
    with pytest.warns(RuntimeWarning, match="collapsed.*95 % dead codes"):
        trainer.train_epoch()


def test_healthy_codebooks_do_not_warn(recwarn):
    assert make().train_epoch()["warnings"] == []
    assert not [w for w in recwarn if "codebook" in str(w.message)]


def test_loss_that_is_no_number_stops():
    trainer = make()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="smaller --lr"):
        trainer.train_epoch()


def test_stale_inference_needs_a_store():
    with pytest.raises(InputError, match="'drop' keeps none"):
        make(method="drop", codec=None).predict("stale")
