"""Results of a comparison on disk, and what follows from its runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.reproduction.reporting import comparison
from tutelage.core.errors import UserError
from tutelage.reproduction.results import COMPARISON_FILE, Comparison, CurvePoint, MethodResult, RunRecord
from tutelage.reproduction.scaling import ScalingResult, fit_methods
from tutelage.reproduction.sealed import read_sealed
from tutelage.reproduction.statistics import Estimate
from tutelage.reproduction.summary import ratio_of, summarise
from tutelage.reproduction.variants import Candidate, Variant

LINE = (
    (0, {"accuracy": 0.5}),
    (10, {"loss": 0.1}),
    (20, {"accuracy": 0.9}),
    (30, {"accuracy": 0.4}),
    (40, {"accuracy": 0.95}),
)
CURVE = tuple(CurvePoint(samples, 2.0 * samples, samples / 4, metrics) for samples, metrics in LINE)


def test_a_comparison_is_read_back_as_it_was(tmp_path: Path) -> None:
    data = comparison()
    assert Comparison.from_json(data.to_json()) == data
    diverged = MethodResult(Variant("x", "progressive", {"stage_steps": [5, 6], "schedule": "two"}, 0.5))
    runs = (RunRecord(3, CURVE[:2], "loss is nan"), RunRecord(4, ()))
    data = dataclasses.replace(data, target=None, methods=(*data.methods, dataclasses.replace(diverged, runs=runs)))
    data.write(tmp_path)
    assert Comparison.read(tmp_path) == data
    assert Comparison.read(tmp_path).method("x").runs == runs


def test_runs_are_read_back_as_they_were() -> None:
    runs = [RunRecord(0, CURVE, at_target=CURVE[2]), RunRecord(1, CURVE[:1], "loss is nan")]
    assert [RunRecord.from_json(run.to_json()) for run in runs] == runs
    assert (runs[0].final, runs[0].seconds) == ({"accuracy": 0.95}, 10.0)
    assert [runs[0].to_target(cost) for cost in ("samples", "flops", "seconds")] == [20, 40, 5]
    assert runs[1].to_target("samples") is None


def test_a_result_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    fields = json.loads(comparison().to_json())
    fields["methods"] = {"extraction": {"learning_rate": 0.1, "runs": []}}
    (tmp_path / COMPARISON_FILE).write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(UserError, match="earlier version"):
        Comparison.read(tmp_path)
    del fields["methods"], fields["metric"]
    (tmp_path / COMPARISON_FILE).write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(UserError, match="earlier version"):
        Comparison.read(tmp_path)


def assert_holds(record: Any, stored: Any) -> None:
    """`record` has all that is stored, and maybe fields that are newer."""
    if isinstance(stored, dict):
        for key, value in stored.items():
            assert_holds(record[key], value)
    elif isinstance(stored, list):
        assert len(record) == len(stored)
        for part, value in zip(record, stored, strict=True):
            assert_holds(part, value)
    else:
        assert record == stored


def test_every_committed_result_can_be_read() -> None:
    results = Path(__file__).resolve().parents[2] / "results"
    comparisons = [file.parent for file in sorted(results.rglob(COMPARISON_FILE))]
    assert len(comparisons) == 14
    for folder in comparisons:
        read = Comparison.read(folder)
        assert Comparison.from_json(read.to_json()) == read
        kept = json.loads((folder / COMPARISON_FILE).read_text(encoding="utf-8"))
        assert_holds(json.loads(read.to_json()), {name: value for name, value in kept.items() if name != "digest"})
    ScalingResult.from_json((results / "scaling_one_teacher" / "scaling.json").read_text(encoding="utf-8"))
    scaling = read_sealed(results / "scaling" / "scaling.json", ScalingResult)
    fits = [fit for fit in scaling.fits if (fit.k, fit.teacher) == (4, "planted")]
    points = [point for point in scaling.points if (point.k, point.teacher) == (4, "planted")]
    again = fit_methods(scaling.settings, points)
    assert fits and [fit.exponent for fit in again] == pytest.approx([fit.exponent for fit in fits])


def summarised(
    *methods: MethodResult, metric: str = "accuracy", better: str = "higher", target: float | None
) -> Comparison:
    data = dataclasses.replace(comparison(), metric=metric, better=better, methods=methods)
    return summarise(data, target)


@pytest.mark.parametrize(
    ("metric", "better", "target", "index"),
    [
        ("accuracy", "higher", 0.9, 2),
        ("accuracy", "higher", 0.95, 4),
        ("loss", "lower", 0.1, 1),
        ("accuracy", "higher", 0.96, None),
    ],
)
def test_the_target_is_reached_at_the_first_point_that_is_good_enough(
    metric: str, better: str, target: float, index: int | None
) -> None:
    method = MethodResult(Variant("extraction", "extraction"), runs=(RunRecord(0, CURVE),))
    (found,) = summarised(method, metric=metric, better=better, target=target).method("extraction").runs
    assert found.at_target == (None if index is None else CURVE[index])


def test_a_run_that_diverged_has_not_reached_the_target() -> None:
    method = MethodResult(
        Variant("extraction", "extraction"), runs=(RunRecord(0, CURVE, "loss is nan"), RunRecord(1, ()))
    )
    found = summarised(method, target=0.9).method("extraction")
    assert [run.at_target for run in found.runs] == [None, None]
    assert found.samples_to_target == Estimate(None, None, None)


def test_ratios_are_of_extraction_to_all_and_of_all_to_one_shot() -> None:
    names = ("extraction", "one_shot", "scratch")
    methods = [MethodResult(Variant(name, name), Candidate(0.1), runs=(RunRecord(0, CURVE),)) for name in names]
    made = summarised(*methods, target=0.9)
    pairs = {(ratio.over, ratio.under) for ratio in made.ratios}
    assert pairs == {("extraction", "one_shot"), ("extraction", "scratch"), ("scratch", "one_shot")}
    assert made.ratio("extraction", "one_shot") == ratio_of(made.methods[0], made.methods[1], "samples")
    assert made.ratio("one_shot", "scratch") is None
    assert made.baseline is made.method("one_shot")


def test_the_baseline_is_plain_one_shot_before_its_variants() -> None:
    soft, plain = MethodResult(Variant("soft", "one_shot")), MethodResult(Variant("one_shot", "one_shot"))
    assert dataclasses.replace(comparison(), methods=(soft, plain)).baseline is plain
    assert dataclasses.replace(comparison(), methods=(soft,)).baseline is soft
    assert dataclasses.replace(comparison(), methods=()).baseline is None
