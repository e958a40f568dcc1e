import os
from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(os.environ.get("VQGNN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device of the tensors under test")


@pytest.fixture(scope="session")
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda was given, but torch sees no CUDA device; leave the option out")
    return torch.device(name)


@pytest.fixture
def shared_data():
    """Folder with the real data sets; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data sets at {SHARED_DATA}; set VQGNN_DATA to the folder that holds them")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def command_line(tmp_path_factory, monkeypatch):
    """For tests of commands: a cache folder of the session's own, and what a command sets is set back."""
    import torch_geometric  # noqa: F401  pytest shows the warnings of its import, which a command would repeat

    monkeypatch.setenv("VQGNN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("VQGNN_TRACEBACK", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
