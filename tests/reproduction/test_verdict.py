"""A comparison in words."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from tests.reproduction.comparing import made, tiny
from tutelage.reproduction.report_tables import summary_table
from tutelage.reproduction.results import Comparison, CurvePoint, MethodResult, Ratio, RunRecord
from tutelage.reproduction.statistics import Estimate, PairedRatio
from tutelage.reproduction.summary import headline, summarise, verdict
from tutelage.reproduction.teachers import TeacherRecord
from tutelage.reproduction.variants import Variant


def run_of(seed: int, reached: int | None) -> RunRecord:
    curve = (CurvePoint(1000, 0.0, 0.0, {"accuracy": 0.5 if reached is None else 0.99}),)
    return RunRecord(seed, curve, at_target=None if reached is None else CurvePoint(reached, 0.0, 0.0, {}))


def compared(
    mine: list[int | None], theirs: list[int | None], ratio: PairedRatio | None, seeds: int | None = None
) -> Comparison:
    """Extraction and one-shot: samples to the target of each seed, and their ratio."""
    methods = []
    for name, reached in (("extraction", mine), ("one_shot", theirs)):
        median = sorted(reached, key=lambda value: value or 10**9)[len(reached) // 2]
        runs = tuple(run_of(seed, value) for seed, value in enumerate(reached))
        methods.append(MethodResult(Variant(name, name), runs=runs, samples_to_target=Estimate(median)))
    count = len(mine) if seeds is None else seeds
    return Comparison(
        recipe="r",
        size="own",
        command=None,
        complete=True,
        match="samples",
        budget=1000,
        metric="accuracy",
        better="higher",
        target=0.9,
        seeds=tuple(range(len(mine))),
        settings={},
        teachers=(TeacherRecord("given", {}),),
        environment={},
        methods=tuple(methods),
        ratios=() if ratio is None else (Ratio("extraction", "one_shot", "samples", count, ratio),),
    )


def test_verdict_leaves_out_what_has_not_run(tmp_path: Path) -> None:
    result = made(tiny(), tmp_path / "o", ("extraction", "one_shot"))
    extraction, one_shot = result.methods
    result = dataclasses.replace(result, methods=(extraction, dataclasses.replace(one_shot, runs=())))
    assert "one_shot" not in verdict(result)
    assert "extraction reached" in verdict(result)


def test_verdict_before_any_run() -> None:
    result = compared([None] * 3, [None] * 3, None)
    assert verdict(dataclasses.replace(result, methods=())) == "No run has finished yet."
    waiting = (MethodResult(Variant("extraction", "extraction")),)
    assert verdict(dataclasses.replace(result, methods=waiting)) == "No run has finished yet."


def test_verdict_where_both_arrive() -> None:
    ratio = PairedRatio(Estimate(0.25, 0.2, 0.3), 3)
    words = verdict(compared([100, 100, 200], [400, 400, 800], ratio))
    assert "extraction reached accuracy 0.9 in 3 of 3 runs, after 100 samples (median)." in words
    assert "one_shot reached accuracy 0.9 in 3 of 3 runs, after 400 samples (median)." in words
    assert (
        "extraction needed 0.25 times the samples of one_shot (0.2 to 0.3 over 3 pairs of runs): extraction is better in all "
        "of them." in words
    )


def test_verdict_says_the_flops_too() -> None:
    ratio = PairedRatio(Estimate(0.25, 0.2, 0.3), 3)
    result = compared([100, 100, 200], [400, 400, 800], ratio)
    flops = Ratio("extraction", "one_shot", "flops", 3, PairedRatio(Estimate(0.5, 0.4, 0.6), 3))
    told = verdict(dataclasses.replace(result, ratios=(*result.ratios, flops)))
    assert "0.2 to 0.3 over 3 pairs of runs) and 0.5 times its FLOPs: extraction is better in all of them." in told
    flops = dataclasses.replace(flops, paired=dataclasses.replace(flops.paired, unreached=3))
    told = verdict(dataclasses.replace(result, ratios=(*result.ratios, flops)))
    assert "and at most 0.5 times its FLOPs" in told


def test_verdict_where_the_range_crosses_one() -> None:
    ratio = PairedRatio(Estimate(0.9, 0.5, 1.5), 3)
    assert verdict(compared([100] * 3, [110] * 3, ratio)).endswith("neither is better in all of them.")


def test_verdict_where_extraction_is_worse() -> None:
    ratio = PairedRatio(Estimate(2.0, 1.5, 2.5), 3)
    assert verdict(compared([200] * 3, [100] * 3, ratio)).endswith("one_shot is better in all of them.")


def test_verdict_where_the_other_never_arrives() -> None:
    ratio = PairedRatio(Estimate(0.1, 0.1, 0.2), 3, unreached=3)
    words = verdict(compared([100] * 3, [None] * 3, ratio))
    assert re.search(
        r"one_shot did not reach .*within 1,000 samples \(0 of 3 runs reached it; median final accuracy: 0\.5\)", words
    )
    assert "extraction needed at most 0.1 times the samples of one_shot" in words
    assert words.endswith("extraction is better in all of them.")


def test_verdict_where_only_the_other_arrives() -> None:
    ratio = PairedRatio(Estimate(None, None, None), 3)
    words = verdict(compared([None] * 3, [100] * 3, ratio))
    assert re.search(r"extraction did not reach .*within 1,000 samples \(0 of 3 runs reached it", words)
    assert words.endswith("where one_shot did: one_shot is better here.")


def test_verdict_does_not_speak_for_runs_that_did_not_arrive() -> None:
    ratio = PairedRatio(Estimate(0.5, 0.5, 0.5), 1)
    words = verdict(compared([100, None, None], [200, None, None], ratio))
    assert "(1 pair of runs)" in words
    assert words.endswith("on 1 of 3 pairs; on the other pairs neither reached the target.")
    few = PairedRatio(Estimate(0.5, 0.5, 0.6), 2)
    assert verdict(compared([100] * 2, [200] * 2, few)).endswith("too few runs to decide.")
    many = PairedRatio(Estimate(0.5, 0.5, 0.6), 5)
    assert "(0.5 to 0.6 over 5 pairs of runs): extraction is better" in verdict(compared([100] * 5, [200] * 5, many))
    none = PairedRatio(Estimate(None, None, None), 0)
    assert "Neither" not in verdict(compared([100], [200], none, seeds=0))


def test_verdict_where_neither_arrives() -> None:
    words = verdict(compared([None] * 3, [None] * 3, PairedRatio(Estimate(None, None, None), 0)))
    assert words.endswith("Neither extraction nor one_shot reached the target.")


def test_verdict_names_the_target_even_where_the_first_method_misses_it() -> None:
    words = verdict(compared([None] * 3, [100] * 3, PairedRatio(Estimate(None, None, None), 3)))
    assert "accuracy 0.9" in words[: words.index("one_shot")]


def test_verdict_is_that_of_the_runs(tmp_path: Path) -> None:
    result = made(tiny(budget_samples=6400, eval_every=160, stage_samples=1280, target=0.95), tmp_path / "o")
    for entry in result.methods:
        name = entry.name
        reached = sum(run.to_target("samples") is not None for run in entry.runs)
        assert f"{reached} of 2 runs" in result.verdict
        assert f"{name} reached" in result.verdict or f"{name} did not reach" in result.verdict
    assert "times the samples of one_shot" in result.verdict


# ---- Differences ----


def finals(name: str, values: dict[tuple[int, int], float], diverged: tuple[int, int] | None = None, **own: str) -> Any:
    """A method's runs by teacher and seed, with these final losses."""
    runs = tuple(
        RunRecord(
            seed,
            (CurvePoint(64, 1.0, 1.0, {"loss": loss}),),
            teacher=teacher,
            diverged="nan" * (at == diverged) or None,
        )
        for at, loss in values.items()
        for teacher, seed in [at]
    )
    method = name.partition("-")[0]
    return MethodResult(Variant(name, method, dict(own)), runs=runs)


def differences_of(*methods: MethodResult) -> dict[tuple[str, str], Any]:
    """The differences of a comparison by their two names."""
    made_of = compared([1], [1], None)
    whole = dataclasses.replace(made_of, methods=methods, metric="loss", better="lower")
    return {(found.over, found.under): found.paired for found in summarise(whole, None).differences}


def test_final_values_are_compared_with_rivals_of_the_same_start_and_stages_with_joint() -> None:
    start = {"student_init": "teacher"}
    seeds = {(0, 0): 1.0, (0, 1): 2.0, (0, 2): 3.0}
    lower = {at: loss - 0.5 for at, loss in seeds.items()}
    found = differences_of(
        finals("extraction", lower),
        finals("joint", seeds),
        finals("one_shot", seeds),
        finals("extraction-teacher", lower, **start),
        finals("joint-teacher", lower, **start),
        finals("one_shot-teacher", seeds, **start),
    )
    assert found["extraction", "one_shot"].mean == found["extraction-teacher", "one_shot-teacher"].mean == -0.5
    assert found["extraction", "joint"].mean == -0.5 and found["extraction-teacher", "joint-teacher"].mean == 0
    assert found["one_shot-teacher", "one_shot"].mean == 0  # what the start is worth
    assert ("extraction", "joint-teacher") not in found and ("extraction-teacher", "joint") not in found
    assert ("joint", "extraction") not in found


def test_several_teachers_count_once_each() -> None:
    """Runs of one teacher are alike: 2 x 3 runs are no six independent pairs."""
    under = {(teacher, seed): 5.0 for teacher in range(2) for seed in range(3)}
    over = {(teacher, seed): 4.0 + teacher + 0.1 * seed for teacher, seed in under}
    found = differences_of(finals("extraction", over), finals("one_shot", under))["extraction", "one_shot"]
    assert (found.pairs, found.kind) == (2, "range")
    assert [round(value, 6) for value in (found.mean, found.low, found.high)] == [-0.4, -0.9, 0.1]


def test_a_run_that_diverged_makes_no_difference() -> None:
    seeds = {(0, 0): 1.0, (0, 1): 2.0}
    found = differences_of(finals("extraction", {**seeds, (0, 1): 900.0}, (0, 1)), finals("one_shot", seeds))
    assert (found["extraction", "one_shot"].mean, found["extraction", "one_shot"].pairs) == (0.0, 1)


# ---- Students with different starts ----


def curved(name: str, losses: tuple[float, ...], **own: str) -> MethodResult:
    """A method with one run, evaluated every 100 samples."""
    points = tuple(CurvePoint(100 * n, 100.0 * n, 1.0 * n, {"loss": loss}) for n, loss in enumerate(losses, 1))
    return MethodResult(Variant(name, name.partition("-")[0], dict(own)), runs=(RunRecord(0, points),))


def two_starts() -> Comparison:
    start = {"student_init": "teacher"}
    methods = (
        curved("extraction", (9.0, 7.0, 5.0, 4.0)),
        curved("one_shot", (9.0, 8.0, 6.0, 5.0)),
        curved("extraction-teacher", (4.0, 3.5, 3.0, 2.9), **start),
        curved("one_shot-teacher", (4.0, 3.0, 2.8, 2.7), **start),
        curved("progressive-teacher", (4.0, 3.8, 3.6, 3.4), **start),
    )
    whole = dataclasses.replace(compared([1], [1], None), methods=methods, metric="loss", better="lower")
    return summarise(whole, None)


def test_the_headline_compares_methods_of_the_same_start() -> None:
    """What the start gives is not counted as what a method gives."""
    found = two_starts()
    assert headline(found).splitlines() == [
        "extraction reached loss 5 in 1 of 1 runs, after 300 samples (median).",
        "one_shot reached loss 5 in 1 of 1 runs, after 400 samples (median).",
        "extraction needed 0.75 times the samples of one_shot to reach its final loss (1 pair of runs) and 0.75 times its "
        "FLOPs: too few runs to decide.",
        "extraction-teacher reached loss 5 in 1 of 1 runs, after 100 samples (median).",
        "one_shot-teacher reached loss 5 in 1 of 1 runs, after 100 samples (median).",
        "In most pairs extraction-teacher was never as good as one_shot-teacher at the end: one_shot-teacher is better here.",
    ]


def test_the_small_table_compares_methods_of_the_same_start() -> None:
    table = summary_table(two_starts())
    assert table.columns[3] == "ratio to one-shot of the same start"
    assert [row[3] for row in table.rows] == ["0.75", "1", "not reached", "1", "not reached"]
    plain = dataclasses.replace(two_starts(), methods=two_starts().methods[:2])
    assert summary_table(plain).columns[3] == "ratio to one_shot"
