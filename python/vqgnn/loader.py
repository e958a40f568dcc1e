"""Mini-batches of nodes, built by a background thread while the model computes."""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from vqgnn_kernels import set_num_threads

from . import samplers
from .edge_dropout import EdgeDropout
from .graph import BatchGraph, Graph, MovedBatch, node_tensors
from .hetero_graph import HeteroGraph, tensors_by_type
from .samplers import SAMPLERS

_WIDE = 64e6  # bytes of a batch's features, of which two batches more would be most of what training needs
_PARTS_A_BATCH = 8  # clusters joined into a batch when only a batch size is given
_PASSES = itertools.count()  # of all loaders


class Batch:
    """A mini-batch: `n_id` [b], `graph`, and the node-level tensors of the data (`x`, `y`, masks, ...) of its nodes.

    `loss_weight` [b] is what a node's loss counts where not every node is visited once an epoch; else None. For models
    that take a `Data`, `edge_index` is the graph, which convs take what edges have from: `edge_attr` and `edge_weight`
    are None.
    """

    loss_weight: Tensor | None = None
    edge_attr = edge_weight = None

    def __init__(self, graph: BatchGraph, tensors: dict[str, Tensor]):
        self.__dict__.update(tensors)
        self.graph = graph
        self.n_id = graph.n_id
        self.num_nodes = graph.n_id.numel()

    @classmethod
    def of(cls, graph: BatchGraph, tensors: dict[str, Tensor], move: Callable[[Tensor], Tensor] | None = None) -> Batch:
        """The batch of a graph's nodes, with their rows of `tensors` of all nodes (see `node_tensors`) and its x.

        move: brings them to the model's device; default: at once.
        """
        n_id, move = graph.origin.n_id, move or (lambda tensor: tensor.to(graph.n_id.device))
        if n_id.numel() < graph.graph.num_nodes:
            tensors = {name: tensor[n_id.to(tensor.device)] for name, tensor in tensors.items()}
        return cls(graph, {"x": graph.x, **{name: move(tensor) for name, tensor in tensors.items()}})

    @property
    def edge_index(self) -> BatchGraph:
        return self.graph

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        there = ", ".join(key for key, value in self.__dict__.items() if isinstance(value, Tensor))
        raise AttributeError(
            f"a batch has no {name!r}; it has graph, num_nodes and {there}: of the data what has a row a node, on the "
            "BatchLoader's device. Make a mask [num_nodes] of an index before the loader, and look up other tensors by "
            "batch.n_id"
        )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k}={list(v.shape)}" for k, v in self.__dict__.items() if isinstance(v, Tensor))
        return f"Batch({sizes})"


class _Move:
    """Moves the tensors of one batch to a GPU, beside what is computed there."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream):
        self.device, self.stream, self.copies, self.arrived = device, stream, [], False

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.arrived:  # only the model's run showed that it is needed: in order with what is computed
            return tensor.to(self.device)
        with torch.cuda.stream(self.stream):
            self.copies.append(tensor.pin_memory().to(self.device, non_blocking=True))
            self.last = self.stream.record_event()
        return self.copies[-1]

    def wait(self) -> None:
        """Let the current stream wait for the copies, and the allocator know that it uses them."""
        self.arrived = True
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.last)
        for copy in self.copies:
            copy.record_stream(current)


class BatchLoader:
    """Iterates over the nodes of a graph in mini-batches; an epoch visits each node once, or weighs its loss.

    Args:
        data: PyG `Data` with `x` [n, f] and `edge_index` [2, e], or `HeteroData` with those of every type. Of that, a
            batch is a `HeteroData` too: nodes of all types, in equal shares, with `x_dict` and, where `edge_index_dict`
            went, `graph_dict`.
        batch_size: nodes a batch, of all types together (with sampler "cluster": on average; "edge", "walk": at most,
            as their draws may meet a node twice). Default: a tenth of the graph.
        num_parts: instead of `batch_size`, split the graph into so many parts ...
        parts_per_batch: ... and join so many of them, drawn anew every epoch, to a batch.
        sampler: "node" (uniformly random nodes), "cluster" (METIS parts, as in Cluster-GCN), "edge" (end points of
            uniformly drawn edges) or "walk" (random walks). The last two visit some nodes more often than others: sum
            `batch.loss_weight` times the losses of the nodes, and an epoch's sum is unbiased. They are for `Data`.
        shuffle: draw new batches every epoch; else nodes (parts) are taken in order.
        seed: with the epoch's number it decides the order.
        prefetch: batches that a background thread builds ahead, so many besides the caller's being in memory; 0 builds
            them in the caller's thread. Default: 2, or 1 where the features of one take more than 64 MB.
        cache_dir: folder for partitions; default: the user's cache folder.
        device: where the model computes; default: the data's. Batches of data in RAM are moved to a GPU by a copy
            stream of their own, while the model computes.
        edge_dropout: share of a batch's edges, self loops apart, that are dropped, others in every epoch; for `Data`.
            The rest count 1 / (1 - edge_dropout) times in a sum or a mean with fixed weights; an attention, or a conv
            of which PyG's own code runs, is given the rest as it is. Not a model's mode but the loader's decides:
            evaluate with `layerwise`, or by a loader without. The input layer reads its halo's features (as with
            `convert(input="rows")`), not C X.
    """

    def __init__(
        self,
        data: Data | HeteroData,
        batch_size: int | None = None,
        num_parts: int | None = None,
        parts_per_batch: int = 1,
        sampler: str = "node",
        shuffle: bool = True,
        seed: int = 0,
        prefetch: int | None = None,
        cache_dir: str | Path | None = None,
        device: torch.device | str | None = None,
        edge_dropout: float = 0.0,
    ):
        n = data.num_nodes
        if not 0 <= edge_dropout < 1:
            raise ValueError(f"edge_dropout={edge_dropout} must be a share of the edges, 0 or more and below 1")
        if edge_dropout and isinstance(data, HeteroData):
            raise ValueError(f"edge_dropout={edge_dropout} is for Data, and data is a HeteroData; leave it out")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler={sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
        if batch_size is not None and num_parts is not None:
            raise ValueError(f"batch_size={batch_size} and num_parts={num_parts} were both given; give one of them")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if parts_per_batch < 1 or (num_parts is not None and not parts_per_batch <= num_parts):
            raise ValueError(f"parts_per_batch={parts_per_batch} must be in 1..num_parts={num_parts}")
        if prefetch is not None and prefetch < 0:
            raise ValueError(f"prefetch={prefetch} must be 0 (no background thread) or more")
        self.data, self.sampler, self.shuffle, self.seed = data, sampler, shuffle, seed
        self.edge_dropout = edge_dropout
        hetero = isinstance(data, HeteroData)
        self.graph = HeteroGraph.of(data) if hetero else Graph.of(data)
        self.device = self.graph.device if device is None else torch.device(device)
        moves = self.device.type != self.graph.device.type
        if moves and hetero:
            raise ValueError(f"device={device!r} but the HeteroData is on {self.graph.device}; move the data")
        if moves and self.graph.device.type == "cuda":
            raise ValueError(f"device={device!r} but the data is on {self.graph.device}; give data.cpu()")
        self._stream = torch.cuda.Stream(self.device) if moves else None
        self._epoch, self._sampler = 0, None
        if num_parts is None:
            batch_size = batch_size or math.ceil(n / 10)
            self._num_batches = math.ceil(n / batch_size)
            num_parts = self._num_batches * _PARTS_A_BATCH
        else:
            self._num_batches = min(math.ceil(num_parts / parts_per_batch), n)
        if self._num_batches > 1:
            make = samplers.make_hetero if hetero else samplers.make
            self._sampler = make(sampler, data, self._num_batches, num_parts, shuffle, cache_dir)
            self._num_batches = self._sampler.num_batches
        if prefetch is None:
            features = self.graph.x_dict.values() if hetero else [self.graph.x]
            prefetch = 1 if sum(x.nbytes for x in features) > _WIDE * self._num_batches else 2
        self.prefetch = prefetch

    def __len__(self) -> int:
        return self._num_batches

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass the one of this epoch: its order depends on `seed` and `epoch` alone."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Batch | HeteroData]:
        if not self.graph.is_of(self.data):
            raise ValueError(
                "data's edges or features were replaced or changed in place after this BatchLoader was made, which has "
                "what was computed from them; make a new one, and convert the model anew if its edges are others"
            )
        self._take_tensors()  # labels and masks may be others than in the last pass
        node_ids = self._draw(self._epoch)
        dropout = None
        if self.edge_dropout:
            dropout = EdgeDropout(
                self.edge_dropout, int(torch.randint(2**62, (), generator=self._generator(self._epoch)))
            )
        self._epoch += 1
        build = partial(self._build, dropout=dropout)
        batches = self._in_background(build, node_ids) if self.prefetch else map(build, node_ids)
        number, repeats = next(_PASSES), self._repeats()
        for i, batch in enumerate(batches):
            yield self._arrived(batch, torch.tensor([number, i, repeats], device="cpu"))

    def _repeats(self) -> bool:
        """Whether a node may be in several batches of a pass."""
        return getattr(self._sampler, "loss_weight", None) is not None

    def _take_tensors(self) -> None:
        if isinstance(self.data, HeteroData):
            self._tensors = tensors_by_type(self.data)
            return
        self._tensors = node_tensors(self.data)
        if self._sampler is not None and self._sampler.loss_weight is not None:
            self._tensors["loss_weight"] = self._sampler.loss_weight.to(self.graph.device)

    def _draw(self, epoch: int) -> list[Tensor]:
        if self._num_batches == 1:
            return [torch.arange(self.graph.num_nodes, device=self.graph.device)]
        # Ascending ids: neighbouring rows of the graph, the features and the store are then read in order.
        return [n_id.to(self.graph.device) for n_id in self._sampler.draw(self._generator(epoch))]

    def _generator(self, epoch: int) -> torch.Generator:
        # mixed into 32 bits: torch's CPU generator reads no more of a seed
        return torch.Generator().manual_seed((self.seed * 0x9E3779B1 + epoch) % 2**32)

    def _build(self, n_id: Tensor, dropout: EdgeDropout | None = None) -> Batch | HeteroData:
        graph = self.graph
        if isinstance(graph, HeteroGraph):
            return graph.batch(graph.by_type(n_id), self._tensors)
        x = graph.x if n_id.numel() == graph.num_nodes else graph.x[n_id]
        batch_graph = BatchGraph(graph, n_id, x, edge_dropout=dropout)
        if self._stream is None:
            return Batch.of(batch_graph.prepare(), self._tensors)
        move = _Move(self.device, self._stream)
        batch = Batch.of(MovedBatch(batch_graph, move).prepare(), self._tensors, move)
        batch.arrival = move
        return batch

    def _arrived(self, batch: Batch | HeteroData, visit: Tensor) -> Batch | HeteroData:
        if self._stream is not None:
            batch.arrival.wait()
        if isinstance(batch, Batch):
            batch.graph.visit = visit
        return batch

    def _in_background(self, build: Callable[[Tensor], Batch], node_ids: list[Tensor]) -> Iterator[Batch]:
        ready: queue.SimpleQueue = queue.SimpleQueue()
        slots = threading.Semaphore(self.prefetch)  # taken before a batch is built: none waits to be put anywhere
        stop, user = threading.Event(), threading.current_thread()
        # For data on a GPU the model's stream: what is built is then in order with what it computes.
        on_gpu, device = self.graph.device.type == "cuda", self.graph.device
        context = torch.cuda.stream(torch.cuda.current_stream(device)) if on_gpu else nullcontext()

        def wanted() -> bool:
            # An iterator that is not used up lives until the process ends. It must not be in native code then, as a
            # daemon thread would: Python ends such a thread in a way that C++ takes for a crash.
            alive = threading.main_thread().is_alive() or (not user.daemon and user.is_alive())
            return alive and not stop.is_set()

        def slot() -> bool:
            while wanted():
                if slots.acquire(timeout=0.1):
                    return True
            return False

        def work() -> None:
            set_num_threads(1)  # the cores belong to the model; this thread only keeps ahead of it
            try:
                with context:
                    for n_id in node_ids:
                        if not slot():
                            return
                        ready.put(build(n_id))
            except BaseException as error:
                ready.put(error)

        # daemon=False: one that a daemon thread begins would else be a daemon too
        thread = threading.Thread(target=work, name="vqgnn-loader", daemon=False)
        thread.start()
        try:
            for _ in node_ids:
                item = ready.get()
                slots.release()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()
