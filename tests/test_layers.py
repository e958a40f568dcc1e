"""Dependencies point down only (tests, benchmarks -> vqgnn -> vqgnn_kernels -> csrc); an op has one stem everywhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imports(path: Path, package: str = "") -> set[str]:
    """Absolute dotted names that a Python file imports, `from a import b` as both `a` and `a.b`; lazy imports count.

    `package` is the dotted name of the package that holds the file, for relative imports.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def package_imports(source: Path, package: str) -> dict[Path, set[str]]:
    """{file: names} of every module of a package whose folder is `source`."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parents = path.relative_to(source).parts[:-1]
        found[path] = imports(path, ".".join([package, *parents]))
    return found


def below(name: str, *modules: str) -> bool:
    """Whether a dotted name is one of the modules or lies inside one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def kernels_violations(source: Path) -> list[str]:
    """What vqgnn_kernels must not do: import upwards, know PyG, define modules, call _C outside its two places."""
    found = []
    for path, names in package_imports(source, "vqgnn_kernels").items():
        for name in sorted(names):
            if below(name, "vqgnn", "torch_geometric", "tests", "benchmarks"):
                found.append(f"{path.name} imports {name}")
            if name.endswith("._C") and path.name not in ("_backend.py", "cpp.py"):
                found.append(f"{path.name} imports _C; only _backend.py and an op's cpp.py do")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Module") for base in node.bases):
                found.append(f"{path.name} defines the nn.Module {node.name}")
    return found


def vqgnn_violations(source: Path) -> list[str]:
    """What vqgnn must not do: import tests or benchmarks, or reach past the kernels' Python to the native module."""
    return [
        f"{path.name} imports {name}"
        for path, names in package_imports(source, "vqgnn").items()
        for name in sorted(names)
        if below(name, "tests", "benchmarks", "conftest") or name.endswith(("._C", ".cpp"))
    ]


def csrc_violations(source: Path) -> list[str]:
    """csrc must not include a header of torch: one binary serves every torch version."""
    torch_header = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    files = [path for path in sorted(source.rglob("*")) if path.suffix in (".cpp", ".h", ".hpp", ".cu", ".cuh")]
    return [path.name for path in files if torch_header.search(path.read_text())]


def op_files(stem: str) -> list[Path]:
    return [
        Path("vqgnn_kernels", stem, "__init__.py"),
        Path("vqgnn_kernels", stem, "reference.py"),
        Path("vqgnn_kernels", stem, "cpp.py"),
        Path("vqgnn_kernels", stem, "triton.py"),
        Path("csrc", "cpu", f"{stem}.cpp"),
        Path("tests", f"test_{stem}.py"),
        Path("tests", "triton", f"test_triton_{stem}.py"),
        Path("tests", "compile", f"test_compile_{stem}.py"),
        Path("benchmarks", f"test_{stem}.py"),
    ]


def op_stems(root: Path) -> list[str]:
    """Every op that has a folder or a native file."""
    folders = {path.parent.name for path in root.glob("vqgnn_kernels/[!_]*/__init__.py")}
    return sorted(folders | {path.stem for path in root.glob("csrc/cpu/*.cpp")})


def test_kernels_look_down_only():
    assert kernels_violations(ROOT / "vqgnn_kernels") == []


def test_vqgnn_looks_down_only():
    assert vqgnn_violations(ROOT / "python" / "vqgnn") == []


def test_csrc_has_no_torch_header():
    assert csrc_violations(ROOT / "csrc") == []


@pytest.mark.parametrize("stem", op_stems(ROOT))
def test_one_stem_an_op(stem):
    missing = [str(path) for path in op_files(stem) if not (ROOT / path).is_file()]
    assert missing == [], f"op {stem} lacks {', '.join(missing)}"


@pytest.mark.parametrize(
    "text",
    [
        "import vqgnn",
        "from vqgnn.store import NodeStore",
        "def f():\n    from torch_geometric.nn import GCNConv",
        "import torch_geometric.nn as pyg",
        "from .. import _C",
        "from vqgnn_kernels import _C",
        "from .._backend import _C",
        "class A(torch.nn.Module): pass",
    ],
)
def test_a_violation_of_the_kernels_is_seen(tmp_path, text):
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "__init__.py").write_text(
        "import torch\nfrom .._backend import implementation\nfrom . import reference\n"
    )
    (tmp_path / "op" / "cpp.py").write_text("from .. import _C\n")
    assert kernels_violations(tmp_path) == []
    (tmp_path / "op" / "reference.py").write_text(text)
    assert len(kernels_violations(tmp_path)) > 0


def test_a_violation_elsewhere_is_seen(tmp_path):
    (tmp_path / "store.py").write_text(
        "import vqgnn_kernels\nfrom vqgnn_kernels import aggregate\nfrom . import codebook\n"
    )
    assert vqgnn_violations(tmp_path) == []
    (tmp_path / "store.py").write_text("from vqgnn_kernels.aggregate import cpp")
    assert len(vqgnn_violations(tmp_path)) == 1
    (tmp_path / "op.cpp").write_text("#include <vector>\n")
    assert csrc_violations(tmp_path) == []
    (tmp_path / "op.cpp").write_text("#include <torch/extension.h>\n")
    assert csrc_violations(tmp_path) == ["op.cpp"]
