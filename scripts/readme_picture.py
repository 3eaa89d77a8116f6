"""Draw docs/loss_against_flops.png, the picture of the README, from a committed comparison.

    python scripts/readme_picture.py [results/pcfg_mlm/comparison.json] [docs/loss_against_flops.png]

Thin lines are seeds, thick lines are their median. FLOPs include those of the teacher.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from tutelage.reproduction.results import Comparison

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "results" / "pcfg_mlm" / "comparison.json"
PICTURE = ROOT / "docs" / "loss_against_flops.png"
LINES = {
    "one_shot": ("one-shot distillation", "#b2541a"),
    "extraction": ("curriculum extraction", "#1f5fa8"),
    "joint": ("hidden states and output together", "#7a4fa0"),
    "joint-teacher": ("the same, from the teacher's weights", "#2a7d4f"),
}

Curve = list[tuple[float, float]]
"""(FLOPs, held-out loss) of one run, in the order of training."""


def read_curves(comparison: Comparison, method: str) -> list[Curve]:
    """The curves of a method, one per seed."""
    runs = comparison.method(method).runs
    return [[(point.flops, point.metrics["loss"]) for point in run.curve if "loss" in point.metrics] for run in runs]


def median_curve(curves: Sequence[Curve]) -> Curve:
    """The median over seeds at each evaluation."""
    return [
        (statistics.median(flops for flops, _ in points), statistics.median(loss for _, loss in points))
        for points in zip(*curves, strict=False)
    ]


def draw(source: Path, picture: Path) -> None:
    """Read a comparison.json and write the picture."""
    comparison = Comparison.read(source.parent)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, (label, color) in LINES.items():
        curves = read_curves(comparison, method)
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=color, linewidth=0.8, alpha=0.4)
        median = median_curve(curves)
        axes.plot(*zip(*median, strict=True), color=color, linewidth=2.2, label=label)
        axes.annotate(f"{median[-1][1]:.3f}", median[-1], (4, -1), textcoords="offset points", color=color, fontsize=9)
    teacher = comparison.teachers[0].metrics["loss"]
    axes.axhline(teacher, color="0.35", linestyle=":", label=f"teacher ({teacher:.3f})")
    axes.set(xlabel="training FLOPs, the teacher's included", ylabel="held-out loss (nats per masked token)")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.margins(x=0.08)
    extraction = median_curve(read_curves(comparison, "extraction"))
    before_fall = max(itertools.pairwise(extraction), key=lambda pair: pair[0][1] - pair[1][1])[0]
    note, color = "hidden stage: the output head\nis not trained yet", LINES["extraction"][1]
    left: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 9}
    axes.annotate(note, before_fall, (-12, -18), textcoords="offset points", color=color, **left)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:3]]
    draw(*[*arguments, *[SOURCE, PICTURE][len(arguments) :]])
