"""What is promised about installing: README, constraints, sdist, wheel, and what happens without a working compiler."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch_geometric.data import Data

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = ("csrc", "python", "vqgnn_kernels", "tests", "benchmarks", "examples")
FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "constraints.txt", "README.md", "LICENSE")


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    texts = itertools.chain(project["dependencies"], *extras, PYPROJECT["build-system"]["requires"])
    return [requirement for requirement in map(Requirement, texts) if requirement.name != "vqgnn"]


def test_build_does_not_require_torch():
    names = [Requirement(text).name for text in PYPROJECT["build-system"]["requires"]]
    assert sorted(names) == ["cmake", "ninja", "pybind11", "setuptools"]


def test_constraints_pin_every_requirement():
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, filter(None, lines))}
    for requirement in requirements():
        pin = pins[canonicalize_name(requirement.name)]
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version), f"{pin} does not satisfy {requirement}"
    assert str(pins["torch"].specifier) == "==2.13.0"


def test_readme_shows_the_commands_that_are_tested():
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert 'pip install -c constraints.txt ".[train]" && vqgnn train' in commands
    # .ci/run takes this line out of the README by the same pattern and splits it at " && ".
    assert [line for line in commands if line.endswith(" && pytest")] == [
        'pip install -c constraints.txt -e ".[test]" && pytest'
    ]
    assert {"train", "test"} <= set(PYPROJECT["project"]["optional-dependencies"])


def test_readme_example_runs():
    """The example of the README, but for the number of epochs, on a graph small enough for a test."""
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- example: .*? -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    n = 60
    data = Data(x=torch.randn(n, 16), y=torch.randint(4, (n,)), edge_index=torch.randint(n, (2, 300)))
    data.train_mask = torch.ones(n, dtype=torch.bool)
    scope = {"data": data}
    exec(code.replace("range(30)", "range(2)"), scope)
    assert scope["logits"].shape == (n, 4)
    assert scope["logits"].isfinite().all()
    assert "range(30)" in code


def test_versions_agree():
    import vqgnn

    assert vqgnn.__version__ == PYPROJECT["project"]["version"]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the sources without anything built."""
    target = tmp_path / "tree"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                target / name,
                ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "*.egg-info", "_C.py"),
            )
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    return target


def run(*command, cwd, check=True, **variables) -> subprocess.CompletedProcess:
    """Run a command with further environment variables; None unsets one."""
    env = {key: value for key, value in {**os.environ, **variables}.items() if value is not None}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def unpack_and_report(wheel: Path, target: Path) -> str:
    """State of the C++ back-end as a fresh interpreter sees it with the wheel's files, and only them, in front."""
    zipfile.ZipFile(wheel).extractall(target)
    script = "import vqgnn, vqgnn_kernels as k; print(vqgnn.__file__); print(k.__file__); print(k.backends()['cpp'])"
    result = run(sys.executable, "-c", script, cwd=target, PYTHONPATH=str(target), VQGNN_BACKEND=None)
    *files, state = result.stdout.splitlines()
    assert all(Path(file).is_relative_to(target) for file in files)
    return state


def without_compiler(folder: Path) -> str:
    """A PATH on which there is no compiler."""
    folder.mkdir()
    for name in ("sh", "env", "uname"):
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


@pytest.mark.slow  # downloads the build requirements twice
def test_sdist_builds_a_wheel_that_works(tree, tmp_path):
    run(sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), cwd=tree, VQGNN_NATIVE="1")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [path.relative_to(tree) for name in SOURCES for path in (tree / name).rglob("*") if path.is_file()]
    wanted = [str(path) for path in wanted if not any(part.endswith(".egg-info") for part in path.parts)]
    assert {*wanted, *FILES} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "/_C.py")) or name.startswith("build/")]

    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "none-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    (native,) = [name for name in names if name.startswith("vqgnn_kernels/_C.")]
    assert not native.endswith(".py")
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]
    modules = [path.relative_to(tree) for path in (tree / "vqgnn_kernels").rglob("*.py")]
    modules += [path.relative_to(tree / "python") for path in (tree / "python").rglob("*.py")]
    assert set(map(str, modules)) <= set(names)
    (metadata,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "vqgnn = vqgnn.cli:main" in zipfile.ZipFile(wheel).read(metadata).decode()
    assert unpack_and_report(wheel, tmp_path / "installed").startswith("used (")


@pytest.mark.slow  # needs the build requirements in this environment
def test_without_a_compiler_the_wheel_is_pure_and_says_why(tree, tmp_path):
    setting = dict(PATH=without_compiler(tmp_path / "bin"), CXX=None, CMAKE_ARGS=None, VQGNN_NATIVE=None)
    result = run(sys.executable, "setup.py", "bdist_wheel", "-d", str(tmp_path / "dist"), cwd=tree, **setting)
    assert "WARNING: vqgnn is installed without its native back-end: no C++ compiler" in result.stderr
    (wheel,) = (tmp_path / "dist").glob("*-py3-none-any.whl")
    state = unpack_and_report(wheel, tmp_path / "installed")
    assert state.startswith("off: ")
    assert "no C++ compiler was found at installation" in state


@pytest.mark.slow
def test_a_required_compiler_must_be_there(tree, tmp_path):
    setting = dict(PATH=without_compiler(tmp_path / "bin"), CXX=None, CMAKE_ARGS=None, VQGNN_NATIVE="1")
    result = run(sys.executable, "setup.py", "build", cwd=tree, check=False, **setting)
    assert result.returncode != 0
    assert "VQGNN_NATIVE=1, but no C++ compiler was found" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", ["compile error", "CXX does not exist"])
def test_a_failing_compiler_is_never_a_pure_wheel(tree, case):
    setting = dict(VQGNN_NATIVE=None)
    if case == "compile error":
        bindings = tree / "csrc" / "bindings.cpp"
        bindings.write_text('#error "deliberate"\n' + bindings.read_text())
        for kernel in (tree / "csrc" / "cpu").glob("*.cpp"):  # nothing else needs compiling
            kernel.write_text("")
    else:
        setting["CXX"] = str(tree / "no-such-compiler")
    result = run(sys.executable, "setup.py", "bdist_wheel", cwd=tree, check=False, **setting)
    assert result.returncode != 0
    assert "the native back-end could not be built" in result.stderr
    assert not list(tree.rglob("*.whl"))
