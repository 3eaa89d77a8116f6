"""Joint stages: hidden losses and output loss in one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from tests.training.conftest import VOCAB, batches_of, llama, token_rows
from tests.training.test_datasets import RECOMPUTING
from tutelage import CurriculumTrainer
from tutelage.core.curriculum import joint
from tutelage.core.forward import forward_to
from tutelage.core.losses import embedding_loss
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import StatisticsFile
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.language import CausalCollator
from tutelage.tasks.parity import ParityMLP, ParityMLPConfig
from tutelage.tasks.registry import get_task
from tutelage.training.feed import StageFeed
from tutelage.training.objective import StageObjective

Make = Callable[..., CurriculumTrainer]
PLAIN = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}


def weights(trainer: CurriculumTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(left: dict[str, Any], right: dict[str, Any], exact: bool = True) -> None:
    tolerances = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], **tolerances, msg=lambda m, n=name: f"{n}: {m}")


def bert_sizes(layers: int, width: int) -> BertConfig:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(
        vocab_size=VOCAB, num_attention_heads=2, max_position_embeddings=32, num_labels=3, **sizes, **dropouts
    )


def objective_of(student: torch.nn.Module, teacher: torch.nn.Module, batch: dict[str, Any], **fields: Any) -> Any:
    """An objective in its joint stage, calibrated on one batch."""
    source = LiveTargets(teacher)
    source.attach(joint(2, 4, 5, **fields), student)
    source.prepare(StatisticsFile(Path("unused"), read=False, write=False), lambda: [batch], "cpu")
    return StageObjective(student, source)


def hidden_of(objective: Any, batch: dict[str, Any], number: int, state: torch.Tensor) -> torch.Tensor:
    """The mean hidden loss of a pair, by its formula."""
    source = objective.source
    pair, target_map = source.curriculum.hidden_stages[number], source.maps[number]
    hidden = source.stage_states(pair, batch)
    statistics = target_map.standardizer
    target = (hidden - statistics.mean) / statistics.scale @ target_map.projection.matrix()
    keep = hidden.norm(dim=-1) <= statistics.sink_norm
    mask = torch.ones_like(keep) if keep.dim() == 1 else batch.get("attention_mask", torch.ones_like(keep)).bool()
    return ((state - target) ** 2).mean(-1)[keep & mask].sum() / mask.sum()


def test_joint_without_hidden_weight_is_one_shot_bit_for_bit(make_trainer: Make) -> None:
    together = make_trainer("joint", method="joint", hidden_weight=0.0, label_weight=0.25, ragged=True)
    output = make_trainer("one_shot", method="one_shot", label_weight=0.25, ragged=True)
    together.train()
    output.train()
    assert_equal(weights(together), weights(output))


def test_logs_tell_the_parts_of_a_joint_loss(make_trainer: Make) -> None:
    """Means over the steps since the last log; an evaluation between them takes nothing away."""
    settings = {"method": "joint", "hidden_weight": 0.5, "gradient_accumulation_steps": 2, "ragged": True}
    often = make_trainer("often", max_steps=4, logging_steps=1, **settings)
    seldom = make_trainer("seldom", max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=1, **settings)
    logs = []
    for trainer in (often, seldom):
        trainer.train()
        logs.append([line for line in trainer.metrics_file.read() if "loss" in line])
    for line in logs[0] + logs[1]:
        assert line["loss"] == pytest.approx(line["output_loss"] + 0.5 * line["hidden_loss"], rel=1e-3)
    for name in ("output_loss", "hidden_loss"):
        single = [line[name] for line in logs[0]]
        assert len(single) == 4
        assert [line[name] for line in logs[1]] == pytest.approx([sum(single[:2]) / 2, sum(single[2:]) / 2], rel=1e-4)


def test_joint_equals_a_plain_loop(make_trainer: Make) -> None:
    """Two AdamW steps against full forwards with output_hidden_states and explicit formulas."""
    settings = {"method": "joint", "max_steps": 2, "layer_map": "1:2,final:final", "hidden_weight": 0.5, **PLAIN}
    trainer = make_trainer(label_weight=0.25, temperature=2.0, **settings)
    captured = batches_of(trainer)
    student, teacher = llama(2, 16, seed=2), llama(4, 24, seed=1).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in captured:
        ids = batch["input_ids"]
        with torch.no_grad():
            log_p = (teacher(input_ids=ids).logits[:, :-1] / 2).log_softmax(-1)
        output = student(input_ids=ids, output_hidden_states=True)
        logits, labels = output.logits[:, :-1], ids[:, 1:]
        divergence = (log_p.exp() * (log_p - (logits / 2).log_softmax(-1))).sum(-1).mean() * 4
        label_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        # the last entry of a Llama's hidden states is after its final norm
        hidden = [hidden_of(trainer.objective, batch, n, output.hidden_states[n + 1]) for n in (0, 1)]
        optimizer.zero_grad()
        (0.75 * divergence + 0.25 * label_loss + 0.5 * (hidden[0] + hidden[1]) / 2).backward()
        optimizer.step()
    assert_equal(weights(trainer), student.state_dict(), exact=False)


def test_the_joint_loss_of_a_classifier_has_its_pooled_state() -> None:
    torch.manual_seed(0)
    student, teacher = (BertForSequenceClassification(bert_sizes(*size)) for size in ((2, 16), (4, 24)))
    batch = {"input_ids": torch.randint(1, VOCAB, (4, 9)), "labels": torch.tensor([0, 1, 2, 0])}
    batch["attention_mask"] = (torch.arange(9) < torch.tensor([9, 5, 7, 9])[:, None]).long()
    objective = objective_of(student, teacher, batch, layer_map=[(1, 2), ("final", "final")])
    assert objective.count_items(batch).tolist() == [4, 30, 4]
    loss = objective(**batch)["loss"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    output = student(**inputs, output_hidden_states=True)
    with torch.no_grad():
        log_p = teacher(**inputs).logits.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - output.logits.log_softmax(-1))).sum(-1).mean()
    states = output.hidden_states[1], student.bert(**inputs).pooler_output
    hidden = [hidden_of(objective, batch, number, state) for number, state in enumerate(states)]
    torch.testing.assert_close(loss, divergence + 3 * sum(hidden) / 2)


def test_the_joint_loss_of_a_sentence_encoder_has_its_states_before_pooling() -> None:
    torch.manual_seed(0)
    student = EmbeddingModel(BertModel(bert_sizes(2, 16)), embedding_size=24)
    teacher = EmbeddingModel(BertModel(bert_sizes(4, 24)))
    batch = {"input_ids": torch.randint(1, VOCAB, (4, 9))}
    batch["attention_mask"] = (torch.arange(9) < torch.tensor([9, 5, 7, 9])[:, None]).long()
    objective = objective_of(student, teacher, batch, layer_map=[(2, 4), ("final", "final")])
    assert objective.count_items(batch).tolist() == [4, 30, 30]
    state = student.encoder(**batch).last_hidden_state
    with torch.no_grad():
        expected = teacher(**batch)
    hidden = [hidden_of(objective, batch, number, state) for number in (0, 1)]
    output = embedding_loss(student(**batch), expected) / 4
    torch.testing.assert_close(objective(**batch)["loss"], output + 3 * sum(hidden) / 2)


@pytest.mark.parametrize("hidden_weight", [1.0, 30.0])
def test_accumulating_gradients_changes_nothing(make_trainer: Make, hidden_weight: float) -> None:
    """Ragged rows: micro-batches hold different numbers of tokens, and each loss has a count of its own."""
    settings = {"method": "joint", "hidden_weight": hidden_weight, "ragged": True, "optim": "sgd", "max_steps": 3}
    whole = make_trainer("whole", per_device_train_batch_size=8, **settings)
    parts = make_trainer("parts", per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    whole.train()
    parts.train()
    assert_equal(weights(whole), weights(parts), exact=False)


def test_recomputing_blocks_changes_nothing(make_trainer: Make) -> None:
    plain = make_trainer("plain", method="joint", max_steps=2)
    recomputing = make_trainer("recomputing", method="joint", max_steps=2, **{RECOMPUTING: True})
    plain.train()
    recomputing.train()
    assert_equal(weights(plain), weights(recomputing), exact=False)


def test_a_joint_stage_resumes_where_it_was(make_trainer: Make, tmp_path: Path) -> None:
    settings = {"method": "joint", "layer_map": "1:2,final:final", "projection": "pca", "calibration_samples": 48}
    whole = make_trainer("whole", save_strategy="steps", save_steps=3, save_total_limit=5, **settings)
    whole.train()
    again = make_trainer("whole", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_equal(weights(whole), weights(again))


def test_a_step_runs_student_and_teacher_once(make_trainer: Make) -> None:
    trainer = make_trainer(method="joint", layer_map="1:2,2:3,final:final", max_steps=1)
    trainer.train()
    calls = {"student": 0, "teacher": 0}
    for name, model in (("student", trainer.model), ("teacher", trainer.source.models[0])):
        for block in model.model.layers:
            block.register_forward_hook(lambda *_, n=name: calls.__setitem__(n, calls[n] + 1))
    trainer.objective(**CausalCollator()(list(token_rows(2))))
    assert calls == {"student": 2, "teacher": 4}
    reached = trainer.transition.costs[0].reached
    assert reached == trainer.transition.trainable == {name for name, _ in trainer.model.named_parameters()}


def test_flops_are_those_of_one_shot_and_the_projections(make_trainer: Make) -> None:
    """A step has no second forward; the calibration of each pair is counted up to its place."""
    costs = {}
    for method in ("joint", "one_shot"):
        trainer = make_trainer(method, method=method, max_steps=1)
        trainer.train()
        costs[method] = trainer.transition.costs[0]
    assert costs["joint"].student_flops == costs["one_shot"].student_flops
    projections = 2 * 24 * 16 * 2  # multiplications and additions of two pairs, at a position
    assert costs["joint"].teacher_flops == costs["one_shot"].teacher_flops + projections
    feed: StageFeed = trainer.feed
    together = make_trainer("more", method="joint", max_steps=1)
    together.train()
    _, setup = together.transition.setup_flops(feed, begins=True)
    # twice over 16 examples of 12 tokens: at most twice the whole teacher for each of two places
    assert 0 < setup < 2 * 2 * 16 * 12 * costs["one_shot"].teacher_flops


@pytest.mark.parametrize("viewed", [False, True])
def test_watched_states_are_those_of_truncated_forwards(viewed: bool) -> None:
    batch = {"input_ids": torch.randint(1, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))}
    for model, task in ((llama(2, 16, seed=0), "causal_lm"), (ParityMLP(ParityMLPConfig(6, 8)), "classification")):
        source = LiveTargets(model, get_task(task))
        given = {"input_ids": batch["input_ids"] % 2} if task == "classification" else batch
        places = [*range(1, len(source.block_names) + 1), "final"]
        if viewed:
            for place in places:
                source.task.make_view(model, place, given)
        with source.task.watched(model, places) as states:
            source.output(given)
        assert set(states) == set(places)
        for place, state in states.items():
            torch.testing.assert_close(state, forward_to(model, place, **given), rtol=0, atol=0)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_hidden_weight_is_not_negative(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="hidden_weight must be a number from 0 up"):
        make_trainer(method="joint", hidden_weight=-1.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks
@pytest.mark.parametrize("projection", ["gaussian", "learned"])
def test_a_compiled_joint_step_has_the_loss_and_gradients_of_the_plain_one(projection: str) -> None:
    batch = CausalCollator()(list(token_rows(2)))
    objective = objective_of(llama(2, 16, seed=2), llama(4, 24, seed=1), batch, projection=projection)
    torch._dynamo.reset()
    found = []
    for run in (objective, torch.compile(objective, backend="eager")):
        objective.zero_grad(set_to_none=True)
        loss = run(**batch)["loss"]
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in objective.parameters())])
    torch.testing.assert_close(*found)


def test_a_joint_stage_learns_from_labels_and_hidden_states_alone(make_trainer: Make) -> None:
    trainer = make_trainer(method="joint", label_weight=1.0, max_steps=2)
    trainer.train()
    plain = make_trainer("plain", method="joint", label_weight=0.5, max_steps=2)
    plain.train()
    assert trainer.transition.costs[0].teacher_flops < plain.transition.costs[0].teacher_flops
