"""What a distillation would do and cost, before anything is spent."""

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tutelage.core.blocks import Blocks, find_blocks
from tutelage.core.curriculum import Curriculum, one_shot
from tutelage.core.errors import UserError
from tutelage.core.inputs import text_config, usable_positions
from tutelage.core.records import Record
from tutelage.core.stages import Stage
from tutelage.runs.inputs import DEFAULT_LENGTH, DEFAULT_STEPS, NO_LIMIT, RunOptions, check_length
from tutelage.runs.plan_extraction import ExtractionPlan
from tutelage.runs.plan_start import StartPlan, plan_start
from tutelage.targets.live import LiveTargets
from tutelage.tasks.base import Task
from tutelage.tasks.embedded import DEFAULT_STUDENT, DEFAULT_TEACHER
from tutelage.tasks.loading import count_parameters, load_config
from tutelage.tasks.registry import detect_task, get_task
from tutelage.tasks.students import WEIGHTS, feed_forward_width, is_untrained, language_config, student_config
from tutelage.training.checks import compare_sizes
from tutelage.training.config import CurriculumConfig
from tutelage.training.costs import FlopCounter, StageCost
from tutelage.training.feed import StageFeed
from tutelage.training.objective import StageObjective
from tutelage.training.preparation import decide_start, default_warm_start, with_basis
from tutelage.training.resolution import build_curriculum
from tutelage.training.transition import StageTransition

_ASSUMED_STEPS = 1000  # where the number of steps would follow from data, which a plan does not read


@dataclass(frozen=True)
class ModelPlan(Record):
    """A model of a plan."""

    name: str
    class_name: str
    parameters: int
    hidden_size: int
    blocks: tuple[str, ...]  # dotted names
    heads: int | None  # attention heads of a block; None where the configuration does not say
    key_value_heads: int | None  # the same of keys and values
    neurons: int | None  # the same of the feed-forward layer
    megabytes: float  # on disk, in float32
    forward_flops_per_token: float  # of the whole model, its output at every token included


@dataclass(frozen=True)
class StagePlan(Record):
    """A stage and what it costs."""

    name: str
    targets: int  # hidden states of the teacher that it matches at a position
    output: bool  # whether it matches the teacher's output
    steps: int
    student_flops_per_token: float
    teacher_flops_per_token: float
    one_shot_ratio: float  # cost of a one-shot step over that of this stage's


@dataclass(frozen=True)
class Plan(Record):
    """A distillation that was not run."""

    task: str
    teacher: ModelPlan
    student: ModelPlan
    curriculum: Curriculum
    steps_assumed: bool  # whether a distillation would take as many steps as its data need
    stages: tuple[StagePlan, ...]
    tokens: int  # of the whole run
    flops: float  # of the whole run, teacher included
    one_shot_flops: float  # of one-shot distillation on as many tokens
    teacher_forward_flops_per_token: float
    vocabulary: int
    outputs: int  # at a position that predicts
    start: StartPlan | None = None  # of a student that starts from its teacher
    extraction: ExtractionPlan | None = None  # where one was planned too


def plan(options: RunOptions | None = None, args: CurriculumConfig | None = None) -> Plan:
    """Blocks, stage map, parameters and predicted FLOPs; both models exist as fake tensors only, without memory.

    Of `options`, `student` and `max_length` are read, and no data. With a `dataset` the teacher is loaded too and runs over the
    calibration text, to measure what a student that starts from it keeps. What is not given is as in `distill`; where its
    steps would follow from the data, 1,000 are assumed. Raises UserError for options that cannot work."""
    options, args = options or RunOptions(), args or CurriculumConfig()
    if args.curriculum_dir is not None:
        raise UserError("a plan is of a live teacher: give teacher and student in place of curriculum_dir")
    teacher = args.teacher_model_name_or_path or DEFAULT_TEACHER
    student = options.student or (DEFAULT_STUDENT if teacher == DEFAULT_TEACHER else None)
    if student is None:
        raise UserError("no student was given: name one, e.g. --student layers=3,hidden_size=192")
    base = load_config(teacher, trust_remote_code=args.trust_remote_code)
    task = get_task(args.task) if args.task else detect_task(teacher, args.trust_remote_code)
    if not task.tokenized:
        raise UserError(f"a plan needs a model that reads tokens, task {task.name} has plain networks: leave task out")
    positions = usable_positions(base) or NO_LIMIT
    check_length(options.max_length or 1, positions)
    length = options.max_length or min(DEFAULT_LENGTH, positions)
    steps, assumed = _steps(args, teacher == DEFAULT_TEACHER and options.dataset is None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher_model = task.build(language_config(base, task))
        student_model = task.build(student_config(student, base, task), task.teacher_shape(teacher_model))
        for network in map(task.backbone, (teacher_model, student_model)):
            if hasattr(network, "set_experts_implementation"):
                network.set_experts_implementation("batched_mm")  # type: ignore[operator]  # others need values
        source = LiveTargets(teacher_model, task, args.blocks)
        counts = [count for count in map(task.output_count, (student_model, teacher_model)) if count is not None]
        source.attach(one_shot(1), student_model, min(counts, default=None))
        student_blocks = find_blocks(task.backbone(student_model), args.blocks)
        compare_sizes(student_model, source)
        student_model.__dict__[WEIGHTS] = "random" if is_untrained(student) else "own"
        args = decide_start(args, student_model, source)
        blocks = len(student_blocks), len(source.block_names)
        curriculum = build_curriculum(args, blocks, steps, default_warm_start(task, student_model))
        curriculum = with_basis(curriculum, task, [student_model, teacher_model])
        baseline = _costs(source, student_model, one_shot(1), task.example(length))[0]
        costs = _costs(source, student_model, curriculum, task.example(length))
        student_plan = _model_plan(student, student_model, student_blocks, task, length)
        teacher_plan = _model_plan(teacher, teacher_model, source.block_names, task, length)
    tokens_per_step = args.step_examples(args.world_size) * length
    starts = curriculum.student_init == "teacher"
    priced = list(zip(curriculum.stages, costs, strict=True))
    return Plan(
        task=task.name,
        teacher=teacher_plan,
        student=student_plan,
        curriculum=curriculum,
        steps_assumed=assumed,
        stages=tuple(_stage_plan(stage, cost, baseline) for stage, cost in priced),
        tokens=curriculum.total_steps * tokens_per_step,
        flops=sum(stage.steps * cost.flops for stage, cost in priced) * tokens_per_step,
        one_shot_flops=baseline.flops * curriculum.total_steps * tokens_per_step,
        teacher_forward_flops_per_token=baseline.teacher_flops,
        vocabulary=int(text_config(base).vocab_size),
        outputs=task.output_count(teacher_model) or task.width(teacher_model),
        start=plan_start(curriculum, student_plan, teacher_plan, options, args) if starts else None,
    )


def _steps(args: CurriculumConfig, embedded: bool) -> tuple[int, bool]:
    """Steps of the whole run, and whether they are assumed."""
    if args.max_steps > 0:
        return args.max_steps, False
    if args.num_train_epochs is not None:
        raise UserError("a plan reads no data to count epochs in: give max_steps in place of num_train_epochs")
    return (DEFAULT_STEPS, False) if embedded else (_ASSUMED_STEPS, True)


def _costs(
    source: LiveTargets, student: torch.nn.Module, curriculum: Curriculum, batch: dict[str, Any]
) -> list[StageCost]:
    source.attach(curriculum, student, source.outputs)
    source.draw_maps()
    objective = StageObjective(student, source, container=source.container)
    return StageTransition(objective).measure_all(StageFeed(source, [batch], lambda rows: batch, 1, 1))


def _stage_plan(stage: Stage, cost: StageCost, baseline: StageCost) -> StagePlan:
    flops, ratio = (cost.student_flops, cost.teacher_flops), baseline.flops / cost.flops
    return StagePlan(stage.name, len(stage.pairs), stage.output is not None, stage.steps, *flops, ratio)


def _model_plan(name: str, model: torch.nn.Module, blocks: Blocks, task: Task, length: int) -> ModelPlan:
    backbone, parameters = task.backbone(model), count_parameters(model)
    config: Any = text_config(backbone.config)
    batch = {key: value for key, value in task.example(length).items() if key != "labels"}
    with FlopCounter() as counter, torch.no_grad():
        task.whole_output(model, batch)
    return ModelPlan(
        name=name,
        class_name=type(backbone).__name__,
        parameters=parameters,
        hidden_size=int(config.hidden_size),
        blocks=blocks.names,
        heads=_number(getattr(config, "num_attention_heads", None)),
        key_value_heads=_number(getattr(config, "num_key_value_heads", None)),
        neurons=_number(feed_forward_width(config)),
        megabytes=4 * parameters / 1e6,
        forward_flops_per_token=counter.total / length,
    )


def _number(value: Any) -> int | None:
    """A size that all blocks have; None where it differs between them."""
    return value if isinstance(value, int) else None


def _compared(student: ModelPlan, teacher: ModelPlan) -> str:
    """What the student has of the teacher's shape and size, and its speed by FLOPs."""
    rows = [("blocks", len(student.blocks), len(teacher.blocks)), ("heads", student.heads, teacher.heads)]
    if (student.heads, teacher.heads) != (student.key_value_heads, teacher.key_value_heads):
        rows.append(("key/value heads", student.key_value_heads, teacher.key_value_heads))
    rows.append(("neurons", student.neurons, teacher.neurons))
    shape = ", ".join(f"{mine} of {theirs} {what}" for what, mine, theirs in rows if None not in (mine, theirs))
    disk = f"{student.megabytes:,.1f} of {teacher.megabytes:,.1f} MB on disk in float32"
    speed = teacher.forward_flops_per_token / student.forward_flops_per_token
    return f"student of teacher: {shape}; {disk}; predicted speed {speed:.1f}x (teacher's forward FLOPs/student's)"


def describe_plan(planned: Plan) -> str:
    """The plan as text for the terminal."""
    lines = [f"task: {planned.task}"]
    for who, model in (("teacher", planned.teacher), ("student", planned.student)):
        lines.append(
            f"{who}: {model.name} ({model.class_name}, {model.parameters:,} parameters, width {model.hidden_size}, "
            f"{len(model.blocks)} blocks {model.blocks[0]} to {model.blocks[-1]})"
        )
    lines.append(_compared(planned.student, planned.teacher))
    lines += [] if planned.start is None else [planned.start.words]
    heads = f"{'steps':>8}{'student FLOPs/token':>22}{'teacher FLOPs/token':>22}{'one-shot/stage':>17}"
    lines += ["", f"{'stage':<24}{heads}"]
    for stage in planned.stages:
        costs = f"{stage.student_flops_per_token:>22.3g}{stage.teacher_flops_per_token:>22.3g}"
        lines.append(f"{stage.name:<24}{stage.steps:>8,}{costs}{stage.one_shot_ratio:>16.1f}x")
    steps = f"{planned.curriculum.total_steps:,} steps{' (assumed: give --max_steps)' * planned.steps_assumed}"
    total = f"total: {steps}, {planned.tokens:,} tokens, {planned.flops:.3g} FLOPs"
    one_shot = f"{planned.one_shot_flops:.3g} FLOPs ({planned.flops / planned.one_shot_flops:.0%})"
    return "\n".join([*lines, "", f"{total}; one-shot at equal tokens: {one_shot}. Nothing was trained."])
