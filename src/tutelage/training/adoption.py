"""Settings of a run that trains from an extracted curriculum.

Public names: `adopt`, `check_given`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tutelage.core.blocks import FINAL
from tutelage.core.errors import UserError
from tutelage.targets.extracted import ExtractedCurriculum
from tutelage.targets.identity import data_fingerprint, model_hash, tokenizer_hash
from tutelage.tasks.base import get_task, load_task_model
from tutelage.training.checks import check_tokenizers
from tutelage.training.config import CurriculumConfig


def adopt(args: CurriculumConfig, stored: ExtractedCurriculum, student_blocks: int) -> None:
    """Take the extraction's settings where the run has said nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(CurriculumConfig)}
    curriculum = stored.curriculum
    for name in ("projection", "projection_seed", "normalize", "temperature", "top_k"):
        if getattr(args, name) == defaults[name]:
            setattr(args, name, getattr(curriculum, name))
    hidden = curriculum.hidden_stages
    same_stages = args.layer_map is None and args.num_stages is None
    pairs = stored.layer_map(student_blocks) if args.method == "extraction" and same_stages else []
    if pairs:
        args.layer_map = ",".join(f"{s}:{t}" for s, t in pairs)
    if args.warm_start is None:
        ends_at_head = args.layer_map is not None and args.layer_map.endswith(f"{FINAL}:{FINAL}")
        args.warm_start = curriculum.warm_start if ends_at_head else "none"
    devices = args.gradient_accumulation_steps * args.world_size
    if args.per_device_train_batch_size == defaults["per_device_train_batch_size"]:
        size, rest = divmod(stored.identity["step_examples"], devices)
        if not rest:  # as many examples a step as were counted when the data was divided
            args.per_device_train_batch_size = size
    if args.max_steps <= 0:
        read = {theirs for _, theirs in pairs}
        left_out = [stage for stage in hidden if pairs and stage.teacher_place not in read]
        args.max_steps = curriculum.total_steps - sum(stage.steps for stage in left_out)
        if pairs and args.stage_steps is None and args.stage_fraction == defaults["stage_fraction"]:
            args.stage_steps = [stage.steps for stage in hidden if stage not in left_out]


def check_given(
    stored: ExtractedCurriculum,
    teacher: nn.Module | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any,
    args: CurriculumConfig,
) -> None:
    """Refuse a teacher, tokenizer or data that the curriculum was not extracted from; nothing is checked that is not given.

    Raises:
        UserError: another one, or a method or a task that the curriculum cannot serve.
    """
    identity, where = stored.identity, f"the curriculum in {str(stored.store)!r}"
    if args.method not in ("extraction", "one_shot"):
        raise UserError(f"method {args.method!r} does not train from a curriculum on disk: leave curriculum_dir out")
    if args.task not in (None, identity["task"]):
        raise UserError(f"{where} is for task {identity['task']}, not {args.task}")
    if tokenizer is not None and tokenizer_hash(tokenizer) != identity["tokenizer"]:
        check_tokenizers(tokenizer, stored.tokenizer)  # says in which entry
        raise UserError(f"{where} was extracted with another tokenizer: use the one in its folder")
    if isinstance(teacher, str):
        teacher = load_task_model(get_task(identity["task"]), teacher, **args.teacher_loading())
    if teacher is not None and model_hash(teacher) != identity["teacher"]["hash"]:
        raise UserError(
            f"{where} was extracted from another teacher ({identity['teacher']['name']}), or from this one loaded otherwise "
            f"(it was held in {identity['teacher']['dtype']}): leave the teacher out, or extract again"
        )
    if dataset is not None and data_fingerprint(dataset) != identity["data"]["fingerprint"]:
        streamed = ", of which a stream's first rows were read" if identity["data"]["streamed"] else ""
        raise UserError(
            f"{where} was extracted from other data ({identity['data']['name']}, {identity['data']['rows']:,} rows{streamed}): "
            "leave the dataset out, it is in the curriculum, or extract again"
        )
