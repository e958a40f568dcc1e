"""How kernels are launched: the tile, the device, and autotuning; the GPU and the kernel are stand-ins."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from vqgnn_kernels import _tiles, _triton  # noqa: E402  (after the skip)
from vqgnn_kernels._tiles import Tile  # noqa: E402

SMALL, MIDDLE, LARGE = (Tile({"BLOCK_R": size}, num_warps=warps) for size, warps in ((1, 1), (4, 2), (16, 8)))
MILLISECONDS = {1: 3.0, 4: 1.0, 16: 2.0}  # by BLOCK_R


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on the second GPU."""

    device = torch.device("cuda", 1)


class Kernel:
    """Notes its launches; a tile of `too_large` rows needs more than the device has."""

    fn = SimpleNamespace(__name__="stand_in_kernel")

    def __init__(self):
        self.launches, self.too_large = [], None

    def __getitem__(self, programs):
        def run(BLOCK_R, **arguments):
            if self.too_large == BLOCK_R:
                raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
            self.launches.append((programs, BLOCK_R, arguments))

        return run


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel()
    monkeypatch.setitem(_tiles.TILES, "stand_in_kernel", (SMALL._replace(when=lambda s: s["f"] == 1), MIDDLE, LARGE))
    return kernel


@pytest.fixture
def tuned(kernel, monkeypatch, tmp_path):
    """A GPU and a cache folder, and the list of BLOCK_R that were timed; autotuning is on."""
    timed = []

    def bench(function):
        function()
        timed.append(kernel.launches.pop()[1])
        return MILLISECONDS[timed[-1]]

    monkeypatch.setenv("VQGNN_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton.testing, "do_bench", bench)
    _triton._autotuned.cache_clear()
    yield timed
    _triton._autotuned.cache_clear()


def launch(kernel, rows=20, sizes=None, pure=True, tensor=None):
    x = torch.zeros(1).as_subclass(OnCuda) if tensor is None else tensor
    arguments = {"p_x": x, "p_none": None, "num_rows": rows}
    grid = lambda blocks: (triton.cdiv(rows, blocks["BLOCK_R"]),)  # noqa: E731
    _triton.launch(kernel, grid, arguments, sizes or {"f": 8}, pure)
    return kernel.launches[-1][1] if kernel.launches else None


def new_process():
    _triton._autotuned.cache_clear()


def cache(tmp_path):
    return tmp_path / "vqgnn" / "tiles.json"


def test_first_tile_meant_for_the_sizes_is_taken(kernel):
    x = torch.zeros(1)
    assert launch(kernel, tensor=x) == 4
    assert launch(kernel, tensor=x, sizes={"f": 1}) == 1
    programs, _, arguments = kernel.launches[0]
    assert programs == (5,)
    assert arguments == {"p_x": x, "p_none": None, "num_rows": 20, "num_warps": 2, "num_stages": 2}


def test_nothing_to_do_launches_nothing(kernel):
    assert launch(kernel, rows=0, tensor=torch.zeros(1)) is None


def test_launch_is_on_the_tensors_device(kernel, tuned, monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or contextlib.nullcontext())
    launch(kernel)
    assert devices == [torch.device("cuda", 1)]


def test_autotuning_times_once_and_remembers(kernel, tuned, tmp_path):
    assert launch(kernel) == 4
    assert tuned == [1, 4, 16]
    assert launch(kernel) == 4
    new_process()
    assert launch(kernel) == 4
    assert len(tuned) == 3
    launch(kernel, sizes={"f": 9})
    assert len(tuned) == 6
    assert [path.name for path in cache(tmp_path).parent.iterdir()] == ["tiles.json"]
    assert list(json.loads(cache(tmp_path).read_text()).values()) == [[{"BLOCK_R": 4}, 2, 2]] * 2


@pytest.mark.parametrize("why", ["not asked for", "not pure", "interpreted"])
def test_autotuning_is_off(kernel, tuned, monkeypatch, why):
    monkeypatch.setitem(MILLISECONDS, 4, 9.0)  # the shipped tile is not the fastest
    if why == "not asked for":
        monkeypatch.delenv("VQGNN_AUTOTUNE")
    if why == "interpreted":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch(kernel, pure=why != "not pure") == 4
    assert tuned == []


def test_a_captured_graph_takes_what_is_known_and_times_nothing(kernel, tuned, monkeypatch):
    monkeypatch.setitem(MILLISECONDS, 4, 9.0)  # the shipped tile is not the fastest
    assert launch(kernel) == 16
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch(kernel) == 16
    assert launch(kernel, sizes={"f": 9}) == 4
    assert len(tuned) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '"a"',
        "\x00\xff",
        "KEY: 1",
        "KEY: -1",
        "KEY: null",
        'KEY: "4"',
        'KEY: [{"BLOCK_R": 5}, 2, 2]',
    ],
)
def test_a_damaged_cache_is_timed_again(kernel, tuned, tmp_path, text):
    launch(kernel)
    (key,) = json.loads(cache(tmp_path).read_text())
    cache(tmp_path).write_text(f"{{{json.dumps(key)}{text[3:]}}}" if text.startswith("KEY") else text, "latin-1")
    new_process()
    assert launch(kernel) == 4
    assert len(tuned) == 6
    new_process()
    launch(kernel)
    assert len(tuned) == 6


def test_a_tile_that_the_device_cannot_hold_is_skipped(kernel, tuned):
    kernel.too_large = 4
    assert launch(kernel) == 16


def test_no_tile_fits(kernel, tuned, monkeypatch):
    monkeypatch.setitem(_tiles.TILES, "stand_in_kernel", (MIDDLE,))
    kernel.too_large = 4
    with pytest.raises(triton.runtime.errors.OutOfResources):
        launch(kernel)


def test_a_cache_folder_that_cannot_be_written(kernel, tuned, tmp_path):
    (tmp_path / "vqgnn").write_text("a file where the folder should be")
    assert launch(kernel) == 4
    assert launch(kernel) == 4
    assert len(tuned) == 3


def test_a_tile_that_has_moved_in_the_table_is_still_found(kernel, tuned, monkeypatch):
    launch(kernel)
    new_process()
    monkeypatch.setitem(_tiles.TILES, "stand_in_kernel", (LARGE, MIDDLE, SMALL))
    assert launch(kernel) == 4
    assert len(tuned) == 3
