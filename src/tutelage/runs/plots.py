"""Plots of runs, drawn from their metrics files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from tutelage.io.files import replacing
from tutelage.runs.escaping import as_label

# colour-blind safe (Okabe and Ito)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
AXES = {"tokens": "training tokens", "flops": "training FLOPs, teacher included", "seconds": "training seconds"}


def plot_run(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Training loss by stage (each stage has its own loss) and the held-out metric, against steps."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    training = [record for record in records if "loss" in record]
    for number, stage in enumerate(dict.fromkeys(record["stage"] for record in training)):
        steps, losses = zip(*((r["step"], r["loss"]) for r in training if r["stage"] == stage), strict=True)
        name = next(record["stage_name"] for record in training if record["stage"] == stage)
        axis.plot(steps, losses, ".-", color=COLORS[number % len(COLORS)], label=as_label(f"stage {stage}: {name}"))
    for part, color in (("output_loss", COLORS[2]), ("hidden_loss", COLORS[3])):  # of a joint stage
        if points := [(record["step"], record[part]) for record in training if part in record]:
            axis.plot(*zip(*points, strict=True), ":", color=color, label=part.replace("_", " "))
    evaluated = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    if evaluated:
        axis.plot(*zip(*evaluated, strict=True), "k--o", markersize=3, label="held-out loss")
    axis.set(xlabel="optimiser steps", ylabel="loss (each stage has its own)", title=as_label(title))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def save_figure(figure: Any, path: Path, dpi: int = 130) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    plt.close(figure)
