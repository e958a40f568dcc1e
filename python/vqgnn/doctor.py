"""What is installed, what is used, and why something is off."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

PACKAGES = ("torch_geometric", "ogb", "pymetis", "numpy", "tqdm", "matplotlib", "typer")


def report() -> list[tuple[str, str]]:
    """Lines of `vqgnn doctor`, (what, state)."""
    import torch

    import vqgnn
    import vqgnn_kernels

    rows = [
        ("vqgnn", vqgnn.__version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        ("cpu", f"{os.cpu_count()} x {cpu_name()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    rows += [(name, _version(name)) for name in PACKAGES]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        rows.append(("cuda", f"{torch.version.cuda}: {', '.join(names)}"))
    else:
        built = "torch is a CPU build" if torch.version.cuda is None else "torch sees no device; check the driver"
        rows.append(("cuda", f"off: {built}"))
    try:
        rows += [(f"back-end {name}", state) for name, state in vqgnn_kernels.backends().items()]
    except ValueError as error:  # VQGNN_BACKEND asks for what is not there
        rows.append(("back-end", str(error)))
    from .partitioning import cache_folder

    folder = cache_folder()
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    rows.append(("cache", f"{folder}{'' if os.access(parent, os.W_OK) else ' (not writable; set VQGNN_CACHE)'}"))
    return rows


def cpu_name() -> str:
    """The processor's model where Linux says it, else its architecture."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    """The installed version, or what is lost without the package."""
    without = {
        "pymetis": "clusters come from a breadth-first order instead of METIS",
        "ogb": "ogbn-* data sets cannot be loaded",
        "matplotlib": "curves.png is not drawn",
    }
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"missing: {without.get(package, 'needed')}; pip install 'vqgnn[train]'"
