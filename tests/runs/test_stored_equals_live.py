"""Training from an extracted curriculum gives the student that the teacher itself gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.runs.conftest import STUDENT, settings, texts, train
from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum
from tutelage.runs.distill import distill
from tutelage.runs.inputs import RunOptions
from tutelage.training.records import MetricsFile

STARTS = {"student_init": "teacher"}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """A student's weights by name; transformers 5.3 gives the norms of a BERT that it has loaded their old names."""
    found = load_file(next(folder.glob("**/model.safetensors")))
    new = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for old, name in new.items():
        found = {key.replace(old, name): value for key, value in found.items()}
    return found


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("causal_lm", {}),
        ("causal_lm", {"layer_map": "1:2,2:4", "normalize": "none", "data_seed": 5}),
        ("causal_lm", {"layer_map": "1:1,final:final", "projection": "logits", "gradient_accumulation_steps": 2}),
        ("causal_lm", {"method": "one_shot", "temperature": 2.0, "max_steps": 40}),
        ("causal_lm", {"method": "joint", "layer_map": "1:2,final:final", "gradient_accumulation_steps": 2}),
        ("masked_lm", {}),
        ("sequence_classification", {}),
        ("sequence_classification", {"layer_map": "final:final"}),
        ("embedding", {}),
        ("sequence_classification", {"method": "joint", "layer_map": "1:2,final:final"}),
        ("embedding", {"layer_map": "1:2,2:4"}),
        ("embedding", {"method": "joint"}),
        ("causal_lm", {"method": "extraction", "layer_map": "1:2,final:final", **STARTS}),
        ("causal_lm", {"method": "joint", **STARTS}),
        ("causal_lm", {"method": "one_shot", **STARTS}),
        ("embedding", {"method": "joint", **STARTS}),
    ],
)
def test_a_student_from_disk_equals_the_student_from_the_teacher(
    teachers: dict[str, Path],
    corpus: Path,
    extracted: Callable[..., Path],
    tmp_path: Path,
    task: str,
    fields: dict[str, Any],
) -> None:
    """Float32 on the CPU, bit for bit, in the order that the trainer's own sampler draws, over several epochs."""
    # several epochs are the same where an epoch ends with a whole batch
    run = {"eval_dataset": str(corpus / "text.txt"), "max_length": 12} if fields.get("max_steps") == 40 else {}
    folder = extracted(teacher=teachers[task], run=run, **fields)
    top_k = {} if task == "embedding" else {"top_k": 64}
    live = train(tmp_path / "live", None, texts(corpus, **run), teacher=teachers[task], **fields, **top_k)
    unset = {"max_steps": -1} if "max_steps" not in fields else {}
    stored = train(tmp_path / "stored", folder, RunOptions(student=STUDENT), **{**fields, **unset})
    one, two = (weights_in(tmp_path / name) for name in ("live", "stored"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
    assert stored.budget.teacher_flops == 0 < live.budget.teacher_flops
    # an encoder's held-out embeddings were made row by row, not in the batches of the evaluation; its loss is 1 - cosine, which
    # is rounded as numbers near 1 are
    rounding = torch.finfo(torch.float32).eps if task == "embedding" else 0
    assert stored.student.metrics["loss"] == pytest.approx(live.student.metrics["loss"], rel=0, abs=rounding)
    logs = [
        [record["loss"] for record in MetricsFile(tmp_path / name / "metrics.jsonl").read() if "loss" in record]
        for name in ("live", "stored")
    ]
    assert logs[0] == logs[1]


def test_a_run_from_disk_resumes_in_the_middle_of_a_stage(extracted: Callable[..., Path], tmp_path: Path) -> None:
    folder = extracted()
    train(tmp_path / "whole", folder)
    train(tmp_path / "cut", folder, save_strategy="steps", save_steps=3)
    for checkpoint in (tmp_path / "cut").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-6":
            shutil.rmtree(checkpoint)
    train(tmp_path / "cut", folder, save_strategy="steps", save_steps=3, resume_from_checkpoint="true")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_labels_of_the_data_are_stored(extracted: Callable[..., Path], causal_teacher: Path, tmp_path: Path) -> None:
    """Prompts that are not learnt from, in rows of different lengths."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(6, 20, size=length).tolist() for length in (16, 12, 9, 16) * 8]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}).save_to_disk(tmp_path / "data")
    run = {"dataset": str(tmp_path / "data"), "eval_dataset": str(tmp_path / "data"), "max_samples": 8}
    folder = extracted(run=run)
    live = train(tmp_path / "live", None, RunOptions(student=STUDENT, **run), teacher=causal_teacher, top_k=64)
    stored = train(tmp_path / "stored", folder)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "stored"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert stored.student.metrics["loss"] == live.student.metrics["loss"]


def test_the_batch_size_of_the_extraction_is_the_default(extracted: Callable[..., Path], tmp_path: Path) -> None:
    args = settings(tmp_path / "S", None, curriculum_dir=str(extracted()), max_steps=-1)
    args.per_device_train_batch_size = None
    result = distill(RunOptions(student=STUDENT), args)
    assert args.per_device_train_batch_size is None  # settings stay as they were given
    assert (result.budget.steps, result.budget.samples) == (8, 8 * 4)


def test_a_different_student_reads_a_subset_of_the_stages(extracted: Callable[..., Path], tmp_path: Path) -> None:
    folder = extracted(layer_map="1:1,2:2,final:final", warm_start="none", projection_dim=32)
    deep = train(tmp_path / "deep", folder, RunOptions(student="layers=4,hidden_size=32"), layer_map="2:1,final:final")
    curriculum = Curriculum.from_json((tmp_path / "deep" / "curriculum.json").read_text())
    assert [(s.student_place, s.teacher_place) for s in curriculum.stages[:-1]] == [(2, 1), (FINAL, FINAL)]
    assert deep.budget.steps == 8
    shallow = train(tmp_path / "shallow", folder, RunOptions(student="layers=1,hidden_size=16"), layer_map="1:2")
    assert shallow.budget.teacher_flops == 0
    output = train(tmp_path / "output", folder, method="one_shot", max_steps=3)
    assert output.method == "one_shot"


def test_a_joint_curriculum_serves_subsets_narrow_students_and_one_shot(
    extracted: Callable[..., Path], tmp_path: Path
) -> None:
    folder = extracted(method="joint", layer_map="1:1,2:3,final:final", projection_dim=32, dtype="int8")
    whole = train(tmp_path / "whole", folder, method="joint", max_steps=-1)
    assert (whole.budget.steps, whole.budget.teacher_flops) == (8, 0)
    made = Curriculum.from_json((tmp_path / "whole" / "curriculum.json").read_text())
    assert made.stages[0].name == "joint 1:1,2:3,final:final"
    part = train(tmp_path / "part", folder, method="joint", layer_map="2:3,final:final", max_steps=3)
    assert part.budget.steps == 3
    output = train(tmp_path / "output", folder, method="one_shot", max_steps=-1)
    assert (output.method, output.budget.steps) == ("one_shot", 8)
    with pytest.raises(ValueError, match=r"the stage 'joint 1:2': it has teacher places 1 \+ 3 \+ final \+ output;"):
        train(tmp_path / "other", folder, method="joint", layer_map="1:2", max_steps=3)


def test_places_of_a_joint_curriculum_can_be_chosen_before_a_student_is(
    extracted: Callable[..., Path], tmp_path: Path
) -> None:
    stored = {"stages": ["1", "3", "final"], "projection_dim": 16, "run": {"student": None}}
    folder = extracted(method="joint", **stored)
    result = train(tmp_path / "student", folder, method="joint", max_steps=3)
    made = Curriculum.from_json((tmp_path / "student" / "curriculum.json").read_text())
    assert made.stages[0].name == "joint 1:1,2:3,final:final"
    assert result.budget.teacher_flops == 0


def test_a_curriculum_of_hidden_stages_does_not_serve_joint(extracted: Callable[..., Path], tmp_path: Path) -> None:
    folder = extracted(layer_map="1:1,2:2")
    with pytest.raises(ValueError, match="does not hold the stage 'joint 1:2,2:4': it has teacher places 1, 2, output"):
        train(tmp_path / "student", folder, method="joint")
