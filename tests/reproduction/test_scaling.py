"""Scaling: exponents, and the experiment at its smallest."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from tutelage.reproduction import scaling
from tutelage.reproduction.results import Comparison
from tutelage.reproduction.scaling import (
    SCALING_METHODS,
    MethodFit,
    ScalingPoint,
    ScalingResult,
    ScalingSettings,
    fit_methods,
    power_law,
    run_scaling,
)
from tutelage.reproduction.sealed import read_sealed
from tutelage.reproduction.teachers import TeacherNotFinished
from tutelage.reproduction.variants import Candidate


def quiet(line: str) -> None:
    pass


def settings(**fields: Any) -> ScalingSettings:
    return ScalingSettings(**{"ks": (2,), "ds": (8, 16, 32), "extraction_cells": (), "fine_eval_every": 400, **fields})


def point(
    d: int, *samples: tuple[float | None, ...], k: int = 2, stage: int = 0, method: str = "one_shot"
) -> ScalingPoint:
    """Samples to the target, by teacher and seed."""
    return ScalingPoint(k, "planted", d, method, Candidate(0.1), stage, samples)


def fitted(*points: ScalingPoint, **fields: Any) -> MethodFit:
    (fit,) = fit_methods(settings(**fields), points)
    return fit


def test_exponent_is_the_slope_that_was_put_in() -> None:
    law = power_law([(d, [10.0 * d**1.5] * 3) for d in (8, 16, 32, 64)])
    assert law is not None
    assert law[0] == pytest.approx(1.5) and math.exp(law[1]) == pytest.approx(10.0)
    flat = power_law([(8, [100.0]), (16, [100.0])])
    assert flat is not None and str(flat[0]) == "0.0"
    assert power_law([(8, [80]), (16, [])]) is None
    assert power_law([]) is None


def test_exponent_is_fitted_for_each_teacher() -> None:
    """Teachers differ by a factor: one line through all of them would not see that each has its own slope."""
    slopes = (1.0, 1.5, 2.0)
    rows = {d: [(1e3 * 4**n * d**slope,) * 2 for n, slope in enumerate(slopes)] for d in (8, 16, 32)}
    fit = fitted(*(point(d, *row) for d, row in rows.items()), teacher_seeds=(0, 1, 2))
    assert fit.exponents == pytest.approx(slopes)
    assert fit.exponent == pytest.approx(1.5) and fit.spread == pytest.approx(
        (1.0, 2.0)
    )  # of three teachers: their range
    assert fit.intercept == pytest.approx(math.log(4e3))
    assert (fit.unreached, fit.at_floor) == (0, ())


def test_exponents_of_five_teachers_have_a_t_interval() -> None:
    slopes = (1.0, 1.2, 1.4, 1.1, 1.3)
    rows = {d: [(1e3 * d**slope,) for slope in slopes] for d in (8, 16, 32)}
    fit = fitted(*(point(d, *row) for d, row in rows.items()), teacher_seeds=(0, 1, 2, 3, 4))
    half = 2.776445 * statistics.stdev(slopes) / 5**0.5
    assert fit.exponent == pytest.approx(1.2)
    assert fit.spread == pytest.approx((1.2 - half, 1.2 + half), rel=1e-3)


def test_runs_beyond_the_budget_are_counted_not_fitted() -> None:
    points = (point(8, (8e3, 8e3)), point(16, (16e3, None)), point(32, (None, None)))
    fit = fitted(*points, teacher_seeds=(0,))
    assert fit.exponent == pytest.approx(1.0) and fit.unreached == 3
    fit = fitted(point(8, (8e3,)), point(16, (None,)), teacher_seeds=(0,))
    assert (fit.exponent, fit.spread, fit.intercept, fit.exponents, fit.unreached) == (None, (None, None), None, (), 1)
    # a teacher without two dimensions has no exponent of its own, the others have
    fit = fitted(point(8, (8e3,), (8e3,)), point(16, (16e3,), (None,)), teacher_seeds=(0, 1))
    assert fit.exponents == pytest.approx((1.0,)) and fit.unreached == 1
    assert fit_methods(settings(), []) == ()


def test_what_is_solved_as_soon_as_that_can_be_seen_is_left_out_of_the_fit() -> None:
    """After the hidden stage, within two evaluations: such a point says nothing of the slope."""
    stage = 16_000
    points = [point(d, (stage + after,) * 3, stage=stage, method="extraction") for d, after in ((8, 800), (16, 2_000))]
    points.append(point(32, (stage + 18_000,) * 3, stage=stage, method="extraction"))
    fit = fitted(*points, teacher_seeds=(0,))
    assert fit.at_floor == (8,)
    assert fit.exponent == pytest.approx(math.log(34_000 / 18_000, 2))
    points[1] = point(16, (stage + 700,) * 3, stage=stage, method="extraction")
    fit = fitted(*points, teacher_seeds=(0,))
    assert (fit.at_floor, fit.exponent) == ((8, 16), None)
    assert fitted(*points, teacher_seeds=(0,), fine_eval_every=100).at_floor == ()
    # the median of all teachers' runs decides, not the fastest run
    assert fitted(point(8, (800, 5_000, 6_000)), point(16, (7_000,) * 3), teacher_seeds=(0,)).at_floor == ()


def test_exponents_are_compared_over_the_dimensions_that_all_have() -> None:
    """One method's slope changes beyond d = 16, where the other has no points."""
    bent = [point(d, (samples,), method="extraction") for d, samples in ((8, 8e3), (16, 16e3), (32, 64e3))]
    short = [point(d, (1e3 * d**2,)) for d in (8, 16)]
    of_bent, of_short = fit_methods(settings(teacher_seeds=(0,)), [*bent, *short])
    assert of_bent.common_ds == (8, 16) and of_bent.common_exponents == pytest.approx((1.0,))
    assert of_bent.exponent == pytest.approx(1.5)
    assert (of_short.common_ds, of_short.common_exponents) == ((), ())  # these are all that it has


def test_extraction_has_cells_of_its_own() -> None:
    made = settings(ks=(3, 4), ds=(8, 16), extraction_cells=("4:64", "5:8", "3:16"))
    assert made.cells == [
        (3, 8, SCALING_METHODS),
        (3, 16, SCALING_METHODS),  # all methods are run there anyway
        (4, 8, SCALING_METHODS),
        (4, 16, SCALING_METHODS),
        (4, 64, ("extraction",)),
        (5, 8, ("extraction",)),
    ]


TINY_SCALING: dict[str, Any] = {
    "ks": "2",
    "ds": "6 12",
    "teacher_width": 64,
    "student_width": 16,
    "seeds": "0 1",
    "budget_samples": 3_200,
    "eval_every": 1_600,
    "stage_samples": 640,
    "target": 0.9,
}


def test_scaling_runs_and_resumes(tmp_path: Path) -> None:
    """Two teachers of each cell, and a cell of extraction alone."""
    folder, more = tmp_path / "o", {**TINY_SCALING, "teacher_seeds": "0 1", "extraction_cells": "2:18"}
    lines: list[str] = []
    result = run_scaling("scaling/smoke", more, folder, log=lines.append)
    assert read_sealed(folder / "scaling.json", ScalingResult) == result
    assert lines == [f"k=2 d={d}, planted teacher" for d in (6, 12, 18)]
    assert (result.size, result.settings.ds) == ("smoke", (6, 12))
    points = {(point.d, point.method): point for point in result.points}
    assert set(points) == {*((d, method) for d in (6, 12) for method in SCALING_METHODS), (18, "extraction")}
    for (d, method), point in points.items():
        whole = Comparison.read(folder / f"k2-planted-d{d}")
        assert len(whole.teachers) == 2
        for index, samples in enumerate(point.samples):
            alone = Comparison.read(folder / f"k2-planted-d{d}" / f"teacher-{index}").method(method)
            assert list(samples) == [run.to_target("samples") for run in alone.runs]
        assert point.candidate == whole.method(method).tunings[0].candidate == Candidate(0.1)
        assert point.stage_samples == (640 if method == "extraction" else 0)
    assert result.fits == fit_methods(result.settings, result.points)
    for fit in result.fits:
        assert (fit.k, fit.teacher) == (2, "planted") and fit.method in result.verdict
    assert (folder / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "| 2 | planted | extraction |" in report and "| d=6 | d=12 | d=18 |" in report
    (row,) = [line for line in report.splitlines() if line.startswith("| 2 | planted | scratch |")]
    assert row.endswith("| - |")  # it was not run there
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("run.json")}
    assert run_scaling("scaling/smoke", more, folder, log=quiet) == result
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("run.json")} == made


def test_a_parity_whose_teacher_does_not_converge_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, lines = scaling.compare, []

    def compare(recipe: Any, *args: Any, **settings: Any) -> Comparison:
        if recipe.d == 6:
            raise TeacherNotFinished("the teacher did not reach accuracy 0.999")
        return usual(recipe, *args, **settings)

    monkeypatch.setattr(scaling, "compare", compare)
    result = run_scaling("scaling/smoke", TINY_SCALING, tmp_path, log=lines.append)
    why = "k=2, d=6, planted teacher is left out: the teacher did not reach accuracy 0.999"
    assert result.left_out == (why,) and why in lines
    assert {point.d for point in result.points} == {12}
    assert f"- {why}" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert read_sealed(tmp_path / "scaling.json", ScalingResult) == result


def written(*points: ScalingPoint, folder: Path, **fields: Any) -> tuple[ScalingResult, str]:
    """The result of points, and its report."""
    machine = {"machine": "laptop", "torch": "2.13", "transformers": "5.24"}
    result = ScalingResult("own", "tutelage compare scaling", settings(**fields), machine, points)
    made = scaling._write(folder, result)
    return made, (folder / "report.md").read_text(encoding="utf-8")


def test_the_report_names_what_is_left_out_and_what_is_at_an_edge(tmp_path: Path) -> None:
    edge = dataclasses.replace(point(16, (16e3,) * 2, (16e3,) * 2), edges=("learning_rate",))
    points = (point(8, (800,) * 2, (800,) * 2), edge, point(32, (32e3, 32e3), (64e3, None)))
    made, report = written(*points, folder=tmp_path, teacher_seeds=(0, 1), trials=7)
    assert made.verdict == (
        "k=2, planted teacher: one_shot needs about d^1.50 samples (1.00 to 2.00, range over 2 teachers; 1 runs beyond the "
        "budget left out). Left out, since it is solved as soon as that can be seen: d = 8."
    )
    row = "| 2 | planted | one_shot | 1.50 | 1.00 to 2.00, range over 2 teachers | 800 (f) | 16,000 (e) | 3/4 solved |"
    assert row in report
    assert "median over 2 teachers" in report and "For each cell 7 candidates of every method" in report
    made, report = written(*points[:2], folder=tmp_path, teacher_seeds=(0, 1))
    assert made.verdict == (
        "k=2, planted teacher: one_shot has too few dimensions to fit. Left out, since it is solved as soon as that can be "
        "seen: d = 8."
    )
    assert "| one_shot | - | - | 800 (f) | 16,000 (e) | - |" in report


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("scaling/huge", {}, "unknown size 'huge' of scaling: there are smoke, laptop, paper"),
        ("scaling/smoke", {"ds": "8"}, r"an exponent needs at least two values of ds, got \[8\]"),
        ("scaling/smoke", {"ds": "8 8"}, "ds"),
        ("scaling/smoke", {"d": "8"}, "scaling has no field 'd': it has ks, ds"),
        ("scaling/smoke", {"teachers": "wise"}, "unknown teacher 'wise'"),
        ("scaling/smoke", {"ks": "9"}, "got k=9"),
        ("scaling/smoke", {"extraction_cells": "4-128"}, "extraction_cells are given as k:d, e.g. 4:128, got '4-128'"),
        ("scaling/smoke", {"extraction_cells": "2:8 2:8"}, "extraction_cells are repeated: 2:8, 2:8"),
        ("scaling/smoke", {"extraction_cells": "20:18"}, "got k=20"),
        ("scaling/smoke", {"teacher_seeds": "0 0"}, "teacher_seeds are repeated: 0, 0"),
    ],
)
def test_bad_scaling_is_refused(name: str, overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_scaling(name, {**TINY_SCALING, **overrides}, tmp_path / "o", log=quiet)


def test_scaling_refuses_what_only_its_last_cell_cannot_do_before_the_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got k=7"):
        run_scaling("scaling/smoke", {**TINY_SCALING, "ks": "2 7"}, tmp_path / "o", log=quiet)
    assert not list(tmp_path.glob("o/**/run.json"))


def test_a_result_is_read_back_as_it_was_written() -> None:
    law = {"exponent": 0.5, "spread": (0.4, 0.6), "intercept": 1.0, "exponents": (0.4, 0.6), "at_floor": (8,)}
    chosen = Candidate(0.1, {"stage_steps": 20})
    result = ScalingResult(
        size="own",
        command="tutelage compare scaling",
        settings=ScalingSettings(ks=(2,), ds=(8, 16), learning_rates=(0.1,), extraction_cells=("2:32",)),
        environment={"torch": "2.13", "threads": 2},
        points=(
            ScalingPoint(2, "planted", 8, "extraction", chosen, 320, ((640, None), (960, 320)), ("stage_steps",)),
            ScalingPoint(2, "planted", 8, "scratch", None, 0, ()),
        ),
        fits=(
            MethodFit(k=2, teacher="planted", method="extraction", **law),
            MethodFit(k=2, teacher="planted", method="scratch", unreached=3),
        ),
        verdict="one line\nand another",
    )
    assert ScalingResult.from_json(result.to_json()) == result
