"""The methods that ours are compared with, by PyG's own loaders and convs.

Every one is trained as ours are: the same model, schedule, averaged weights, exact evaluation on the whole graph. Needs
torch_sparse and torch_scatter for the loaders, which build from source (an environment for benchmarks alone):

    FORCE_ONLY_CPU=1 pip install --no-build-isolation --no-deps torch-scatter==2.1.2 torch-sparse==0.6.18
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch_geometric.data import Data
from torch_geometric.loader import ClusterData, ClusterLoader, GraphSAINTRandomWalkSampler, NeighborLoader
from torch_geometric.nn import BatchNorm, GraphConv, models
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import degree

from vqgnn import memory
from vqgnn.averaging import MovingAverage
from vqgnn.config import Config
from vqgnn.datasets import Dataset
from vqgnn.partitioning import partition
from vqgnn.tasks import NodeTask
from vqgnn.train import build_model, learning_rate_factor, model_options, with_residuals

FANOUT = [20, 10, 5]  # of the paper's NS-SAGE
PARTS_A_BATCH = 8  # Cluster-GCN's clusters joined into a batch
WALK_LENGTH = 2  # GraphSAINT-RW's steps
PRESAMPLED = 50  # epochs of subgraphs by which GraphSAINT's normalisation is estimated
Step = Callable[[nn.Module], Tensor]  # the loss of a batch


def sparse(edge_index: Tensor, num_nodes: int, weight: Tensor | None = None):
    """The form of the graph in which PyG's convs run fastest on a CPU."""
    from torch_sparse import SparseTensor

    return SparseTensor(row=edge_index[1], col=edge_index[0], value=weight, sparse_sizes=(num_nodes, num_nodes))


def _loss_sum(data: Data, logits: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy summed over nodes with a weight [b]."""
    return (F.cross_entropy(logits, data.y, reduction="none") * weight).sum()


class Peer:
    """A model, its training batches as `steps()`, and its whole graph for evaluation."""

    def __init__(self, config: Config, dataset: Dataset, batches: int):
        self.config, self.data, self.batches = config, dataset.data, batches
        self.task = NodeTask(config, dataset)
        torch.manual_seed(config.seed)
        self.model = self.build()
        self.averaged = MovingAverage(self.model, config.average)
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.lr, weight_decay=config.weight_decay)
        self.step = 0
        self.graph = self.whole()

    def build(self) -> nn.Module:
        return build_model(self.config, self.data.num_features, self.task.out_channels)

    def whole(self):
        """What the model is given for the whole graph."""
        return sparse(self.data.edge_index, self.data.num_nodes)

    def __len__(self) -> int:
        """Steps an epoch."""
        return self.batches

    def steps(self) -> Iterator[Step]:
        raise NotImplementedError

    def logits(self, model: nn.Module) -> Tensor:
        return model(self.data.x, self.graph)

    def state_bytes(self) -> int:
        """What is kept of nodes between batches."""
        return 0

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        memory.give_back()  # before and after, as the trainer does
        scores = self.task.scores(None, self.logits(self.averaged.module), self.data)
        memory.give_back()
        return scores

    def train_epoch(self) -> dict:
        """One pass over all batches; its seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.model.train()
        for loss_of in self.steps():
            for group in self.optimizer.param_groups:
                step = min(self.step, self.config.epochs * len(self))
                group["lr"] = self.config.lr * learning_rate_factor(self.config, step, len(self))
            self.optimizer.zero_grad()
            loss_of(self.model).backward()
            self.optimizer.step()
            self.averaged.update_parameters(self.model)
            self.step += 1
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}

    def fit(self) -> list[dict]:
        """One object an epoch, as `vqgnn train` writes them."""
        config, metrics = self.config, []
        for epoch in range(1, config.epochs + 1):
            self.step = (epoch - 1) * len(self)  # a pass may have fewer
            found = {"epoch": epoch, **self.train_epoch()}
            if epoch % config.eval_every == 0 or epoch == config.epochs:
                found |= self.evaluate()
            metrics.append(found)
        return metrics


def _subgraph_steps(loader: Iterable[Data]) -> Iterator[Step]:
    """Batches as if they were whole graphs: the mean loss of their training nodes."""
    for batch in loader:
        count = int(batch.train_mask.sum())
        if count:
            graph = sparse(batch.edge_index, batch.num_nodes)
            yield lambda model, b=batch, g=graph, n=count: _loss_sum(b, model(b.x, g), b.train_mask / n)


class ClusterGCN(Peer):
    """Chiang et al.: batches of METIS clusters, messages between batches dropped, normalisation within the batch."""

    def __init__(self, config: Config, dataset: Dataset, batches: int):
        super().__init__(config, dataset, batches)
        self.loader = ClusterLoader(
            _Clusters(self.data, batches * PARTS_A_BATCH), batch_size=PARTS_A_BATCH, shuffle=True
        )

    def __len__(self) -> int:
        return len(self.loader)

    def steps(self) -> Iterator[Step]:
        yield from _subgraph_steps(self.loader)


class _Clusters(ClusterData):
    """PyG's, with METIS by pymetis: its own needs a library that has no package."""

    def __init__(self, data: Data, num_parts: int):
        self.known = data
        super().__init__(data, num_parts, log=False)

    def _metis(self, rowptr: Tensor, col: Tensor) -> Tensor:
        cluster = torch.empty(self.known.num_nodes, dtype=torch.int64)
        for number, nodes in enumerate(partition(self.known.edge_index, self.known.num_nodes, self.num_parts)):
            cluster[nodes] = number
        return cluster


class WeightedSAGE(models.GraphSAGE):
    """GraphSAGE whose mean is a weighted sum, so that GraphSAINT can normalise it: GraphConv of weights 1 / degree."""

    def init_conv(self, in_channels: int, out_channels: int, **kwargs) -> GraphConv:
        return GraphConv(in_channels, out_channels, aggr="add", **kwargs)


class _Weighted(Peer):
    """A peer whose batches need an edge's weight in the whole graph: GCN's, or 1 / degree for SAGE's mean."""

    def build(self) -> nn.Module:
        self.degree = degree(self.data.edge_index[1], self.data.num_nodes)
        config, sizes = self.config, (self.data.num_features, self.config.hidden, self.config.layers)
        if config.model == "sage":
            model = WeightedSAGE(*sizes, self.task.out_channels, **model_options(config))
        elif config.model == "gcn":  # the weights are the whole graph's
            model = models.GCN(*sizes, self.task.out_channels, normalize=False, **model_options(config))
        else:
            return super().build()
        return with_residuals(model, config, self.data.num_features, self.task.out_channels)

    def _weights(self) -> Tensor:
        """[e] weight of each edge in the convolution matrix."""
        source, target = self.data.edge_index
        if self.config.model == "gcn":
            inverse = (self.degree + 1).rsqrt()
            return inverse[source] * inverse[target]
        return 1 / self.degree.clamp(min=1)[target]

    def whole(self):
        return self._matrix(self.data.edge_index, self._weights(), self.degree)

    def _matrix(self, edge_index: Tensor, weight: Tensor, degrees: Tensor):
        """The convolution matrix of some nodes, which have these degrees in the whole graph."""
        n = degrees.numel()
        if self.config.model == "gat":
            return sparse(edge_index, n)
        if self.config.model == "gcn":  # a node is always in its own subgraph, so that its loop needs no correction
            ends = torch.arange(n)
            edge_index = torch.cat([edge_index, torch.stack([ends, ends])], 1)
            weight = torch.cat([weight, 1 / (degrees + 1)])
        return sparse(edge_index, n, weight)


class GraphSAINT(_Weighted):
    """Zeng et al.: subgraphs of random walks; messages and losses divided by the chance that they are sampled.

    A GAT's softmax takes no such weights: its loss alone is normalised.
    """

    def __init__(self, config: Config, dataset: Dataset, batches: int):
        super().__init__(config, dataset, batches)
        n, e = self.data.num_nodes, self.data.num_edges
        data = Data(
            x=self.data.x, y=self.data.y, train_mask=self.data.train_mask, edge_index=self.data.edge_index,
            n_id=torch.arange(n), e_id=torch.arange(e),
        )  # fmt: skip
        roots = math.ceil(n / (batches * (1 + WALK_LENGTH)))
        self.loader = GraphSAINTRandomWalkSampler(data, roots, WALK_LENGTH, num_steps=batches, log=False)
        node_count, edge_count = torch.zeros(n), torch.zeros(e)
        for _ in range(PRESAMPLED):
            for batch in self.loader:
                node_count[batch.n_id] += 1
                edge_count[batch.e_id] += 1
        # PyG's own normalisation divides by the chance of an edge given its source, which is not that given its target,
        # and weighs an edge that was never met by 10,000; here it counts as met once.
        target = self.data.edge_index[1]
        self.weight = self._weights() * node_count[target].clamp(min=1) / edge_count.clamp(min=1)
        chance = node_count.clamp(min=1) / (PRESAMPLED * batches)
        self.loss_weight = self.data.train_mask / chance / int(self.data.train_mask.sum())

    def batches_of(self) -> Iterator[tuple[Data, object, Tensor]]:
        """(subgraph, its normalised matrix, weights [b] of its nodes' losses)."""
        for batch in self.loader:
            graph = self._matrix(batch.edge_index, self.weight[batch.e_id], self.degree[batch.n_id])
            yield batch, graph, self.loss_weight[batch.n_id]

    def steps(self) -> Iterator[Step]:
        for batch, graph, weight in self.batches_of():
            yield lambda model, b=batch, g=graph, w=weight: _loss_sum(b, model(b.x, g), w)


class LMC(_Weighted):
    """Shi et al., algorithm 1: a batch computes its halo too, from those neighbours that it has.

    What such a halo row lacks is made up by its history, of its states and of the loss's gradients by them: both are
    (1 - beta) history + beta (what the batch computed), where beta is the share of a node's edges that the batch has
    (their code's default score, times their beta of 1). The rows of the halo give the weights no gradient.
    """

    def __init__(self, config: Config, dataset: Dataset, batches: int):
        super().__init__(config, dataset, batches)
        n, hidden = self.data.num_nodes, [config.hidden] * (config.layers - 1)
        self.parts = partition(self.data.edge_index, n, batches * PARTS_A_BATCH)
        self.states = [torch.zeros(n, width) for width in [*hidden, self.task.out_channels]]
        self.gradients = [torch.zeros(n, width) for width in hidden]
        self.num_train = int(self.data.train_mask.sum())

    def state_bytes(self) -> int:
        return sum(rows.nbytes for rows in self.states + self.gradients)

    def score(self, share: Tensor) -> Tensor:
        """[h] beta of halo nodes, of whose edges the batch has this share."""
        return share

    def steps(self) -> Iterator[Step]:
        parts = [self.parts[i] for i in torch.randperm(len(self.parts))]
        for start in range(0, len(parts), PARTS_A_BATCH):
            nodes = torch.cat(parts[start : start + PARTS_A_BATCH])
            yield lambda model, nodes=nodes: self.loss(model, nodes)

    def loss(self, model: nn.Module, nodes: Tensor) -> Tensor:
        """The loss whose gradient is an estimate of the whole graph's."""
        count, own = nodes.numel(), torch.zeros(self.data.num_nodes, dtype=torch.bool)
        own[nodes] = True
        halo = self.graph[nodes].storage.col().unique()
        nodes = torch.cat([nodes, halo[~own[halo]]])
        target, source, weight = self.graph[nodes][:, nodes].coo()
        inner = target < count
        graphs = [
            sparse(torch.stack([source[rows], target[rows]]), nodes.numel(), weight[rows]) for rows in (inner, ~inner)
        ]
        found = degree(target, nodes.numel())[count:]
        known = self.graph.storage.rowcount()[nodes[count:]]
        beta = self.score(found / known)[:, None]

        x = self.data.x[nodes]
        for layer, (conv, norm) in enumerate(zip(model.convs, model.norms, strict=True)):
            frozen = {name: value.detach() for name, value in conv.named_parameters()}
            x = [conv(x, graphs[0])[:count], functional_call(conv, frozen, (x, graphs[1]))[count:]]
            last = layer == len(model.convs) - 1
            if not last:
                x = [norm(x[0]), _frozen_norm(norm, x[1])]
            x = _mixed(*x, beta, nodes, self.states[layer], None if last else self.gradients[layer])
            if not last:
                x = model.dropout(model.act(x))
        train = self.data.train_mask[nodes]
        losses = F.cross_entropy(x[train], self.data.y[nodes[train]], reduction="sum")
        return losses * (self.batches / self.num_train)


def _frozen_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """BatchNorm by the rows' own statistics, which are not kept; its weights get no gradient."""
    if not isinstance(norm, BatchNorm):
        return norm(x)
    of = norm.module
    return F.batch_norm(x, None, None, of.weight.detach(), of.bias.detach(), training=True, eps=of.eps)


def _mixed(own: Tensor, halo: Tensor, beta: Tensor, nodes: Tensor, states: Tensor, gradients: Tensor | None) -> Tensor:
    """[b + h, f] states of a batch and its halo; those of the batch, and their gradients by and by, become history."""
    count = own.shape[0]
    x = torch.cat([own, halo + (1 - beta) * (states[nodes[count:]] - halo.detach())])
    states[nodes[:count]] = own.detach()
    if gradients is not None and x.requires_grad:

        def compensate(found: Tensor) -> Tensor:
            gradients[nodes[:count]] = found[:count]
            return torch.cat([found[:count], (1 - beta) * gradients[nodes[count:]] + beta * found[count:]])

        x.register_hook(compensate)
    return x


class PlainGraphSAINT(Peer):
    """The same subgraphs without any normalisation: means within the subgraph, the mean loss of its nodes."""

    def __init__(self, config: Config, dataset: Dataset, batches: int):
        super().__init__(config, dataset, batches)
        roots = math.ceil(self.data.num_nodes / (batches * (1 + WALK_LENGTH)))
        self.loader = GraphSAINTRandomWalkSampler(self.data, roots, WALK_LENGTH, num_steps=batches, log=False)

    def steps(self) -> Iterator[Step]:
        yield from _subgraph_steps(self.loader)


class NeighbourSampling(Peer):
    """Hamilton et al.: a tree of sampled neighbours for each batch of training nodes."""

    def __init__(self, config: Config, dataset: Dataset, batches: int):
        super().__init__(config, dataset, batches)
        size = math.ceil(int(self.data.train_mask.sum()) / batches)
        fanout = (FANOUT + [FANOUT[-1]] * config.layers)[: config.layers]
        self.loader = NeighborLoader(self.data, fanout, input_nodes=self.data.train_mask, batch_size=size, shuffle=True)

    def __len__(self) -> int:
        return len(self.loader)

    def steps(self) -> Iterator[Step]:
        for batch in self.loader:
            graph = sparse(batch.edge_index, batch.num_nodes)
            size = batch.batch_size
            yield lambda model, b=batch, g=graph, n=size: F.cross_entropy(model(b.x, g)[:n], b.y[:n])


class _Rows(Peer):
    """A model of each node's own rows: `features`, computed once from the graph. Batches are random training nodes."""

    def features(self) -> Tensor:
        raise NotImplementedError

    def whole(self) -> None:
        self.rows = self.features()

    def steps(self) -> Iterator[Step]:
        nodes = self.data.train_mask.nonzero().flatten()
        for part in nodes[torch.randperm(nodes.numel())].tensor_split(self.batches):
            yield lambda model, p=part: F.cross_entropy(model(self.rows[p]), self.data.y[p])

    def logits(self, model: nn.Module) -> Tensor:
        return model(self.rows)

    def powers(self, count: int) -> list[Tensor]:
        """X, C X, C^2 X, ... with GCN's matrix C."""
        edge_index, weight = gcn_norm(self.data.edge_index, None, self.data.num_nodes)
        matrix, found = sparse(edge_index, self.data.num_nodes, weight), [self.data.x]
        for _ in range(count):
            found.append(matrix @ found[-1])
        return found


class SGC(_Rows):
    """Wu et al.: logistic regression on C^L X, one step an epoch."""

    def __init__(self, config: Config, dataset: Dataset, batches: int):
        super().__init__(config, dataset, 1)

    def build(self) -> nn.Module:
        return nn.Linear(self.data.num_features, self.task.out_channels)

    def features(self) -> Tensor:
        return self.powers(self.config.layers)[-1]


class SIGN(_Rows):
    """Frasca et al.: an MLP on X, C X, ..., C^L X, each with a linear map of its own."""

    def build(self) -> nn.Module:
        config, width = self.config, self.config.hidden
        return _SignModel(self.data.num_features, width, config.layers + 1, self.task.out_channels, config.dropout)

    def features(self) -> Tensor:
        return torch.stack(self.powers(self.config.layers), 1)


class _SignModel(nn.Module):
    def __init__(self, in_channels: int, hidden: int, hops: int, out_channels: int, dropout: float):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(in_channels, hidden) for _ in range(hops))
        self.norm = nn.BatchNorm1d(hops * hidden)
        options = {"norm": "batch_norm", "dropout": dropout}
        self.mlp = models.MLP([hops * hidden, hidden, out_channels], **options)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([linear(x[:, hop]) for hop, linear in enumerate(self.maps)], 1)
        return self.mlp(F.dropout(self.norm(x).relu(), self.dropout, self.training))


class CorrectAndSmooth(_Rows):
    """Huang et al.: an MLP whose outputs are corrected and smoothed along the graph."""

    def build(self) -> nn.Module:
        config = self.config
        channels = [self.data.num_features] + [config.hidden] * (config.layers - 1) + [self.task.out_channels]
        return models.MLP(channels, **model_options(config))

    def features(self) -> Tensor:
        self.matrix = _symmetric(self.data)
        return self.data.x

    def logits(self, model: nn.Module) -> Tensor:
        post = models.CorrectAndSmooth(50, 0.9, 50, 0.8, autoscale=True)
        mask, soft = self.data.train_mask, super().logits(model).softmax(1)
        corrected = post.correct(soft, self.data.y[mask], mask, self.matrix)
        return post.smooth(corrected, self.data.y[mask], mask, self.matrix)


class LabelPropagation(_Rows):
    """Zhu & Ghahramani: labels spread along the graph; nothing is learnt."""

    def build(self) -> nn.Module:
        return nn.Linear(1, 1)

    def features(self) -> Tensor:
        return self.data.x[:, :1]

    def steps(self) -> Iterator[Step]:
        return iter(())

    def logits(self, model: nn.Module) -> Tensor:
        return models.LabelPropagation(50, 0.9)(self.data.y, _symmetric(self.data), self.data.train_mask)


def _symmetric(data: Data):
    """D^-1/2 A D^-1/2."""
    edge_index, weight = gcn_norm(data.edge_index, None, data.num_nodes, add_self_loops=False)
    return sparse(edge_index, data.num_nodes, weight)


PEERS: dict[str, type[Peer]] = {
    "cluster-gcn": ClusterGCN,
    "lmc-mixed": LMC,
    "saint-rw": GraphSAINT,
    "saint-rw-plain": PlainGraphSAINT,
    "ns-sage": NeighbourSampling,
    "sgc": SGC,
    "sign": SIGN,
    "lp": LabelPropagation,
    "c&s": CorrectAndSmooth,
}


def train(method: str, config: Config, dataset: Dataset, batches: int) -> tuple[list[dict], dict]:
    """(an object an epoch, what the run cost)."""
    memory.reset_peak()
    before = memory.resident()
    peer = PEERS[method](config, dataset, batches)
    metrics = peer.fit()
    above = None if before is None else max(0, memory.peak() - before)
    state = peer.state_bytes()  # of LMC alone, in fp32
    peak = "" if above is None else round(above / 1e6)
    return metrics, {"peak_mb": peak, "state_bytes": state, "dense_bytes": state}
