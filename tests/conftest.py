import os
from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(os.environ.get("VQGNN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device of the tensors under test")


def pytest_configure(config):
    """Without --device cuda no test sees a GPU: a device that is chosen automatically is then the CPU everywhere."""
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    """With --device cuda only the tests that compute on it: the others are the CPU's."""
    if config.getoption("--device") == "cuda":
        chosen = [item for item in items if "device" in item.fixturenames or item.path.parent.name == "triton"]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


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
