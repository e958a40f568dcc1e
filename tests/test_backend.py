"""Which back-end is chosen, by a patched machine: no GPU is needed, and none is looked for."""

import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from marks import needs_cpp

from vqgnn_kernels import _backend, csr_slice

CPU, CUDA = SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=True)


@pytest.fixture
def machine(monkeypatch):
    """machine(...): has the extension, Triton or a GPU, or not; with the environment's variables at their defaults."""

    def set_up(cpp=True, triton=True, gpu=True, force=None, interpret=None):
        for name, value in (("VQGNN_BACKEND", force), ("TRITON_INTERPRET", interpret)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        monkeypatch.setattr(_backend, "_C", SimpleNamespace(isa=lambda: "avx2") if cpp else None)
        monkeypatch.setattr(_backend, "_C_ERROR", "no module named _C", raising=False)
        monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        _backend._warn_fallback.cache_clear()

    yield set_up
    _backend._warn_fallback.cache_clear()


def test_each_device_has_its_back_end(machine):
    machine()
    assert _backend.choose(CPU, None) == "cpp"
    assert _backend.choose(CPU, None, CUDA) == "triton"
    assert _backend.choose() == "cpp"


@pytest.mark.parametrize("force", ["", "auto"])
def test_no_force(machine, force):
    machine(force=force)
    assert _backend.forced() is None
    assert (_backend.choose(CPU), _backend.choose(CUDA)) == ("cpp", "triton")


@pytest.mark.parametrize("tensor", [CPU, CUDA])
def test_reference_serves_every_device(machine, tensor):
    machine(force="reference")
    assert _backend.choose(tensor) == "reference"


def test_forced_triton_leaves_the_cpu_alone_unless_interpreted(machine):
    machine(force="triton")
    assert (_backend.choose(CPU), _backend.choose(CUDA)) == ("cpp", "triton")
    machine(force="triton", interpret="1", gpu=False)
    assert _backend.choose(CPU) == "triton"


def test_interpreter_is_not_chosen_unasked(machine):
    machine(interpret="1", gpu=False)
    assert _backend.choose(CPU) == "cpp"


@pytest.mark.parametrize(
    ("message", "state"),
    [
        ("'cuda' is not a back-end; set it to one of reference, cpp, triton", {"force": "cuda"}),
        (
            "'cpp' cannot be used: the native extension is not there .no module named _C.",
            {"force": "cpp", "cpp": False},
        ),
        ("'triton' cannot be used: triton is not installed", {"force": "triton", "triton": False}),
        ("'triton' cannot be used: torch sees no CUDA device", {"force": "triton", "gpu": False}),
    ],
)
def test_what_cannot_be_forced_is_said(machine, message, state):
    machine(**state)
    for use in (_backend.forced, _backend.backends, lambda: _backend.choose(CPU)):
        with pytest.raises(ValueError, match=message):
            use()


def test_cpp_cannot_serve_cuda(machine):
    machine(force="cpp")
    assert _backend.choose(CPU) == "cpp"
    with pytest.raises(ValueError, match="serves CPU tensors, but got a CUDA tensor; unset it or move"):
        _backend.choose(CPU, CUDA)


@pytest.mark.parametrize(
    ("tensor", "state", "message"),
    [
        (CPU, {"cpp": False}, "slow torch reference for CPU tensors: the native extension.*C\\+\\+ compiler"),
        (CUDA, {"triton": False}, "slow torch reference for CUDA tensors: triton is not installed.*pip install triton"),
    ],
)
def test_fallback_is_announced_once(machine, tensor, state, message):
    machine(**state)
    with pytest.warns(RuntimeWarning, match=message):
        assert _backend.choose(tensor) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backend.choose(tensor) == "reference"


def test_fallback_points_at_the_caller(machine):
    machine(cpp=False)
    with pytest.warns(RuntimeWarning) as caught:
        csr_slice(torch.tensor([0, 1]), torch.tensor([0], dtype=torch.int32), torch.tensor([0]))
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("state", "used"),
    [
        ({}, {"cpp", "triton"}),
        ({"gpu": False}, {"cpp"}),
        ({"gpu": False, "interpret": "1"}, {"cpp"}),
        ({"gpu": False, "interpret": "1", "cpp": False}, {"reference"}),
        ({"cpp": False}, {"reference", "triton"}),
        ({"triton": False}, {"cpp", "reference"}),
        ({"force": "reference"}, {"reference"}),
        ({"force": "cpp"}, {"cpp"}),
        ({"force": "triton"}, {"cpp", "triton"}),
        ({"force": "triton", "gpu": False, "interpret": "1"}, {"triton"}),
    ],
)
def test_backends_says_what_is_used(machine, state, used):
    machine(**state)
    report = _backend.backends()
    assert list(report) == ["reference", "cpp", "triton"]
    assert {name for name, text in report.items() if text.startswith("used")} == used
    assert ("off: " in report["cpp"]) == (not state.get("cpp", True))


def test_backends_gives_details(machine):
    machine()
    assert _backend.backends() == {"reference": "available", "cpp": "used (avx2)", "triton": "used (CUDA tensors)"}
    machine(gpu=False, triton=False)
    assert _backend.backends()["triton"] == "off: triton is not installed (CUDA builds of torch bring it)"
    machine(gpu=False, interpret="true")
    assert _backend.backends()["triton"] == "available (interpreter)"


def test_implementation_is_the_modules_own(monkeypatch):
    monkeypatch.setenv("VQGNN_BACKEND", "reference")
    assert _backend.implementation("vqgnn_kernels.csr_slice", CPU).__name__ == "vqgnn_kernels.csr_slice.reference"


@needs_cpp
def test_number_of_threads_stays():
    """Also in a thread that has not used torch before."""
    numbers, before = [], torch.get_num_threads()

    def work():
        _backend.set_num_threads(1)
        torch.zeros(1 << 17, 4)[torch.arange(1 << 17)]
        numbers.append(torch.get_num_threads())

    torch.set_num_threads(2)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert numbers == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_number_of_threads_is_checked():
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        _backend.set_num_threads(0)
