"""Every tile of the table is compiled by some test of this folder, and for any batch by the same code."""

import csv
import importlib
from pathlib import Path

import pytest
from conftest import unordered

import vqgnn_kernels
from vqgnn_kernels._tiles import TILES

VARYING = {"b", "k", "num_rows", "num_edges", "num_halo", "num_steps", "seed"}  # from batch to batch


@pytest.mark.parametrize("kernel", sorted(TILES))
def test_every_tile_has_a_budget(kernel):
    seen = set()
    for path in Path(__file__).parent.glob("*.csv"):
        with path.open(newline="") as file:
            seen |= {int(row["tile"]) for row in csv.DictReader(file) if row["kernel"] == kernel}
    assert seen == set(range(len(TILES[kernel])))


def test_no_size_of_a_batch_compiles_a_kernel_again():
    """Triton would, for an integer that is 1 or divisible by 16."""
    found = {}
    for folder in Path(vqgnn_kernels.__file__).parent.glob("*/triton.py"):
        module = importlib.import_module(f"vqgnn_kernels.{folder.parent.name}.triton")
        found |= {name: kernel for name, kernel in vars(module).items() if name in TILES}
    assert found.keys() == TILES.keys()
    for name, kernel in found.items():
        if name == "code_scores_kernel":  # whole tables
            continue
        varying = [parameter for parameter in kernel.params if parameter.name in VARYING]
        assert [p.name for p in varying if not p.do_not_specialize] == [], name


@pytest.mark.parametrize("between", ["", "gpu.barrier", "ttg.barrier all"])
def test_unordered_finds_a_store_before_a_load_of_another_warp(between):
    text = f"""
    tt.func public @kernel(%p_count: !tt.ptr<f32>, %p_other: !tt.ptr<f32>) {{
      %a = tt.splat %p_count : !tt.ptr<f32> -> tensor<128x!tt.ptr<f32>, #blocked>
      %b = tt.splat %p_count : !tt.ptr<f32> -> tensor<128x!tt.ptr<f32>, #blocked1>
      %x = tt.load %a, %m : tensor<128x!tt.ptr<f32>, #blocked>
      %y = tt.load %b, %m : tensor<128x!tt.ptr<f32>, #blocked1>
      {between}
      tt.store %a, %x, %m : tensor<128x!tt.ptr<f32>, #blocked>
    """
    assert unordered(text) == ([] if between else ["%p_count"])
    assert unordered(text.replace("%b = tt.splat %p_count", "%b = tt.splat %p_other")) == []
