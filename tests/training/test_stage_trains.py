"""What trains in a hidden stage: everything up to its place, or what is new since the stage before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertModel, TrainerCallback

from tests.conftest import bert_config
from tests.training.conftest import llama
from tutelage import CurriculumConfig, CurriculumTrainer, RunOptions, distill, extract, plan
from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError
from tutelage.tasks.embedding import EmbeddingModel

Make = Callable[..., CurriculumTrainer]
MAP = "1:1,3:3,final:final"


def named(model: torch.nn.Module, *prefixes: str) -> set[str]:
    """The parameters whose names begin with one of these."""
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


class Watch(TrainerCallback):
    """Which parameters train in each stage, and which of them move."""

    def __init__(self) -> None:
        self.trainable: dict[int, set[str]] = {}
        self.moved: dict[int, set[str]] = {}
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = {name: value.detach().clone() for name, value in model.named_parameters()}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        index = self.trainer.objective.stage_index
        self.trainable[index] = {name for name, value in model.named_parameters() if value.requires_grad}
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, self.before[name])}
        self.moved[index] = self.moved.get(index, set()) | moved


def test_a_stage_trains_only_what_is_new_since_the_stage_before(make_trainer: Make) -> None:
    watch, student = Watch(), llama(4, 16, seed=2)
    watch.trainer = trainer = make_trainer(
        student=student, layer_map=MAP, stage_trains="new", stage_steps=[2, 2, 2], callbacks=[watch]
    )
    trainer.train()
    expected = {
        0: named(student, "model.embed_tokens", "model.layers.0"),
        1: named(student, "model.layers.1", "model.layers.2"),
        2: named(student, "model.layers.3", "model.norm"),
        3: named(student, ""),
    }
    assert watch.trainable == watch.moved == expected
    assert Curriculum.from_json((trainer.folder / "curriculum.json").read_text()).stage_trains == "new"


def test_by_default_a_stage_trains_everything_up_to_its_place(make_trainer: Make) -> None:
    watch, student = Watch(), llama(4, 16, seed=2)
    watch.trainer = trainer = make_trainer(student=student, layer_map=MAP, stage_steps=[2, 2, 2], callbacks=[watch])
    trainer.train()
    assert trainer.curriculum.stage_trains == "up_to"
    assert watch.moved[1] == named(student, "model.embed_tokens", *(f"model.layers.{block}" for block in range(3)))
    assert watch.moved[2] == named(student, "model.")


def test_a_stage_of_a_sentence_encoder_trains_only_what_is_new(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = EmbeddingModel(BertModel(bert_config()))
    student = EmbeddingModel(BertModel(bert_config(hidden_size=16)), embedding_size=32)
    watch, rows = Watch(), Dataset.from_dict({"input_ids": [[2, 7 + index, 9, 3] for index in range(16)]})
    args = CurriculumConfig(
        str(tmp_path / "run"),
        layer_map="2:2,4:4",
        stage_trains="new",
        max_steps=6,
        stage_steps=[2],
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    watch.trainer = trainer = CurriculumTrainer(student, teacher, args, rows, callbacks=[watch])
    trainer.train()
    layers = [f"encoder.encoder.layer.{block}" for block in range(4)]
    assert watch.trainable[0] == named(student, "encoder.embeddings", *layers[:2])
    assert watch.trainable[1] == named(student, *layers[2:])
    assert watch.trainable[2] == named(student, "encoder.embeddings", *layers, "head")


def test_a_stage_of_new_parameters_costs_their_backward_alone(make_trainer: Make) -> None:
    trainers = {}
    for trains in ("up_to", "new"):
        trainers[trains] = make_trainer(trains, student=llama(4, 16, seed=2), layer_map=MAP, stage_trains=trains)
        trainers[trains].train()
    full, new = ([t.transition.costs[index].student_flops for index in range(4)] for t in trainers.values())
    assert (new[0], new[3]) == (full[0], full[3])
    block = full[1] / 9  # a forward through one of 3 blocks; the backward costs twice as much
    expected = ((3 + 2 * 2) * block, (4 + 2 * 1) * block)
    assert (new[1], new[2]) == pytest.approx(expected, rel=1e-3)  # rotary frequencies have no backward
    assert trainers["new"].progress.student_flops < trainers["up_to"].progress.student_flops
    assert trainers["new"].progress.teacher_flops == trainers["up_to"].progress.teacher_flops


def test_a_plan_prices_the_stages_as_they_are_trained(causal_teacher: Path) -> None:
    plans = {}
    for trains in ("up_to", "new"):
        named_teacher = {"teacher_model_name_or_path": str(causal_teacher), "use_cpu": True}
        args = CurriculumConfig(method="extraction", num_stages=2, stage_trains=trains, max_steps=8, **named_teacher)
        plans[trains] = plan(RunOptions(student="layers=2", max_length=16), args)
    (first, second, output), (new_first, new_second, new_output) = (p.stages for p in plans.values())
    assert (first, output) == (new_first, new_output)
    assert new_second.student_flops_per_token < second.student_flops_per_token
    assert new_second.teacher_flops_per_token == second.teacher_flops_per_token
    assert plans["new"].flops < plans["up_to"].flops


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_of_new_parameters_equals_an_uninterrupted_one(make_trainer: Make, stop: int) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop

    settings = {"layer_map": "1:2,final:final", "stage_trains": "new", "stage_steps": [2, 2], "warm_start": "head"}
    settings |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 7}
    whole = make_trainer("whole", **settings)
    whole.train()
    make_trainer("stopped", callbacks=[Stop()], **settings).train()
    resumed = make_trainer("stopped", student=llama(2, 16, seed=77), **settings)
    resumed.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert whole.progress.student_flops == resumed.progress.student_flops
    with pytest.raises(UserError, match="contains a run with a different stage_trains"):
        make_trainer("stopped", **{**settings, "stage_trains": "up_to"}).train(resume_from_checkpoint=True)


def test_a_stage_with_nothing_new_is_refused_before_the_first_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, student = (EmbeddingModel(BertModel(bert_config(num_hidden_layers=n))) for n in (4, 2))
    rows = Dataset.from_dict({"input_ids": [[2, 7, 9, 3]] * 16})
    fields: Any = {"layer_map": "2:4,final:final", "stage_trains": "new", "warm_start": "none", "use_cpu": True}
    args = CurriculumConfig(str(tmp_path / "run"), max_steps=6, report_to="none", disable_tqdm=True, **fields)
    trainer = CurriculumTrainer(student, teacher, args, rows)
    with pytest.raises(UserError, match=r"stage 2 \(hidden final:final\) would train nothing: the stage before it"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_unknown_choice_is_refused(make_trainer: Make) -> None:
    with pytest.raises(UserError, match="unknown stage_trains 'all': use one of up_to, new"):
        make_trainer(num_stages=2, stage_trains="all")


def test_a_run_from_an_extracted_curriculum_trains_as_it_was_extracted_for(
    causal_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    fields: Any = {"max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
    options = RunOptions(student="layers=2,hidden_size=16", dataset=str(corpus / "text.jsonl"), max_length=16)
    made = CurriculumConfig(
        str(tmp_path / "made"),
        teacher_model_name_or_path=str(causal_teacher),
        num_stages=2,
        stage_trains="new",
        **fields,
    )
    extract(options, made, log=lambda line: None)
    for given, expected in ((None, "new"), ("up_to", "up_to")):
        folder = tmp_path / f"run-{given}"
        args = CurriculumConfig(str(folder), curriculum_dir=str(tmp_path / "made"), stage_trains=given, **fields)
        distill(None, args)
        assert Curriculum.from_json((folder / "curriculum.json").read_text()).stage_trains == expected
