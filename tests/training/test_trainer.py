"""The trainer against plain loops and against itself: equivalences, not values."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.training.conftest import LENGTH, VOCAB, llama, token_rows
from tutelage import CurriculumTrainer, forward_to, one_shot
from tutelage.core.curriculum import Curriculum
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import NoTargets
from tutelage.training.checks import TrainingDiverged

Make = Callable[..., CurriculumTrainer]


def weights(trainer: CurriculumTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], exact: bool = True) -> None:
    assert left.keys() == right.keys()
    for name in left:
        if exact:
            assert torch.equal(left[name], right[name]), name
        else:
            torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def records(trainer: CurriculumTrainer) -> list[dict]:
    return [record for record in trainer.metrics_file.read() if "loss" in record]


def test_hidden_stage_equals_a_plain_loop(make_trainer: Make) -> None:
    """Two AdamW steps of one hidden stage, against full forwards with output_hidden_states and an explicit formula."""
    stages = (HiddenStage(2, 1, 3), OutputStage(1))
    curriculum = Curriculum("extraction", stages, normalize="standardize", projection_seed=5)
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}
    trainer = make_trainer(curriculum=curriculum, **settings)
    captured: list[dict] = []
    original = trainer.training_step

    def spy(model, inputs, num_items_in_batch=None):
        captured.append(dict(inputs))
        if trainer.state.global_step == 2:
            reference.append(weights(trainer))
        return original(model, inputs, num_items_in_batch)

    reference: list[dict] = []
    trainer.training_step = spy  # type: ignore[method-assign]
    trainer.train()

    student, teacher = llama(2, 16, seed=2), llama(4, 24, seed=1).eval()
    target_map = trainer.source.maps[0]
    assert target_map is not None
    parameters = [*student.model.embed_tokens.parameters(), *student.model.layers[0].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for batch in captured[:2]:
        ids = batch["input_ids"]
        with torch.no_grad():
            hidden = teacher(input_ids=ids, output_hidden_states=True).hidden_states[3]
            statistics = target_map.standardizer
            target = (hidden - statistics.mean) / statistics.scale @ target_map.projection.matrix()
            keep = hidden.norm(dim=-1) <= statistics.sink_norm
        state = student(input_ids=ids, output_hidden_states=True).hidden_states[1]
        loss = ((state - target) ** 2).mean(-1)[keep].sum() / ids.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_equal(reference[0], student.state_dict(), exact=False)


def test_one_shot_equals_a_plain_loop(make_trainer: Make) -> None:
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}
    trainer = make_trainer(method="one_shot", max_steps=3, label_weight=0.25, temperature=2.0, **settings)
    captured: list[dict] = []
    original = trainer.training_step
    trainer.training_step = lambda model, inputs, n=None: (  # type: ignore[method-assign]
        captured.append(dict(inputs)),
        original(model, inputs, n),
    )[1]
    trainer.train()
    student, teacher = llama(2, 16, seed=2), llama(4, 24, seed=1).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in captured:
        ids = batch["input_ids"]
        logits, labels = student(input_ids=ids).logits[:, :-1], ids[:, 1:]
        with torch.no_grad():
            log_p = (teacher(input_ids=ids).logits[:, :-1] / 2).log_softmax(-1)
        divergence = (log_p.exp() * (log_p - (logits / 2).log_softmax(-1))).sum(-1).mean() * 4
        label_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        (0.75 * divergence + 0.25 * label_loss).backward()
        optimizer.step()
    assert_equal(weights(trainer), student.state_dict(), exact=False)


def test_top_k_is_the_output_loss_of_a_run(make_trainer: Make) -> None:
    losses = {}
    for top_k in (None, 3, VOCAB):
        trainer = make_trainer(f"k{top_k}", method="one_shot", max_steps=1, top_k=top_k)
        trainer.train()
        losses[top_k] = trainer.metrics_file.read()[0]["loss"]
    assert losses[3] < losses[None]
    assert losses[VOCAB] == pytest.approx(losses[None], rel=1e-5)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        make_trainer("k0", method="one_shot", top_k=0)


def test_curriculum_of_one_output_stage_is_one_shot(make_trainer: Make) -> None:
    named = make_trainer("a", method="one_shot")
    given = make_trainer("b", curriculum=one_shot(8))
    named.train()
    given.train()
    assert_equal(weights(named), weights(given))


@pytest.mark.parametrize("settings", [{"num_stages": 1}, {"layer_map": "final:final", "warm_start": "head"}])
def test_accumulating_gradients_changes_nothing(make_trainer: Make, settings: dict) -> None:
    """Ragged rows: micro-batches hold different numbers of tokens."""
    whole = make_trainer("whole", ragged=True, per_device_train_batch_size=8, **settings)
    parts = make_trainer("parts", ragged=True, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    whole.train()
    parts.train()
    assert_equal(weights(whole), weights(parts), exact=False)
    assert whole.progress.samples == parts.progress.samples == 64
    assert whole.progress.tokens == parts.progress.tokens


@pytest.mark.parametrize("stop", [2, 4, 6])
@pytest.mark.parametrize("projection", ["gaussian", "logits"])
def test_resume_equals_uninterrupted_bit_for_bit(make_trainer: Make, stop: int, projection: str) -> None:
    """Stopped in the middle of a hidden stage, at a stage's end, and in the output stage."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop

    settings = {
        "layer_map": "1:2,final:final",
        "stage_steps": [3, 1],
        "warm_start": "head+embedding",
        "projection": projection,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 10,
        "max_steps": 14,  # more than one epoch of 12 steps
    }
    whole = make_trainer("whole", **settings)
    whole.train()
    stopped = make_trainer("stopped", callbacks=[Stop()], **settings)
    stopped.train()
    assert stopped.state.global_step == stop
    resumed = make_trainer("stopped", student=llama(2, 16, seed=77), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(whole), weights(resumed))
    untimed = [{k: v for k, v in record.items() if k != "seconds"} for record in records(whole)]
    assert untimed == [{k: v for k, v in record.items() if k != "seconds"} for record in records(resumed)]
    assert whole.progress.samples == resumed.progress.samples


def test_stages_have_their_own_parameters_optimiser_and_schedule(make_trainer: Make) -> None:
    seen: dict[int, dict] = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            index = trainer.objective.stage_index
            seen.setdefault(index, {"optimizer": trainer.optimizer, "before": weights(trainer), "rates": []})
            seen[index]["trainable"] = {n for n, p in model.named_parameters() if p.requires_grad}
            seen[index]["rates"].append(trainer._get_learning_rate())

        def on_step_end(self, args, state, control, **kwargs):
            seen[trainer.objective.stage_index]["after"] = weights(trainer)

    trainer = make_trainer(
        callbacks=[Watch()], stage_steps=[4, 4], max_steps=12, stage_learning_rate=5e-3, warmup_steps=0.5
    )
    trainer.train()
    first, second, output = (seen[index] for index in range(3))
    assert not any("layers.1" in n or "lm_head" in n or n == "model.norm.weight" for n in first["trainable"])
    assert any("layers.0" in n for n in first["trainable"])
    assert "model.embed_tokens.weight" in first["trainable"]
    assert any("layers.1" in n for n in second["trainable"])
    assert "lm_head.weight" not in second["trainable"]
    assert output["trainable"] == {n for n, _ in trainer.model.named_parameters()}
    for stage in (first, second, output):
        moved = {name for name in stage["before"] if not torch.equal(stage["before"][name], stage["after"][name])}
        assert moved == stage["trainable"]
    assert len({id(stage["optimizer"]) for stage in seen.values()}) == 3
    for stage, peak in ((first, 5e-3), (second, 5e-3), (output, 1e-2)):
        assert max(stage["rates"]) == pytest.approx(peak)
        assert stage["rates"][0] == 0.0  # warm-up starts anew
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_frozen_parameters_stay_frozen(make_trainer: Make) -> None:
    student = llama(2, 16, seed=2)
    student.model.embed_tokens.weight.requires_grad_(False)
    before = student.model.embed_tokens.weight.clone()
    trainer = make_trainer(student=student)
    trainer.train()
    assert torch.equal(before, student.model.embed_tokens.weight)
    assert not student.model.embed_tokens.weight.requires_grad


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's own
def test_an_adapter_student_trains(make_trainer: Make) -> None:
    peft = pytest.importorskip("peft")
    base = llama(2, 16, seed=2)
    student = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    trainer = make_trainer(student=student)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_teacher_is_neither_trained_nor_saved(make_trainer: Make, tmp_path: Path) -> None:
    teacher = llama(4, 24, seed=1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = make_trainer(teacher_model=teacher, save_strategy="steps", save_steps=8)
    trainer.train()
    assert_equal(before, teacher.state_dict())
    assert set(load_file(tmp_path / "run/checkpoint-8/model.safetensors")) == set(trainer.model.state_dict())
    assert not list((tmp_path / "run").rglob("training_args.bin"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-8")


def test_progressive_follows_its_checkpoints(make_trainer: Make, tmp_path: Path) -> None:
    early = llama(4, 24, seed=33)
    early.save_pretrained(tmp_path / "early")
    finished = llama(4, 24, seed=1)
    ids = token_rows(4)["input_ids"]
    seen: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(finished(input_ids=torch.tensor(ids)).logits.detach().clone())

    trainer = make_trainer(
        teacher_model=finished,
        method="progressive",
        teacher_checkpoints=[str(tmp_path / "early")],
        callbacks=[Watch()],
        max_steps=4,
    )
    expected = [model.eval()(input_ids=torch.tensor(ids)).logits for model in (early, llama(4, 24, seed=1))]
    trainer.train()
    for index, logits in enumerate(seen):
        torch.testing.assert_close(logits, expected[index // 2])


def test_scratch_needs_no_teacher_and_learns_the_labels(make_trainer: Make) -> None:
    trainer = make_trainer(method="scratch", max_steps=60)
    before = trainer.evaluate(token_rows())["eval_loss"]
    trainer.train()
    assert isinstance(trainer.source, NoTargets)
    assert trainer.evaluate(token_rows())["eval_loss"] < before - 1


def test_evaluation_equals_the_models_own_loss(make_trainer: Make) -> None:
    trainer = make_trainer(method="one_shot", eval_with_teacher=True)
    metrics = trainer.evaluate()
    ids = torch.tensor(trainer.eval_dataset["input_ids"])
    with torch.no_grad():
        out = trainer.model.eval()(input_ids=ids, labels=ids)
        assert isinstance(trainer.source, LiveTargets)
        log_p = trainer.source.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    log_q = out.logits[:, :-1].log_softmax(-1)
    assert metrics["eval_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert metrics["eval_kl"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)
    assert metrics["eval_agreement"] == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item())
    assert metrics["eval_accuracy"] == pytest.approx((log_q.argmax(-1) == ids[:, 1:]).float().mean().item())


def test_compute_metrics_sees_predictions_and_labels(make_trainer: Make) -> None:
    def compute(prediction) -> dict[str, float]:
        assert prediction.predictions.shape == (8, 12, 61)
        return {"mine": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    metrics = make_trainer(method="one_shot", compute_metrics=compute).evaluate()
    assert 0 <= metrics["eval_mine"] <= 1
    assert "eval_accuracy" in metrics


def test_nan_loss_stops_and_names_the_last_good_checkpoint(make_trainer: Make, tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                model.model.embed_tokens.weight.data.fill_(float("nan"))

    trainer = make_trainer(callbacks=[Poison()], save_strategy="steps", save_steps=2)
    with pytest.raises(TrainingDiverged, match=r"loss is nan at step 6, stage 3 \(output\); .*checkpoint-4"):
        trainer.train()
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "run/checkpoint-4/model.safetensors").values())


def test_weights_that_break_in_the_last_step_stop_the_run(make_trainer: Make) -> None:
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                kwargs["model"].lm_head.weight.grad.fill_(float("nan"))

    trainer = make_trainer(method="one_shot", max_grad_norm=0.0, callbacks=[Poison()])
    with pytest.raises(TrainingDiverged, match="a weight is not finite"):
        trainer.train()


def test_half_written_checkpoint_is_not_resumed_from(make_trainer: Make, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}
    make_trainer(**settings).train()
    newest = tmp_path / "run/checkpoint-8"
    shutil.copytree(tmp_path / "run/checkpoint-6", newest, dirs_exist_ok=True)
    (newest / "progress.json").unlink()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="not written to its end"):
        make_trainer(**settings).train(resume_from_checkpoint=str(tmp_path / "run/none"))
    assert resumed.state.global_step == 8
    steps = [record["step"] for record in records(resumed)]
    assert steps == list(range(1, 9))


def test_output_dir_of_another_run_is_refused(make_trainer: Make) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(**settings).train()
    with pytest.raises(ValueError, match=r"already contains a run\. Choose a different folder, resume the run"):
        make_trainer(**settings).train()
    with pytest.raises(ValueError, match="contains a run with a different method, stages"):
        make_trainer(method="one_shot", **settings).train(resume_from_checkpoint=True)
    make_trainer(method="one_shot", overwrite_output_dir=True).train()


def test_metrics_account_for_samples_tokens_and_flops(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(stage_steps=[2, 2])
    trainer.train()
    lines = records(trainer)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["stage"] for line in lines] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert [line["samples"] for line in lines] == [4 * step for step in range(1, 9)]
    assert [line["tokens"] for line in lines] == [48 * step for step in range(1, 9)]
    for line in lines:
        assert line["flops"] == line["student_flops"] + line["teacher_flops"]
    growth = [b["student_flops"] - a["student_flops"] for a, b in itertools.pairwise(lines)]
    assert growth[0] < growth[2] < growth[4]
    assert json.loads((tmp_path / "run/curriculum.json").read_text())["method"] == "extraction"
    # a matrix product of a block costs 2 FLOPs a weight and position forward, and twice that backward
    block = sum(p.numel() for n, p in trainer.model.model.layers[0].named_parameters() if "norm" not in n)
    assert growth[0] >= 2 * 3 * block * 48 * 0.8


def test_bf16_trains(make_trainer: Make) -> None:
    trainer = make_trainer(bf16=True, layer_map="1:2,final:final", warm_start="head")
    trainer.train()
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in trainer.model.parameters())
    assert records(trainer)[-1]["loss"] < records(trainer)[4]["loss"] * 2


def test_hidden_state_approaches_its_target(make_trainer: Make) -> None:
    trainer = make_trainer(layer_map="2:4", stage_fraction=0.9, max_steps=200, train_dataset=token_rows(16))
    trainer.train()
    hidden = [record["loss"] for record in records(trainer) if record["stage"] == 1]
    assert hidden[-1] < 0.5 * hidden[0]
    assert forward_to(trainer.model, 2, input_ids=torch.tensor([[1, 2]])).shape == (1, 2, 16)


@pytest.mark.parametrize(
    ("settings", "warm_start", "stages"),
    [
        ({}, "head", ["hidden final:final", "output"]),
        ({"layer_map": "1:2,final:final"}, "head", ["hidden 1:2", "hidden final:final", "output"]),
        ({"layer_map": "1:2"}, "none", ["hidden 1:2", "output"]),
        ({"num_stages": 1}, "none", ["hidden 2:4", "output"]),
        ({"num_stages": 1, "warm_start": "head"}, "head", ["hidden 2:4", "hidden final:final", "output"]),
        ({"warm_start": "none"}, "none", ["hidden 1:2", "hidden 2:4", "output"]),
        ({"method": "one_shot"}, "none", ["output"]),
    ],
)
def test_default_warm_start(make_trainer: Make, settings: dict, warm_start: str, stages: list[str]) -> None:
    trainer = make_trainer(**{"warm_start": None, **settings})
    assert trainer.curriculum.warm_start == warm_start
    assert [stage.name for stage in trainer.curriculum.stages] == stages


@pytest.mark.parametrize("settings", [{"normalize": "none"}, {}, {"warm_start": "head"}, {"projection": "logits"}])
def test_every_pass_of_the_teacher_is_charged(
    make_trainer: Callable[..., CurriculumTrainer], monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    """Calibration (two passes; without statistics one batch, for the width), training, and the pass before a transplant."""
    seen: list[int] = []

    def counting(method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            seen.append(len(arguments[-1]["input_ids"]))
            return method(*arguments)

        return counted

    trainer = make_trainer(layer_map="final:final", calibration_samples=16, max_steps=4, ragged=False, **settings)
    monkeypatch.setattr(LiveTargets, "states", counting(LiveTargets.states))
    monkeypatch.setattr(LiveTargets, "output", counting(LiveTargets.output))
    trainer.train()
    rows = sum(seen) - 2 * 2  # less an example of each stage that is measured: with the student, and the teacher alone
    costs = trainer.transition.costs
    # both stages run the teacher to its final state; the output stage also runs its head
    head = (costs[1].teacher_flops - costs[0].teacher_flops) * 2 * 4 * LENGTH
    assert trainer.progress.teacher_flops == pytest.approx(costs[0].teacher_flops * rows * LENGTH + head)
