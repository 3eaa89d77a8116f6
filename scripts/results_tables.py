"""Fill the tables of docs/results from results/, so that the pages say what was measured.

    python scripts/results_tables.py

A table stands between `<!-- table: FOLDER -->` and `<!-- end -->`, where FOLDER is a comparison below results/."""

from __future__ import annotations

import re
from pathlib import Path

from tutelage.reproduction.display import Table, listed
from tutelage.reproduction.results import Comparison, MethodResult
from tutelage.reproduction.statistics import Estimate, median_and_range

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "results").glob("*.md"))
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{table_of(ROOT / 'results' / found[2])}\n{found[3]}", text)


def table_of(folder: Path) -> str:
    """One row for each method of a comparison."""
    comparison = Comparison.read(folder)
    by_target = comparison.settings.get("target") is not None
    measured = [f"final {comparison.metric}"]
    if by_target:
        measured = [f"samples to {comparison.target:.0%}", "runs that reached it"]
    rows = []
    for method in comparison.methods:
        cells = _to_target(method) if by_target else [_final(method, comparison.metric)]
        edges = f" ({listed(method.edges).replace('_', ' ')} at an edge)" if method.edges else ""
        ratios = [_ratio(comparison, method, cost) for cost in ("samples", "flops")]
        rows.append([method.name, *cells, *ratios, f"{method.trials or 1}{edges}"])
    return Table("", ["method", *measured, "samples / one-shot's", "FLOPs / one-shot's", "trials"], rows).to_markdown()


def _to_target(method: MethodResult) -> list[str]:
    runs = method.runs
    arrived = sum(run.at_target is not None for run in runs)
    beyond = f"> {max((run.curve[-1].samples for run in runs), default=0):,}"
    return [_with_range(method.samples_to_target, "{:,.0f}", beyond), f"{arrived} of {len(runs)}"]


def _final(method: MethodResult, metric: str) -> str:
    return _with_range(median_and_range(method.finals(metric)), "{:.3f}")


def _ratio(comparison: Comparison, method: MethodResult, cost: str) -> str:
    """To one-shot of the same start."""
    rival = comparison.rival(method)
    ratio = None if rival is None else comparison.ratio(method.name, rival.name, cost)
    if ratio is None:
        return ""
    return ("at most " if ratio.paired.is_bound else "") + _with_range(ratio.paired.estimate, "{:.2g}", "not reached")


def _with_range(estimate: Estimate, form: str, beyond: str = "") -> str:
    """Median and range; `beyond` stands for what was not reached."""
    ends = [beyond if value is None else form.format(value) for value in (estimate.low, estimate.median, estimate.high)]
    low, median, high = ends
    return median if low == high else f"{median} ({low} to {high})"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
