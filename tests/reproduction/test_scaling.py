"""Scaling: exponents, and the experiment at its smallest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.reproduction.results import Comparison
from tutelage.reproduction.scaling import (
    MethodFit,
    PowerLaw,
    ScalingPoint,
    ScalingResult,
    ScalingSettings,
    fit_exponent,
    run_scaling,
)
from tutelage.reproduction.sealed import read_sealed


def quiet(line: str) -> None:
    pass


def test_exponent_is_the_slope_that_was_put_in() -> None:
    points = [(d, [10.0 * d**1.5] * 3) for d in (8, 16, 32, 64)]
    fit = fit_exponent(points)
    assert fit.exponent == pytest.approx(1.5) and math.exp(fit.intercept) == pytest.approx(10.0)
    assert fit.ci95 == pytest.approx((1.5, 1.5)) and fit.unreached == 0


def test_exponents_interval_grows_with_the_noise_and_holds_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(scale: float) -> PowerLaw:
        noise = (scale * torch.randn(4, 8, generator=generator)).exp().tolist()
        return fit_exponent([(d, [d**0.7 * f for f in row]) for d, row in zip((8, 16, 32, 64), noise, strict=True)])

    quiet_fit, loud_fit = noisy(0.02), noisy(0.3)
    for fit in (quiet_fit, loud_fit):
        low, high = fit.ci95
        assert low < fit.exponent < high and low < 0.7 < high
    width = [fit.ci95[1] - fit.ci95[0] for fit in (quiet_fit, loud_fit)]
    assert width[0] < width[1] / 5


def test_runs_beyond_the_budget_are_counted_not_fitted() -> None:
    fit = fit_exponent([(8, [80, 80]), (16, [160, None]), (32, [None, None])])
    assert fit.exponent == pytest.approx(1.0) and fit.unreached == 3
    assert fit_exponent([(8, [80]), (16, [None])]) == PowerLaw(None, (None, None), None, unreached=1)
    assert fit_exponent([]) == PowerLaw(None, (None, None), None, unreached=0)


TINY_SCALING: dict[str, Any] = {
    "ks": "2",
    "ds": "6 12",
    "teacher_width": 64,
    "student_width": 16,
    "seeds": "0 1",
    "budget_samples": 6_400,
    "eval_every": 640,
    "stage_samples": 1_280,
    "target": 0.9,
}


def test_scaling_runs_and_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    lines: list[str] = []
    result = run_scaling("scaling/smoke", TINY_SCALING, folder, log=lines.append)
    assert read_sealed(folder / "scaling.json", ScalingResult) == result
    assert lines == ["k=2 d=6, planted teacher", "k=2 d=12, planted teacher"]
    assert (result.size, result.settings.ds) == ("smoke", (6, 12))
    points = {(point.d, point.method): point.samples for point in result.points}
    assert set(points) == {(d, method) for d in (6, 12) for method in ("extraction", "one_shot", "scratch")}
    for (d, method), samples in points.items():
        alone = Comparison.read(folder / f"k2-planted-d{d}")
        assert list(samples) == [run.to_target("samples") for run in alone.method(method).runs]
    for fit in result.fits:
        assert (fit.k, fit.teacher) == (2, "planted")
        law = fit_exponent([(d, points[d, fit.method]) for d in (6, 12)])
        assert {name: getattr(fit, name) for name in vars(law)} == vars(law)
        assert fit.method in result.verdict
        if fit.method == "extraction":
            after = [(d, [n - 1_280 if n and n > 1_280 else None for n in points[d, "extraction"]]) for d in (6, 12)]
            assert fit.after_stage == fit_exponent(after)
    assert (folder / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert "| 2 | planted | extraction |" in (folder / "report.md").read_text(encoding="utf-8")
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("run.json")}
    assert run_scaling("scaling/smoke", TINY_SCALING, folder, log=quiet) == result
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("run.json")} == made


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("scaling/huge", {}, "unknown size 'huge' of scaling: there are smoke, laptop, paper"),
        ("scaling/smoke", {"ds": "8"}, r"an exponent needs at least two values of ds, got \[8\]"),
        ("scaling/smoke", {"ds": "8 8"}, "ds"),
        ("scaling/smoke", {"d": "8"}, "scaling has no field 'd': it has ks, ds"),
        ("scaling/smoke", {"teachers": "wise"}, "unknown teacher 'wise'"),
        ("scaling/smoke", {"ks": "9"}, "got k=9"),
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
    nothing = PowerLaw(None, (None, None), None, unreached=3)
    result = ScalingResult(
        size="own",
        command="tutelage compare scaling",
        settings=ScalingSettings(ks=(2,), ds=(8, 16), learning_rates=(0.1,)),
        environment={"torch": "2.13", "threads": 2},
        points=(ScalingPoint(2, "planted", 8, "extraction", 0.1, (640, None)),),
        fits=(
            MethodFit(0.5, (0.4, 0.6), 1.0, 0, k=2, teacher="planted", method="extraction", after_stage=nothing),
            MethodFit(None, (None, None), None, 3, k=2, teacher="planted", method="scratch"),
        ),
        verdict="one line\nand another",
    )
    assert ScalingResult.from_json(result.to_json()) == result
