"""Every tile of the table is compiled by some test of this folder."""

import csv
from pathlib import Path

import pytest

from vqgnn_kernels._tiles import TILES


@pytest.mark.parametrize("kernel", sorted(TILES))
def test_every_tile_has_a_budget(kernel):
    seen = set()
    for path in Path(__file__).parent.glob("*.csv"):
        with path.open(newline="") as file:
            seen |= {int(row["tile"]) for row in csv.DictReader(file) if row["kernel"] == kernel}
    assert seen == set(range(len(TILES[kernel])))
