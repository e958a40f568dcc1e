"""Compiles every Triton kernel ahead of time, without a GPU, as the public ops launch it.

`compiled(name, call)` runs `call` with the kernels' launches caught: each launch is compiled with its tile for three
architectures, and its registers, spills and shared memory are held to the budget in the test's own CSV.

    VQGNN_WRITE_BUDGET=1 pytest tests/compile      # raise the budget to what is used; delete a CSV to start it anew
"""

import csv
import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

ARCHITECTURES = (80, 90, 100)
COLUMNS = ("case", "kernel", "tile", "arch", "registers", "shared_bytes")
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.float64: "fp64", torch.bool: "i1",
}  # fmt: skip


def pytest_ignore_collect(collection_path, config):
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return True if interpreted or importlib.util.find_spec("triton") is None else None


def signature_of(kernel, arguments: dict, blocks: dict) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) as Triton's JIT would specialise this launch on a GPU."""
    signature, constants, attributes = {}, dict(blocks), {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = arguments.get(name)
        if name in blocks or parameter.is_constexpr or value is None:
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]  # torch's allocations are aligned
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif parameter.do_not_specialize:
            signature[name] = "i64" if abs(value) >= 2**31 else "i32"
        elif value == 1 and not isinstance(value, bool):
            signature[name] = "constexpr"
            constants[name] = 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes spilt to local memory) of the one kernel of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return int(usage[0]), int(usage[1])


def unordered(ttgir: str) -> list[str]:
    """Pointer arguments that are loaded in two layouts, so by different warps, and then stored without a barrier.

    A load of few values is cheap to the compiler: it may repeat it for each layout that its users want, and one warp
    then reads what another has already overwritten. The interpreter cannot show that; a GPU did.
    """
    root, loads, found = {}, {}, []
    for line in ttgir.splitlines():
        if "tt.func" in line:
            root |= {name: name for name in re.findall(r"(%\w+): !tt\.ptr", line)}
        for name, start in re.findall(r"(%\w+) = (%\w+)", line):  # iter_args
            root.setdefault(name, root.get(start))
        made = re.match(r"\s*(%\w+) = tt\.(?:splat|addptr|broadcast|expand_dims|bitcast) (%\w+)", line)
        if made:
            root[made[1]] = root.get(made[2])
        if "barrier" in line:
            loads.clear()
        if read := re.search(r"tt\.load (%\w+)", line):
            loads.setdefault(root.get(read[1]), set()).add(line[line.rindex("#") :] if "#" in line else "")
        if (written := re.search(r"tt\.store (%\w+)", line)) and len(loads.get(root.get(written[1]), ())) > 1:
            found.append(root[written[1]])
    return found


def compile_launch(kernel, arguments: dict, tile, arch: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = signature_of(kernel, arguments, tile.blocks)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilt = resources(binary.asm["cubin"])
    code = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", binary.asm["ttgir"])
    return {
        "registers": registers, "spilt_bytes": spilt, "shared_bytes": binary.metadata.shared,
        "unordered": unordered(code),
    }  # fmt: skip


def read_budget(path: Path) -> dict[tuple, dict]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {tuple(row[c] for c in COLUMNS[:4]): row for row in csv.DictReader(file)}


def raise_budget(path: Path, used: dict[tuple, dict]) -> None:
    """Write the larger of the old and the used figures: Triton's versions differ a little."""
    rows = read_budget(path)
    for key, figures in used.items():
        old = rows.get(key, {})
        rows[key] = dict(zip(COLUMNS, key, strict=False)) | {f: max(v, int(old.get(f, 0))) for f, v in figures.items()}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


@pytest.fixture
def compiled(monkeypatch, request):
    """compiled(case, call): compile what `call()` launches, with the tiles that it would take, within the budget."""
    from vqgnn_kernels import _backend, _tiles, _triton

    launches = []
    path = request.path.with_name(request.path.stem.removeprefix("test_compile_") + ".csv")

    def record(kernel, grid, arguments, sizes=None, pure=False):
        launches.append((kernel, grid, arguments, sizes or {}))

    monkeypatch.setattr(_backend, "choose", lambda *tensors: "triton")
    monkeypatch.setattr(_triton, "launch", record)

    def check(case: str, call) -> None:
        launches.clear()
        call()
        assert launches, f"{case} launched no kernel"
        used, wrong = {}, []
        for kernel, grid, arguments, sizes in launches:
            name = kernel.fn.__name__
            tile = _tiles.pick(name, sizes)
            assert all(programs >= 0 for programs in grid(tile.blocks))
            for arch in ARCHITECTURES:
                key = (case, name, str(_tiles.TILES[name].index(tile)), str(arch))
                figures = compile_launch(kernel, arguments, tile, arch)
                spilt, pointers = figures.pop("spilt_bytes"), figures.pop("unordered")
                # of several launches, such as the two passes over long rows, the largest
                used[key] = {name: max(value, used.get(key, {}).get(name, 0)) for name, value in figures.items()}
                if spilt:
                    wrong.append(f"{key} spills {spilt} bytes")
                if pointers:
                    wrong.append(f"{key} may store {', '.join(pointers)} before another warp has read it")
        if os.environ.get("VQGNN_WRITE_BUDGET") == "1":
            raise_budget(path, used)
        budget = read_budget(path)
        for key, figures in used.items():
            if key not in budget:
                wrong.append(f"{key} has no budget in {path.name}; run once with VQGNN_WRITE_BUDGET=1")
                continue
            for figure, value in figures.items():
                if value > int(budget[key][figure]):
                    wrong.append(f"{key}: {value} {figure}, budget {budget[key][figure]}")
        assert not wrong, "\n".join(wrong)

    return check
