"""Which back-end serves an op: the C++ extension for CPU tensors, else the plain torch reference."""

import os
import warnings
from functools import cache

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
        return "this version has no Triton kernels"
    return None


def use_cpp(*tensors: torch.Tensor | None) -> bool:
    """Whether the C++ kernels serve these tensors (else the reference does)."""
    choice = forced()
    if choice is not None:
        return choice == "cpp"
    if any(t is not None and t.device.type != "cpu" for t in tensors):
        return False
    if _C is None:
        _warn_fallback()
        return False
    return True


@cache
def _warn_fallback() -> None:
    warnings.warn(
        f"vqgnn_kernels runs on its slow torch reference: {unavailable('cpp')}; reinstall with a C++ compiler present",
        RuntimeWarning,
        stacklevel=4,
    )


def backends() -> dict[str, str]:
    """State of every back-end: "used (...)", "available" or why it is off.

    `VQGNN_BACKEND=reference|cpp|triton` forces one.
    """
    choice = forced() or ("cpp" if _C is not None else "reference")
    state = {}
    for name in NAMES:
        reason = unavailable(name)
        detail = f" ({_C.isa()})" if name == "cpp" and _C is not None else ""
        state[name] = f"off: {reason}" if reason else ("used" if name == choice else "available") + detail
    return state


def set_num_threads(count: int) -> None:
    """Number of OpenMP threads for work started by the calling thread, and by it alone.

    torch.set_num_threads would change the other threads' numbers too. Without the extension it does nothing.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if _C is not None:
        _C.set_num_threads(count)
