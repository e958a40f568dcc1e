"""Which back-end serves an op: Triton for CUDA tensors, the C++ extension for CPU tensors, else plain torch."""

import importlib
import importlib.util
import os
import warnings
from functools import cache
from types import ModuleType

import torch  # before the native module: both must share torch's OpenMP runtime

try:
    from . import _C
except ImportError as error:
    _C = None
    _C_ERROR = str(error)

NAMES = ("reference", "cpp", "triton")


def forced() -> str | None:
    """The back-end that VQGNN_BACKEND forces, or None."""
    name = os.environ.get("VQGNN_BACKEND", "")
    if name in ("", "auto"):
        return None
    if name not in NAMES:
        raise ValueError(f"VQGNN_BACKEND={name!r} is not a back-end; set it to one of {', '.join(NAMES)} or unset it")
    reason = unavailable(name)
    if reason:
        raise ValueError(f"VQGNN_BACKEND={name!r} cannot be used: {reason}; unset it to choose automatically")
    return name


def unavailable(name: str) -> str | None:
    """Why a back-end cannot be used, or None when it can."""
    if name == "cpp" and _C is None:
        return f"the native extension is not there ({_C_ERROR})"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (CUDA builds of torch bring it)"
        if not interpreted() and not torch.cuda.is_available():
            return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU; it must be set before the kernels' first use."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # Triton's own rule


def transfer_engine(**options: int):
    """The native engine that moves rows beside the computation: csrc/transfer/engine.h; for vqgnn/transfer.py."""
    if _C is None:
        raise RuntimeError(f"the transfer engine needs the native extension, which is not there ({_C_ERROR})")
    return _C.TransferEngine(**options)


def choose(*tensors: torch.Tensor | None) -> str:
    """Name of the back-end that serves these tensors."""
    cuda = any(getattr(t, "is_cuda", False) for t in tensors)
    choice = forced()
    if choice == "cpp" and cuda:
        raise ValueError("VQGNN_BACKEND='cpp' serves CPU tensors, but got a CUDA tensor; unset it or move the tensors")
    if choice == "triton" and not cuda and not interpreted():
        choice = None  # with a GPU at hand, tensors on the CPU are still the CPU's
    if choice is not None:
        return choice
    name = "triton" if cuda else "cpp"
    if unavailable(name):
        _warn_fallback(name)
        return "reference"
    return name


def implementation(op: str, *tensors: torch.Tensor | None) -> ModuleType:
    """The module of package `op` that serves these tensors: its reference.py, cpp.py or triton.py."""
    return _module(op, choose(*tensors))


@cache
def _module(op: str, name: str) -> ModuleType:
    return importlib.import_module(f"{op}.{name}")  # late: importing triton takes a while, and CPUs do without it


@cache
def _warn_fallback(name: str) -> None:
    device, remedy = ("CUDA", "pip install triton") if name == "triton" else ("CPU", "reinstall with a C++ compiler")
    warnings.warn(
        f"vqgnn_kernels runs on its slow torch reference for {device} tensors: {unavailable(name)}; {remedy}",
        RuntimeWarning,
        stacklevel=7,  # the op's caller: choose, implementation, _impl, torch's dispatcher and the op lie between
    )


def backends() -> dict[str, str]:
    """State of every back-end: "used (...)", "available" or why it is off.

    `VQGNN_BACKEND=reference|cpp|triton` forces one.
    """
    choice = forced()
    if choice is None or (choice == "triton" and not interpreted()):  # as in choose: one for each kind of device
        names = ("cpp", "triton") if torch.cuda.is_available() else ("cpp",)
        used = {"reference" if unavailable(name) else name for name in names}
    else:
        used = {choice}
    state = {}
    for name in NAMES:
        reason = unavailable(name)
        state[name] = f"off: {reason}" if reason else ("used" if name in used else "available") + _detail(name)
    return state


def _detail(name: str) -> str:
    if name == "cpp":
        return f" ({_C.isa()})"
    if name == "triton":
        return " (interpreter)" if interpreted() else " (CUDA tensors)"
    return ""


def set_num_threads(count: int) -> None:
    """Number of OpenMP threads for work started by the calling thread, and by it alone.

    torch.set_num_threads would change the other threads' numbers too. Without the extension it does nothing.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if _C is not None:
        torch.get_num_threads()  # a thread's first use of torch sets its number, and would undo this one
        _C.set_num_threads(count)
