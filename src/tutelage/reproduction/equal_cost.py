"""Budgets that are equal in FLOPs or seconds: the last stage of a curriculum is made longer or shorter.

Public names: `at_equal_cost`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from tutelage.core.curriculum import Curriculum, HiddenStage, Stage
from tutelage.io.files import write_atomically
from tutelage.reproduction.run_builder import RunBuilder
from tutelage.reproduction.variants import Candidate, Variant, plain_variant
from tutelage.training.records import METRICS_FILE, MetricsFile

_PILOT_STEPS = {"flops": 4, "seconds": 24}  # per stage: FLOPs do not vary, seconds do
_CALIBRATION = "calibration"


def at_equal_cost(builder: RunBuilder, variant: Variant, candidate: Candidate, match: str) -> Curriculum:
    """The curriculum of a variant that costs as much as its fraction of the budget costs one-shot.

    Args:
        builder: of the comparison.
        variant: not progressive, whose stages follow the teacher's training.
        candidate: what tuning chose.
        match: the cost that is equal, `flops` or `seconds`.
    """
    steps = builder.steps(variant.budget_fraction)
    made = builder.curriculum(variant, candidate, steps)
    reference = _step_costs(builder, plain_variant("one_shot"), candidate, match)["output"]
    cost = _step_costs(builder, variant, candidate, match)
    *first, last = made.stages
    spent = cost[_CALIBRATION] + sum(cost[_key(stage)] * stage.steps for stage in first)
    left = max(1, round((reference * steps - spent) / cost[_key(last)]))
    return dataclasses.replace(made, stages=(*first, dataclasses.replace(last, steps=left)))


def _key(stage: Stage) -> str:
    return stage.name if isinstance(stage, HiddenStage) else "output"


def _step_costs(builder: RunBuilder, variant: Variant, candidate: Candidate, match: str) -> dict[str, float]:
    """Cost of one step of each stage, and of calibration, measured on a few steps of each.

    It is stored in the comparison's folder: when the comparison is resumed, the seconds would be different, and its runs
    must keep their lengths.
    """
    whole = dataclasses.replace(variant, budget_fraction=1.0)  # a step costs the same at every budget
    folder = builder.root / "pilot" / builder.folder(whole, candidate, [0]).parent.name
    file = folder.with_name(f"{folder.name}.json")
    if file.exists():
        kept: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return kept
    steps = _PILOT_STEPS[match]
    made = builder.curriculum(variant, candidate, builder.steps())
    short = dataclasses.replace(made, stages=tuple(dataclasses.replace(stage, steps=steps) for stage in made.stages))
    recipe = builder.recipe
    seeds = recipe.seeds if recipe.replicated else recipe.seeds[:1]
    args = builder.arguments(variant, candidate, folder, seeds[0])
    args.logging_steps, args.eval_on_start, args.overwrite_output_dir = 1, False, True
    args.eval_strategy, args.save_strategy = "no", "no"
    builder.trainer(args, seeds, short).train()
    found = _measured(folder, match)
    shutil.rmtree(folder)
    write_atomically(file, json.dumps(found))
    return found


def _measured(folder: Path, match: str) -> dict[str, float]:
    """Median cost of a step by stage, from a run's metrics; the first step also pays for calibration."""
    costs: dict[str, list[float]] = {}
    previous = first = 0.0
    for record in MetricsFile(folder / METRICS_FILE).read():
        if "loss" not in record:
            continue
        stage = record["stage_name"] if record["stage_name"].startswith("hidden") else "output"
        costs.setdefault(stage, []).append(record[match] - previous)
        previous = record[match]
        first = first or previous
    found = {stage: sorted(values[1:])[len(values[1:]) // 2] for stage, values in costs.items()}
    found[_CALIBRATION] = first - next(iter(found.values())) if match == "flops" else 0.0
    return found
