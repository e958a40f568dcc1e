"""Tests of the Triton kernels: on the CPU by the interpreter, or on a GPU with --device cuda.

TRITON_INTERPRET must be set before a kernel's module is imported, so the interpreter's tests have a process of their
own: `TRITON_INTERPRET=1 pytest tests/triton`, which tests/test_interpreter.py starts.
"""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def pytest_ignore_collect(collection_path, config):
    return True if not INTERPRETED and config.getoption("--device") != "cuda" else None


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("VQGNN_BACKEND", "triton")
