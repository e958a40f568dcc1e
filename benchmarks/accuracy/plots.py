"""Plots are written to benchmarks/results/plots, as PNG and SVG."""

import matplotlib
from results import FOLDER

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLOTS = FOLDER / "plots"


def save(figure: plt.Figure, name: str) -> None:
    """The same data make the same files."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": name}):  # else an SVG's ids are drawn at random
        for kind in ("png", "svg"):
            figure.savefig(PLOTS / f"{name}.{kind}", dpi=120, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
