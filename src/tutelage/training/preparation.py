"""From a trainer's arguments to models, curriculum and objective; every refusal happens here, before any compute.

Public names: `Setup`, `prepare`, `total_steps`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tutelage.core.blocks import find_blocks
from tutelage.core.curriculum import Curriculum, OutputStage
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.targets.extracted import ExtractedCurriculum
from tutelage.targets.live import LiveTeacher, check_checkpoint
from tutelage.targets.reading import Reading, StoredRows
from tutelage.tasks.base import Task, backbone, default_warm_start, detect_task, get_task, hidden_size, load_task_model
from tutelage.tasks.loading import load_tokenizer
from tutelage.training import checks, warm_start
from tutelage.training.adoption import adopt, check_given
from tutelage.training.config import CurriculumConfig
from tutelage.training.objective import StageObjective


@dataclass(frozen=True)
class Setup:
    """What a trainer trains, and by which stages."""

    task: Task
    student: nn.Module
    teacher: LiveTeacher | None
    curriculum: Curriculum
    objective: StageObjective
    stored: ExtractedCurriculum | None
    """An extracted curriculum in the teacher's place."""
    train_dataset: Any
    eval_dataset: Any
    tokenizer: PreTrainedTokenizerBase | None


def prepare(
    model: nn.Module | str,
    teacher_model: nn.Module | str | None,
    args: CurriculumConfig,
    train_dataset: Any,
    eval_dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    curriculum: Curriculum | None,
) -> Setup:
    """Load what is given by name, build the curriculum, and check that everything fits together.

    Raises:
        UserError: anything that cannot work.
    """
    teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if args.method == "scratch" and curriculum is None:
        teacher_model = None
    stored = None
    if args.curriculum_dir is not None:
        stored = ExtractedCurriculum(args.curriculum_dir, check=False)
        # far shards are compared when they are fetched, those here by one process
        stored.check(shards=args.check_curriculum and stored.store.local is not None and args.local_process_index == 0)
        check_given(stored, teacher_model, tokenizer, train_dataset, args)
        args.task, teacher_model = stored.identity["task"], None
        tokenizer = tokenizer or stored.tokenizer
        eval_dataset = stored.evaluation if eval_dataset is None else eval_dataset
    task = get_task(args.task) if args.task else detect_task(teacher_model if teacher_model is not None else model)
    loading: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if task.name == "embedding" and teacher_model is None and stored is None:
        raise UserError("an encoder's embedding has no labels to learn from: method 'scratch' needs another task")
    if isinstance(teacher_model, str):
        theirs = load_tokenizer(teacher_model, trust_remote_code=args.trust_remote_code)
        checks.check_tokenizers(tokenizer, theirs)
        if isinstance(model, str):
            checks.check_tokenizers(load_tokenizer(model, trust_remote_code=args.trust_remote_code), theirs)
        teacher_model = load_task_model(task, teacher_model, **args.teacher_loading())
    student = load_task_model(task, model, what="student", **loading) if isinstance(model, str) else model
    for part in (student, teacher_model):
        if part is not None:
            checks.check_outputs(part, task)
            checks.check_dataset(train_dataset, backbone(part).config, "training")
            checks.check_dataset(eval_dataset, backbone(part).config, "evaluation")
    teacher = None if teacher_model is None else LiveTeacher(teacher_model, backbone(teacher_model), args.blocks)
    outputs = _outputs(student, teacher, stored, task, tokenizer)
    if stored is not None:
        adopt(args, stored, len(find_blocks(backbone(student), args.blocks)))
    curriculum = _curriculum(curriculum, args, task, student, teacher, stored, train_dataset)
    if stored is not None:
        train_dataset = _stored_rows(stored, curriculum, student, args)
    if curriculum.top_k is not None and task.whole:
        raise UserError(f"top_k is for tasks with an output head over many outputs, not for {task.name}: leave it out")
    for stage in curriculum.stages:
        if isinstance(stage, OutputStage) and stage.teacher_checkpoint is not None and teacher is not None:
            check_checkpoint(teacher.model, stage.teacher_checkpoint)
    if teacher is not None:
        checks.check_widths(curriculum, hidden_size(student), hidden_size(teacher.model))
    warm_start.check(curriculum, student, teacher, None if stored is None else stored.head)
    objective = StageObjective(
        student,
        teacher,
        curriculum,
        task,
        [None] * len(curriculum.stages),
        outputs=outputs,
        container=args.blocks,
        chunk_size=args.logits_chunk_size,
        embedding_loss=args.embedding_loss,
        teacher_head=None if stored is None else stored.head,
    )
    return Setup(task, student, teacher, curriculum, objective, stored, train_dataset, eval_dataset, tokenizer)


def _outputs(
    student: nn.Module,
    teacher: LiveTeacher | None,
    stored: ExtractedCurriculum | None,
    task: Task,
    tokenizer: PreTrainedTokenizerBase | None,
) -> int | None:
    if task.whole or (teacher is None and stored is None):
        return None
    if stored is not None:
        theirs = int(stored.identity["teacher"]["outputs"])
    else:
        assert teacher is not None
        theirs = OutputHead.of(teacher.model).linear.out_features
    return checks.shared_outputs(student, theirs, task, tokenizer)


def _stored_rows(
    stored: ExtractedCurriculum, curriculum: Curriculum, student: nn.Module, args: CurriculumConfig
) -> StoredRows:
    width = hidden_size(student)
    stored.check_width(width)
    if warm_start.head_stage(curriculum) is not None:
        check_transplant(stored, student)
    if "embedding" in curriculum.warm_start:
        raise UserError(
            f"warm_start={curriculum.warm_start!r} needs the teacher's embedding, which a curriculum on disk does not hold: "
            "use 'head' or 'none', or train with the teacher itself"
        )
    size, devices = args.per_device_train_batch_size, args.world_size
    return StoredRows(stored, curriculum, width, Reading(args.step_examples(devices), size, devices, args.order_seed))


def check_transplant(stored: ExtractedCurriculum, student: nn.Module) -> None:
    """Raise UserError where the head of this student cannot start from what was extracted."""
    if stored.identity["head"] is None:
        raise UserError(
            f"the curriculum in {str(stored.store)!r} holds no output head to start from: extract it with "
            "--warm_start head, or train with --warm_start none"
        )
    if stored.identity["centered"] and not warm_start.head_has_bias(student):
        raise UserError(
            "the curriculum was extracted for a student whose output head has a bias, this one has none: use "
            "--warm_start none, or extract again with this student"
        )


def _curriculum(
    given: Curriculum | None,
    args: CurriculumConfig,
    task: Task,
    student: nn.Module,
    teacher: LiveTeacher | None,
    stored: ExtractedCurriculum | None,
    train_dataset: Any,
) -> Curriculum:
    if given is not None:
        if teacher is None and stored is None and any(stage.needs_teacher for stage in given.stages):
            raise UserError("this curriculum has stages that need a teacher: pass teacher_model")
        return given
    steps = total_steps(args, train_dataset, args.world_size)
    if steps is None:
        raise UserError("the budget is unknown: set max_steps, or num_train_epochs with a sized train_dataset")
    student_blocks = find_blocks(backbone(student), args.blocks)
    teacher_blocks = stored.teacher_blocks if stored is not None else None if teacher is None else len(teacher.blocks)
    return args.build_curriculum(len(student_blocks), teacher_blocks, steps, default_warm_start(task))


def total_steps(args: CurriculumConfig, dataset: Any, devices: int) -> int | None:
    """Optimiser steps of the budget on so many devices: `max_steps`, else from epochs and the dataset's length."""
    if args.max_steps > 0:
        return args.max_steps
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    size = args.per_device_train_batch_size * devices
    batches = len(dataset) // size if args.dataloader_drop_last else math.ceil(len(dataset) / size)
    # as transformers counts: an epoch's last step may have fewer micro-batches
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
