"""Runs tests/triton under Triton's interpreter, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_by_the_interpreter():
    folder = Path(__file__).parent / "triton"
    # one thread: the interpreter's tensors are small, and idle OpenMP threads spin
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VQGNN_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    report = done.stdout[-5000:] + done.stderr[-2000:]
    assert done.returncode == 0, report
    print(report)
