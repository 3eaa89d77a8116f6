"""Evaluating a finished model from the outside.

Public names: `evaluate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.runs.settings import sequence_length
from tutelage.targets.live import LiveTeacher
from tutelage.tasks.base import backbone, detect_task, get_task, load_task_model
from tutelage.tasks.loading import load_config, load_tokenizer
from tutelage.tasks.text import make_collator, read_dataset, tokenize
from tutelage.training.checks import check_tokenizers, shared_outputs
from tutelage.training.evaluation import evaluate_batches


def evaluate(
    model: str,
    dataset: str,
    teacher: str | None = None,
    *,
    task: str | None = None,
    split: str | None = None,
    text_column: str = "text",
    max_length: int | None = None,
    max_samples: int | None = None,
    batch_size: int = 16,
    mlm_probability: float = 0.3,
    blocks: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Metrics of a saved model on a dataset; see `tutelage.training.evaluation.evaluate_batches`.

    Args:
        model, teacher: folders or Hub names.
        dataset: Hub name, `datasets` folder, or file.
        max_length: tokens a sequence; None is the model's positions, at most 256.
        max_samples: evaluate on the first so many sequences.
        blocks: dotted name of the teacher's list of blocks, where several are found.
        trust_remote_code: run model code that comes with a checkpoint.
    """
    config = load_config(model, what="model", trust_remote_code=trust_remote_code)
    kind = get_task(task) if task else detect_task(model)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise UserError(f"model {model!r} has no tokenizer in its folder: save one there")
    if teacher is not None:
        check_tokenizers(tokenizer, load_tokenizer(teacher, trust_remote_code=trust_remote_code))
    elif kind.name == "embedding":
        raise UserError("an embedding model is measured against its teacher: name one with --teacher")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = load_task_model(kind, model, what="model", trust_remote_code=trust_remote_code).to(device)
    source, outputs = None, None
    if teacher is not None:
        teacher_model = load_task_model(kind, teacher, trust_remote_code=trust_remote_code).to(device)
        source = LiveTeacher(teacher_model, backbone(teacher_model), blocks)
        if not kind.whole:
            outputs = shared_outputs(student, OutputHead.of(teacher_model).linear.out_features, kind, tokenizer)
    data = read_dataset(dataset, split)
    if isinstance(data, dict):
        held_out = [data[name] for name in ("test", "validation", "eval") if name in data]
        data = (held_out or list(data.values()))[0]
    length = sequence_length(max_length, [config], tokenizer, data)
    rows = tokenize(data, tokenizer, kind, length, text_column)
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))
    collator = make_collator(kind, tokenizer, mlm_probability)
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collator)
    batches = ({key: value.to(device) for key, value in batch.items()} for batch in loader)
    metrics = evaluate_batches(student, batches, kind, source, outputs=outputs)
    return {"model": model, "dataset": dataset, "teacher": teacher, "sequences": len(rows), **metrics}
