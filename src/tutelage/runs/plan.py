"""What a distillation would do and cost, before anything is spent.

Public names: `plan`, `describe_plan`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tutelage.core.curriculum import Curriculum, HiddenStage, one_shot, stage_to_dict
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import usable_positions
from tutelage.core.standardize import Standardizer
from tutelage.runs.settings import DEFAULT_LENGTH, count_parameters
from tutelage.targets.live import LiveTeacher, TargetMap, random_projection
from tutelage.tasks.base import backbone, build_task_model, default_warm_start, detect_task, get_task, hidden_size
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.loading import load_config
from tutelage.tasks.students import student_config
from tutelage.training.checks import check_widths
from tutelage.training.config import CurriculumConfig
from tutelage.training.costs import measure_stage
from tutelage.training.objective import StageObjective


def plan(teacher: str, student: str, args: CurriculumConfig, max_length: int = DEFAULT_LENGTH) -> dict[str, Any]:
    """Blocks, stage map, parameters and predicted FLOPs; both models exist as fake tensors only, without memory.

    Args:
        teacher: folder or Hub name.
        student: folder, config file or preset.
        args: the run's settings; without a budget, 1,000 steps are assumed.
        max_length: tokens a sequence, for the attention's share of the cost.

    Returns:
        `teacher` and `student` (blocks, parameters, width), `stages` (name, steps, FLOPs a token of student and teacher,
        ratio of a one-shot step to this one) and `total` (tokens, FLOPs, FLOPs of one-shot at equal tokens).
    """
    base = load_config(teacher, trust_remote_code=args.trust_remote_code)
    task = get_task(args.task) if args.task else detect_task(teacher)
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher_model = build_task_model(task, base)
        if isinstance(teacher_model, EmbeddingModel):
            teacher_model.head = None
        student_model = build_task_model(task, student_config(student, base), teacher_model)
        source = LiveTeacher(teacher_model, backbone(teacher_model), args.blocks)
        objective = StageObjective(student_model, source, one_shot(1), task, [None], container=args.blocks)
        steps = args.max_steps if args.max_steps > 0 else 1000
        curriculum = args.build_curriculum(len(objective.blocks), len(source.blocks), steps, default_warm_start(task))
        check_widths(curriculum, hidden_size(student_model), hidden_size(teacher_model))
        if task.name != "embedding":
            mine, theirs = OutputHead.of(student_model), OutputHead.of(teacher_model)
            objective.outputs = min(mine.linear.out_features, theirs.linear.out_features)
        length = min(max_length, usable_positions(base) or max_length)
        batch = {"input_ids": torch.zeros((1, length), dtype=torch.long)}
        if task.per_position:
            batch["labels"] = torch.zeros((1, length), dtype=torch.long)
        elif task.name == "sequence_classification":
            batch["labels"] = torch.zeros((1,), dtype=torch.long)
        baseline = _costs(objective, one_shot(1), source, batch)[0]
        costs = _costs(objective, curriculum, source, batch)
    tokens_per_step = args.step_examples(args.world_size) * length
    stages = [
        {
            "name": stage.name,
            "kind": stage_to_dict(stage)["kind"],
            "steps": stage.steps,
            "student_flops_per_token": cost.student_flops,
            "teacher_flops_per_token": cost.teacher_flops,
            "one_shot_ratio": baseline.flops / cost.flops,
        }
        for stage, cost in zip(curriculum.stages, costs, strict=True)
    ]
    flops = sum(s.steps * c.flops for s, c in zip(curriculum.stages, costs, strict=True)) * tokens_per_step
    return {
        "task": task.name,
        "teacher": _describe_model(teacher, source.model, source.blocks.names),
        "student": _describe_model(student, student_model, objective.blocks.names),
        "curriculum": curriculum.to_dict(),
        "stages": stages,
        "teacher_forward_flops_per_token": baseline.teacher_flops,
        "vocabulary": int(base.vocab_size),
        "outputs": int(
            {"sequence_classification": base.num_labels, "embedding": base.hidden_size}.get(task.name)
            or base.vocab_size
        ),
        "total": {
            "steps": curriculum.total_steps,
            "tokens": curriculum.total_steps * tokens_per_step,
            "flops": flops,
            "one_shot_flops": baseline.flops * curriculum.total_steps * tokens_per_step,
        },
    }


def _costs(objective: StageObjective, curriculum: Curriculum, source: LiveTeacher, batch: dict[str, Any]) -> list[Any]:
    teacher_width, width = hidden_size(source.model), hidden_size(objective.student)
    maps: list[TargetMap | None] = []
    for stage in curriculum.stages:
        if not isinstance(stage, HiddenStage):
            maps.append(None)
            continue
        drawn = dataclasses.replace(curriculum, projection="gaussian")
        projection = random_projection(drawn, stage.teacher_place, teacher_width, width, len(source.blocks))
        maps.append(TargetMap(Standardizer.identity(teacher_width), projection))
    objective.curriculum, objective.maps[:] = curriculum, maps
    return [measure_stage(objective, index, batch) for index in range(len(curriculum.stages))]


def _describe_model(name: str, model: torch.nn.Module, blocks: tuple[str, ...]) -> dict[str, Any]:
    return {
        "name": name,
        "class": type(backbone(model)).__name__,
        "parameters": count_parameters(model),
        "hidden_size": hidden_size(model),
        "blocks": list(blocks),
    }


def describe_plan(planned: dict[str, Any]) -> str:
    """The plan as text for the terminal."""
    lines = [f"task: {planned['task']}"]
    for who in ("teacher", "student"):
        model = planned[who]
        lines.append(
            f"{who}: {model['name']} ({model['class']}, {model['parameters']:,} parameters, width {model['hidden_size']}, "
            f"{len(model['blocks'])} blocks {model['blocks'][0]} to {model['blocks'][-1]})"
        )
    lines += [
        "",
        f"{'stage':<24}{'steps':>8}{'student FLOPs/token':>22}{'teacher FLOPs/token':>22}{'one-shot/stage':>17}",
    ]
    for stage in planned["stages"]:
        lines.append(
            f"{stage['name']:<24}{stage['steps']:>8,}{stage['student_flops_per_token']:>22.3g}"
            f"{stage['teacher_flops_per_token']:>22.3g}{stage['one_shot_ratio']:>16.1f}x"
        )
    total = planned["total"]
    lines += [
        "",
        f"total: {total['steps']:,} steps, {total['tokens']:,} tokens, {total['flops']:.3g} FLOPs; one-shot at equal "
        f"tokens: {total['one_shot_flops']:.3g} FLOPs ({total['flops'] / total['one_shot_flops']:.0%}). Nothing was trained.",
    ]
    return "\n".join(lines)
