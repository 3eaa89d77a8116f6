"""Starting a student from its teacher: what a curriculum asks for, for the models of a task."""

from __future__ import annotations

import torch
from torch import nn

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.tasks.base import Task
from tutelage.tasks.initialization.convert import BasisChoice, Initialized, check_sizes, initialize
from tutelage.tasks.initialization.families import SAME, STREAM, Linear, Norm
from tutelage.tasks.initialization.layout import Batches, Layout, gain_of

__all__ = ["Initialized", "basis_kind", "check_start", "start_student"]


def check_start(
    student: nn.Module, teacher: nn.Module, task: Task, curriculum: Curriculum, container: str | None = None
) -> Layout:
    """How the weights of teacher and student correspond; UserError for a pair that cannot be initialised so."""
    layout = Layout.of(task.backbone(student), task.backbone(teacher), curriculum.start_pairs, container)
    kind = _basis(layout, curriculum)
    check_sizes(layout, kind)
    if task.embeds and kind != "identity" and task.output_head(student) is None and task.output_head(teacher) is None:
        found = f"the student's embedding is its pooled state, and residual_basis={kind!r} would rotate it"
        raise UserError(f"student_init='teacher': {found} against the teacher's: use residual_basis='identity'")
    if kind == "logits" and not _reads_stream(layout, task.output_head(teacher)):
        found = "residual_basis='logits' weighs the states by what the output head reads of them"
        lacks = f"{type(teacher).__name__} has no output head that reads the residual stream"
        raise UserError(f"student_init='teacher': {found}, but {lacks}: use residual_basis='pca'")
    return layout


def basis_kind(curriculum: Curriculum, student_width: int, teacher_width: int) -> str:
    """The kind of residual basis that a curriculum starts a student with."""
    return curriculum.residual_basis or ("identity" if student_width == teacher_width else "pca")


def _basis(layout: Layout, curriculum: Curriculum) -> str:
    return basis_kind(curriculum, layout.student_config.hidden_size, layout.teacher_config.hidden_size)


def start_student(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    batches: Batches,
    curriculum: Curriculum,
    container: str | None = None,
) -> Initialized:
    """Write all weights of `student` from those of `teacher`; `batches` are calibration batches on the teacher's device."""
    layout = check_start(student, teacher, task, curriculum, container)
    kind = _basis(layout, curriculum)
    theirs = task.output_head(teacher)
    gram = _gram(layout, theirs) if kind == "logits" and theirs is not None else None
    started = initialize(layout, batches, BasisChoice(kind, curriculum.projection_seed, gram))
    if not task.splits_head and (head := task.output_head(student)) is not None:
        _write_pooled_head(head, theirs, started)
    return started


@torch.no_grad()
def _write_pooled_head(student: OutputHead, teacher: OutputHead | None, started: Initialized) -> None:
    """The head of a student whose pooled state is about Q^T of its teacher's: the teacher's own after Q."""
    weight = started.final_DR.cpu().double()
    if teacher is not None:
        weight = teacher.linear.weight.detach().cpu().double() @ weight
    student.linear.weight.copy_(weight)
    if student.linear.bias is not None:
        own = None if teacher is None else teacher.linear.bias
        student.linear.bias.zero_() if own is None else student.linear.bias.copy_(own)


def _reads_stream(layout: Layout, head: OutputHead | None) -> bool:
    """Whether an output head of the teacher reads the residual stream, without a layer of its own before it."""
    parts = [part for part in layout.parts if head is not None and part.teacher is head.linear]
    return bool(parts) and parts[0].rule == Linear(STREAM, SAME)


def _gram(layout: Layout, head: OutputHead) -> torch.Tensor:
    """`OutputHead.gram` with the gain of the norm before it, (D, D)."""
    norms = [part for part in layout.parts if part.block is None and isinstance(part.rule, Norm) and part.rule.readers]
    return head.gram(gain_of(norms[-1].teacher, layout.family))
