"""Graphs by name: generated, .npz files, OGB's and PyG's; checked once, here, so that training need not."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.utils import coalesce, to_undirected

from . import link_splits
from .config import Config, InputError
from .disk_graph import GraphFolder, MappedData
from .generate import GeneratedGraph
from .link_splits import Links
from .partitioning import cache_folder

MASKS = ("train_mask", "val_mask", "test_mask")
OGB = ("ogbn-arxiv", "ogbn-products", "ogbn-papers100M")
PYG = {name.lower(): name for name in ("Cora", "CiteSeer", "PubMed", "Flickr", "Reddit", "Yelp", "PPI")}


@dataclass(frozen=True)
class Dataset:
    """A graph to train on: `data` has x [n, f] float32, y [n] int64 or [n, C] float32, masks [n], edge_index [2, e]."""

    name: str
    data: Data
    num_classes: int
    multilabel: bool
    links: Links | None = None  # edges to predict; the graph then needs no labels and no masks

    @property
    def metric(self) -> str:
        """What is measured: "acc", or "f1" (micro) where a node has several labels."""
        return "f1" if self.multilabel else "acc"

    def fingerprint(self) -> dict[str, int | str]:
        """Tells this graph from others: sizes and a hash of edges, features, labels and masks."""
        digest = hashlib.blake2b(digest_size=16)
        if isinstance(self.data, MappedData):
            return self.data.folder.fingerprint
        tensors = [self.data[key] for key in ("edge_index", "x", "y", *MASKS) if key in self.data]
        for tensor in [*tensors, *(self.links.tensors().values() if self.links else ())]:
            digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
        return {"nodes": self.data.num_nodes, "edges": self.data.num_edges, "hash": digest.hexdigest()}


def of_config(config: Config) -> Dataset:
    """The data set that a config names."""
    if config.task == "node":
        return load(config.dataset, config.split, config.directed, config.columns(), config.random_width)
    name, options = config.dataset, (config.directed, config.columns(), config.random_width)
    return load_links(name, None if config.links is None else Path(config.links), config.split, *options)


def load(
    name: str, split: int = 0, directed: bool = False, columns: slice | None = None, random: int | None = None
) -> Dataset:
    """A data set by name, checked.

    Args:
        name: "generated[:n=...,...]", a path of an .npz file or of a graph folder (see disk_graph; a large generated
            graph is one), "ogbn-arxiv" (through ogb), or "cora" (through PyG).
        split: which column of the masks, where there are several.
        directed: keep the edges as stored; else the graph is made undirected. Duplicates go, self loops stay.
        columns: use only these feature columns.
        random: instead of the graph's features, if it has any, this many normal random numbers a node, always the
            same: a random projection of the nodes' identity.

    Raises:
        InputError: anything wrong with the name or the data, in one line.
    """
    arrays = _read(name, directed, columns, random)
    if isinstance(arrays, Path):
        return _mapped(name, arrays, split, directed, columns or random)
    return _checked(name, arrays, split, directed, columns)


def load_links(
    name: str,
    path: Path | None = None,
    split: int = 0,
    directed: bool = False,
    columns: slice | None = None,
    random: int | None = None,
) -> Dataset:
    """A graph of which edges are to be predicted, checked; it needs no labels and no masks.

    Args:
        name, directed, columns, random: as in `load`.
        path: .npz file of the edges to predict (see `link_splits.given_split`), or None for a random split.
        split: number of the random split, or of the edges that are drawn for a recommender's validation.
    """
    arrays = _read(name, directed, columns, random)
    if isinstance(arrays, Path):
        raise InputError(f"dataset {name!r} is on disk; --task link needs a graph in memory")
    x, edge_index = _checked_graph(name, arrays, _num_nodes(arrays), columns)
    if path is None:
        edge_index, found = link_splits.random_split(edge_index, len(x), split)
    else:
        edge_index, found = link_splits.given_split(str(path), read_npz(path), edge_index, len(x), split, directed)
    return Dataset(name, Data(x=x, edge_index=_edges(edge_index, len(x), directed)), 0, False, found)


def _read(name: str, directed: bool, columns: slice | None, random: int | None) -> dict[str, np.ndarray] | Path:
    """Arrays by name, or the folder of a graph on disk."""
    if name == "generated" or name.startswith("generated:"):
        graph = GeneratedGraph.parse(name.partition(":")[2])
        if graph.on_disk:
            return graph.cached_on_disk(cache_folder(), directed)
        arrays = read_npz(graph.cached(cache_folder()), columns)
    elif (Path(name).expanduser() / "meta.json").exists():
        return Path(name).expanduser()
    elif name.endswith(".npz") or os.sep in name:
        arrays = read_npz(Path(name).expanduser(), columns)
    elif name in OGB:
        arrays = _downloaded(name, _read_ogb)
    elif name.lower() in PYG:
        arrays = _downloaded(PYG[name.lower()], _read_pyg)
    else:
        known = ", ".join([*OGB, *PYG])
        raise InputError(f"dataset {name!r} is unknown; use 'generated[:n=N,...]', a path of an .npz file, or {known}")
    if random is not None and (n := _num_nodes(arrays)) is not None:
        arrays["x"] = torch.randn(n, random, generator=torch.Generator().manual_seed(0)).numpy()
    return arrays


def _num_nodes(arrays: dict[str, np.ndarray]) -> int | None:
    for key in ("y", "x"):
        if key in arrays and arrays[key].ndim:
            return len(arrays[key])
    return int(arrays["num_nodes"]) if "num_nodes" in arrays else None


def _mapped(name: str, path: Path, split: int, directed: bool, features: slice | int | None) -> Dataset:
    """A graph folder as it is: what would need another copy of it is refused."""
    folder = GraphFolder(path)
    if split or features:
        raise InputError(
            f"dataset {name!r} is on disk: it has one split and all its features; leave out --split, --features"
        )
    if directed == folder.undirected:
        kind = "undirected" if folder.undirected else "directed"
        raise InputError(f"dataset {name!r} is {kind}; {'leave out' if directed else 'give'} --directed")
    return Dataset(name, MappedData(folder), folder.meta["classes"], multilabel=False)


def read_npz(path: Path, columns: slice | None = None) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, sparse features (x_data, x_indices, x_indptr, x_shape) made dense."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise InputError(f"dataset {str(path)!r} does not exist; give the path of an .npz file") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"dataset {str(path)!r} is not a readable .npz file ({_first_line(error)})") from error
    if "x_data" in arrays and "x" not in arrays:
        arrays["x"] = _dense(str(path), arrays, columns)
    elif columns is not None and "x" in arrays:
        arrays["x"] = arrays["x"][:, _within(str(path), columns, arrays["x"].shape[1])]
    return arrays


def read_new_nodes(path: Path, columns: slice | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`(x [k, f] float32, edge_index [2, e] int64)` of an .npz file of new nodes; columns as in `load`."""
    arrays = read_npz(path, columns)
    missing = [key for key in ("x", "edge_index") if key not in arrays]
    if missing:
        raise InputError(f"--new {str(path)!r} lacks {', '.join(missing)}; needed are x [k, f] and edge_index [2, e]")
    x, edges = arrays["x"], arrays["edge_index"]
    if x.ndim != 2 or x.dtype.kind not in "fiub" or edges.ndim != 2 or len(edges) != 2 or edges.dtype.kind not in "iu":
        came = f"x {list(x.shape)} {x.dtype} and edge_index {list(edges.shape)} {edges.dtype}"
        raise InputError(f"--new {str(path)!r} has {came}; needed are numbers x [k, f] and integers edge_index [2, e]")
    if not np.isfinite(x).all():
        raise InputError(f"--new {str(path)!r} has features that are NaN or infinite; clean x first")
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)), torch.from_numpy(edges.astype(np.int64))


def _dense(name: str, arrays: dict[str, np.ndarray], columns: slice | None) -> np.ndarray:
    """[n, f] float32 of the CSR arrays' (chosen) columns; those never wanted are never allocated."""
    missing = [key for key in ("x_indices", "x_indptr", "x_shape") if key not in arrays]
    if missing:
        raise InputError(f"dataset {name!r} lacks {', '.join(missing)}, which belong to x_data")
    value, column, rowptr = arrays["x_data"], arrays["x_indices"].astype(np.int64), arrays["x_indptr"].astype(np.int64)
    num_rows, width = (int(size) for size in arrays["x_shape"])
    if (
        len(rowptr) != num_rows + 1
        or (np.diff(rowptr) < 0).any()
        or (rowptr[0], rowptr[-1]) != (0, len(value))
        or len(column) != len(value)
        or (len(column) and not 0 <= column.min() <= column.max() < width)
    ):
        raise InputError(f"dataset {name!r} has sparse features that do not fit x_shape = {num_rows} x {width}")
    columns = _within(name, columns, width)
    keep = (column >= columns.start) & (column < columns.stop)
    row = np.repeat(np.arange(num_rows), np.diff(rowptr))
    x = np.zeros((num_rows, columns.stop - columns.start), np.float32)
    x[row[keep], column[keep] - columns.start] = value[keep]
    return x


def _within(name: str, columns: slice | None, width: int) -> slice:
    if columns is None:
        return slice(0, width)
    if columns.stop > width:
        raise InputError(f"--features {columns.start}:{columns.stop}: dataset {name!r} has {width} feature columns")
    return columns


def _downloaded(name: str, read: Callable[[str, Path], dict]) -> dict[str, np.ndarray]:
    """Whatever goes wrong in another library's download becomes one line."""
    try:
        return read(name, cache_folder() / "datasets")
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"dataset {name!r} needs a package: {error}; pip install 'vqgnn[train]'") from error
    except Exception as error:
        raise InputError(
            f"dataset {name!r} could not be downloaded or read ({type(error).__name__}: {_first_line(error)}); "
            "without a network use 'generated' or an .npz file"
        ) from error


def _read_ogb(name: str, root: Path) -> dict[str, np.ndarray]:
    from ogb.nodeproppred import NodePropPredDataset

    # ogb's own files are pickled dictionaries, which torch.load refuses since 2.6
    before = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        dataset = NodePropPredDataset(name, root=str(root))
        graph, label = dataset[0]
        split = dataset.get_idx_split()
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = before
    masks = {key: np.zeros(len(label), bool) for key in MASKS}
    for key, part in zip(MASKS, ("train", "valid", "test"), strict=True):
        masks[key][split[part]] = True
    classes = np.int64(dataset.num_classes)
    y = np.where(np.isfinite(label[:, 0]), label[:, 0], -1).astype(np.int64)
    return {"x": graph["node_feat"], "y": y, "edge_index": graph["edge_index"], "num_classes": classes, **masks}


def _read_pyg(name: str, root: Path) -> dict[str, np.ndarray]:
    from torch_geometric import datasets

    root = str(root / name)
    if name == "PPI":  # 24 graphs, split by graph
        parts = [Batch.from_data_list(list(datasets.PPI(root, split=part))) for part in ("train", "val", "test")]
        data = Batch.from_data_list([Data(x=p.x, y=p.y, edge_index=p.edge_index) for p in parts])
        for index, key in enumerate(MASKS):
            data[key] = data.batch == index
    elif name in ("Cora", "CiteSeer", "PubMed"):
        data = datasets.Planetoid(root, name)[0]
    else:
        data = getattr(datasets, name)(root)[0]
    return {key: data[key].numpy() for key in ("x", "y", "edge_index", *MASKS)}


def _checked(name: str, arrays: dict[str, np.ndarray], split: int, directed: bool, columns: slice | None) -> Dataset:
    """Tensors of the arrays, or an InputError that says what is wrong with them."""
    refuse = _refuse(name)
    missing = [key for key in ("y", *MASKS) if key not in arrays]
    if missing:
        refuse(f"lacks {', '.join(missing)}; needed are x (or x_data, ...), y, edge_index and {', '.join(MASKS)}")
    y = arrays["y"]
    if y.ndim not in (1, 2) or y.size == 0:
        refuse(f"has y of shape {list(y.shape)}; it must be [nodes] or [nodes, classes]")
    n = len(y)
    x, edge_index = _checked_graph(name, arrays, n, columns)

    masks = {key: _mask(refuse, key, arrays[key], n, split) for key in MASKS}
    for first, second in (MASKS[:2], MASKS[1:], MASKS[::2]):
        if (overlap := int((masks[first] & masks[second]).sum())) > 0:
            refuse(f"has {overlap} nodes in both {first} and {second} of split {split}; they must be disjoint")
    labelled = np.logical_or.reduce(list(masks.values()))
    multilabel = y.ndim == 2 and y.shape[1] > 1
    y, num_classes = _labels(refuse, arrays, y if multilabel else y.reshape(n), labelled)

    data = Data(x=x, y=torch.from_numpy(y), edge_index=_edges(edge_index, n, directed))
    data.update({key: torch.from_numpy(np.ascontiguousarray(mask)) for key, mask in masks.items()})
    return Dataset(name, data, num_classes, multilabel)


def _refuse(name: str) -> Callable[[str], None]:
    def refuse(problem: str) -> None:
        raise InputError(f"dataset {name!r} {problem}")

    return refuse


def _checked_graph(
    name: str, arrays: dict[str, np.ndarray], n: int | None, columns: slice | None
) -> tuple[torch.Tensor, np.ndarray]:
    """(features [n, f] float32, edges [2, e] as they are stored)."""
    refuse = _refuse(name)
    if "x" not in arrays:
        refuse(
            "has no features x; give every node some, or --features random:D or learned:D, D numbers a node, e.g. 128"
        )
    if "edge_index" not in arrays:
        refuse("lacks edge_index [2, edges]")
    if "edge_weight" in arrays:
        refuse("has edge_weight, and here all edges weigh alike; remove it, or use vqgnn.convert, which takes weights")
    x, edge_index = arrays["x"], arrays["edge_index"]
    if x.ndim != 2 or len(x) != n or x.shape[1] == 0 or x.dtype.kind not in "fiub":
        refuse(f"has x of shape {list(x.shape)}, {x.dtype}, for {n} nodes; it must be numbers [nodes, features]")
    if columns is not None and x.shape[1] != columns.stop - columns.start:  # downloaded sets are not yet cut
        x = x[:, _within(name, columns, x.shape[1])]
    if not np.isfinite(x.sum(dtype=np.float64)):
        bad = int((~np.isfinite(x)).any(1).sum())
        refuse(f"has features that are NaN or infinite, at {bad} of {n} nodes; clean x first")
    if edge_index.ndim != 2 or len(edge_index) != 2 or not np.issubdtype(edge_index.dtype, np.integer):
        refuse(f"has edge_index of shape {list(edge_index.shape)}, {edge_index.dtype}; it must be [2, edges] integers")
    if edge_index.size and not 0 <= edge_index.min() <= edge_index.max() < n:
        refuse(f"has edges between nodes {edge_index.min()}..{edge_index.max()}; its nodes are 0..{n - 1}")
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)), edge_index


def _edges(edge_index: np.ndarray, n: int, directed: bool) -> torch.Tensor:
    """[2, e] int64 without duplicates; a copy: torch wants writable memory of its own dtype."""
    edges = torch.from_numpy(edge_index.astype(np.int64))
    return coalesce(edges, num_nodes=n) if directed else to_undirected(edges, num_nodes=n)


def _mask(refuse: Callable[[str], None], key: str, mask: np.ndarray, n: int, split: int) -> np.ndarray:
    """[n] bool of the chosen split."""
    if mask.dtype != bool or mask.ndim not in (1, 2) or len(mask) != n:
        refuse(f"has {key} of shape {list(mask.shape)}, {mask.dtype}; it must be bool [{n}] or [{n}, splits]")
    splits = mask.shape[1] if mask.ndim == 2 else 1
    if split >= splits:
        refuse(f"has no split {split}; choose --split in 0..{splits - 1}")
    mask = mask[:, split] if mask.ndim == 2 else mask
    if not mask.any():
        refuse(f"has an empty {key} in split {split}; every split needs nodes")
    return mask


def _labels(refuse: Callable[[str], None], arrays: dict, y: np.ndarray, labelled: np.ndarray) -> tuple[np.ndarray, int]:
    """(int64 [n] or float32 [n, C], number of classes); nodes outside the masks may lack a label."""
    if y.ndim == 2:
        if not np.isin(y[labelled], (0, 1)).all():
            refuse("has several labels a node that are not all 0 or 1; y must be multi-hot")
        return np.nan_to_num(y).astype(np.float32), y.shape[1]
    if not np.issubdtype(y.dtype, np.integer):
        refuse(f"has labels of {y.dtype}; y must be integer class numbers [nodes] or multi-hot [nodes, classes]")
    known = y[labelled]
    if "num_classes" in arrays:
        if arrays["num_classes"].size != 1 or arrays["num_classes"].dtype.kind not in "iu":
            refuse(f"has num_classes {list(arrays['num_classes'].shape)}; it must be one number")
        num_classes = int(arrays["num_classes"].item())
    elif "label_names" in arrays:
        num_classes = len(arrays["label_names"])
    else:
        num_classes = int(known.max()) + 1
    if known.min() < 0 or known.max() >= num_classes:
        refuse(f"has labels {known.min()}..{known.max()} in its splits; its classes are 0..{num_classes - 1}")
    return y.astype(np.int64), num_classes


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
