"""A comparison that is written by hand, and its report."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from tutelage.core.curriculum import Curriculum
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.reproduction.report import write_report
from tutelage.reproduction.results import (
    Comparison,
    CurvePoint,
    Difference,
    MethodResult,
    Ratio,
    RunRecord,
    Trial,
    Tuning,
)
from tutelage.reproduction.statistics import Estimate, PairedDifference, PairedRatio
from tutelage.reproduction.teachers import TeacherRecord
from tutelage.reproduction.variants import Candidate, Variant

EVIL = '</script><script>document.title="bad"</script>:projection=logits,warm_start=head|a/b*'
BUDGET = 1_920_000
POINTS = 13


def run_of(seed: int, reached: int | None, end: float = 1.0) -> RunRecord:
    curve = []
    for step in range(POINTS):
        samples = step * BUDGET // (POINTS - 1)
        accuracy = 0.5 + (end - 0.5) * min(1.0, samples / (reached or 4 * BUDGET)) - 0.005 * seed
        seconds = samples * (1 + 0.05 * seed) / 1e5
        curve.append(CurvePoint(samples, samples * 2.5e6, seconds, {"accuracy": accuracy, "loss": 1 - accuracy}))
    at_target = None if reached is None else CurvePoint(reached, reached * 2.5e6, reached / 1e5, {"accuracy": 1.0})
    return RunRecord(seed, tuple(curve), at_target=at_target)


def comparison() -> Comparison:
    """Two methods, three seeds; one method never gets there and has a name that attacks every format."""
    output = OutputStage(29_500)
    settings = {"projection": "gaussian", "normalize": "none", "warm_start": "none", "temperature": 1.0}
    tried = (
        Trial(Candidate(0.03), "samples to target", score=152_000, seeds=3),
        Trial(Candidate(0.1), "samples to target", score=144_000, seeds=3),
    )
    extraction = MethodResult(
        variant=Variant("extraction", "extraction", {"layer_map": "1:2"}),
        tunings=(Tuning(Candidate(0.1), tried, ("learning_rate",)),),
        curriculum=Curriculum("extraction", (HiddenStage(500, 1, 2), output), **settings),
        runs=tuple(run_of(seed, 144_000 + 80_000 * seed) for seed in range(3)),
        samples_to_target=Estimate(224_000, 144_000, 304_000),
    )
    evil = MethodResult(
        variant=Variant(EVIL, "one_shot"),
        tunings=(Tuning(Candidate(0.03), (Trial(Candidate(0.03), "final accuracy", score=0.61, seeds=2),)),),
        curriculum=Curriculum("one_shot", (dataclasses.replace(output, steps=30_000),)),
        runs=tuple(run_of(seed, None) for seed in range(3)),
        samples_to_target=Estimate(None, 128_000, None),
    )
    return Comparison(
        recipe="parity-mlp",
        size="laptop",
        command="tutelage compare parity-mlp/laptop",
        complete=True,
        match="samples",
        budget=BUDGET,
        metric="accuracy",
        better="higher",
        target=0.99,
        seeds=(0, 1, 2),
        settings={"d": 64, "k": 5, "note": "<b>bold</b>"},
        teachers=(TeacherRecord("trained past convergence", {"accuracy": 1.0}),),
        environment={"torch": "2.13.0", "machine": "laptop"},
        methods=(extraction, evil),
        ratios=(
            Ratio("extraction", EVIL, "samples", 3, PairedRatio(Estimate(0.08, 0.07, 0.1), 3)),
            Ratio(EVIL, "extraction", "samples", 3, PairedRatio(Estimate(None, 8.5, None), 3)),
        ),
        differences=(Difference("extraction", EVIL, PairedDifference(0.36, 0.35, 0.37, 3)),),
        verdict="extraction needs 8% of the samples\n<i>at most</i>",
    )


def with_method(data: Comparison, name: str, **changes: Any) -> Comparison:
    """A comparison with a change in one of its methods."""
    methods = tuple(dataclasses.replace(m, **changes) if m.name == name else m for m in data.methods)
    return dataclasses.replace(data, methods=methods)


def empty(*names: str, complete: bool = True) -> Comparison:
    """A comparison in which no method has run."""
    methods = tuple(MethodResult(Variant(name, "one_shot")) for name in names)
    data = dataclasses.replace(
        comparison(), complete=complete, target=None, seeds=(), ratios=(), differences=(), verdict=""
    )
    return dataclasses.replace(data, methods=methods)


def unfinished() -> Comparison:
    """One run is finished; a method has none."""
    data = dataclasses.replace(comparison(), complete=False, ratios=(), differences=(), verdict="")
    data = with_method(
        data, "extraction", runs=(run_of(0, 144_000),), samples_to_target=Estimate(144_000, 144_000, 144_000)
    )
    return with_method(data, EVIL, runs=(), tunings=(), samples_to_target=Estimate())


def write(folder: Path, data: Comparison) -> Path:
    data.write(folder)
    return write_report(folder)


def plot_data(page: Path) -> dict[str, Any]:
    found = re.search(r'id="curves-data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])
