"""Stages under `torch.compile`."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, XGLMConfig, XGLMForCausalLM

from tests.launch import launch
from tests.training.conftest import VOCAB, llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.curriculum import extraction
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import StatisticsFile
from tutelage.tasks.language import CausalCollator
from tutelage.training.compilation import whole_graphs
from tutelage.training.feed import StageFeed
from tutelage.training.objective import StageObjective
from tutelage.training.records import MetricsFile
from tutelage.training.transition import StageTransition

STAGES = (0, 1, 2)  # hidden 1:2, hidden final:final, output
COMPILES: Any = SimpleNamespace(state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.EAGER)))


def bert(layers: int, width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32}
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB, num_attention_heads=2, **sizes, **settings))


def gpt2(layers: int, width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": None}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, **ends, **dropouts))


def staged(student: nn.Module, teacher: nn.Module) -> tuple[StageObjective, StageTransition, StageFeed]:
    """An objective with its views made, as a trainer has it."""
    source = LiveTargets(teacher)
    places = [(1, 2), ("final", "final")]
    source.attach(extraction(2, 4, 6, layer_map=places, stage_steps=[2, 2]), student)
    objective = StageObjective(student, source)
    feed = StageFeed(source, token_rows(8, ragged=True), CausalCollator(), 8, 4)
    source.prepare(StatisticsFile(Path("unused"), read=False, write=False), feed.calibration, "cpu")
    transition = StageTransition(objective)
    transition.make_views(feed)
    return objective, transition, feed


def gradients(objective: StageObjective, run: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, list[Any]]:
    objective.zero_grad(set_to_none=True)
    loss = run(num_items=torch.tensor(3.0), **batch)["loss"]
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in objective.parameters()]


@pytest.mark.parametrize("build", [llama, bert, gpt2])
def test_every_stage_is_one_graph_with_the_loss_and_gradients_of_the_plain_step(build: Any) -> None:
    objective, transition, feed = staged(build(2, 16, 2), build(4, 24, 1))
    batch = CausalCollator()(list(token_rows(4, ragged=True)))
    torch._dynamo.reset()
    for index in STAGES:
        transition.enter(index, False, feed)
        transition.set_trainable(transition.trainable)
        objective.train()
        expected = gradients(objective, objective, batch)
        with whole_graphs(COMPILES, objective):
            # fullgraph: an error where a graph breaks
            found = gradients(objective, torch.compile(objective, fullgraph=True, backend="eager"), batch)
        torch.testing.assert_close(found[0], expected[0])
        for left, right in zip(found[1], expected[1], strict=True):
            assert (left is None) == (right is None)
            if left is not None:
                torch.testing.assert_close(left, right)


def test_the_output_stage_has_the_same_gradients_where_the_compiler_differentiates_it() -> None:
    objective, transition, feed = staged(llama(2, 16, 2), llama(4, 24, 1))
    batch = CausalCollator()(list(token_rows(4, ragged=True)))
    transition.enter(2, False, feed)
    transition.set_trainable(transition.trainable)
    objective.train()
    expected = gradients(objective, objective, batch)
    torch._dynamo.reset()
    with whole_graphs(COMPILES, objective):
        found = gradients(objective, torch.compile(objective, fullgraph=True, backend="aot_eager"), batch)
    torch.testing.assert_close(found, expected)


def train(output: Path, backend: str) -> None:
    if backend:
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = backend
    args = CurriculumConfig(
        output_dir=str(output),
        max_steps=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        method="one_shot",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        label_weight=0.3,
    )
    given = {"model": llama(1, 16, seed=2), "teacher_model": llama(1, 24, seed=1), "args": args}
    trainer = CurriculumTrainer(**given, train_dataset=token_rows(ragged=True), data_collator=CausalCollator())
    trainer.train()
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == bool(backend)


def test_a_backend_in_the_environment_compiles_the_steps_and_keeps_their_losses(tmp_path: Path) -> None:
    torch._dynamo.utils.counters.clear()
    train(tmp_path / "plain", "")
    launch(1, train, tmp_path / "compiled", "aot_eager")
    files = [MetricsFile(tmp_path / name / "metrics.jsonl") for name in ("plain", "compiled")]
    losses = [[line["loss"] for line in file.read() if "loss" in line] for file in files]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks, with transformers 5.3
def test_a_compiled_step_drops_out_again_after_an_evaluation() -> None:
    """Of a model that asks its own mode, not that of a dropout module, whether to drop."""
    sizes = {"d_model": 16, "num_layers": 2, "ffn_dim": 32, "attention_heads": 2, "max_position_embeddings": 32}
    dropouts = {"dropout": 0.5, "attention_dropout": 0.0, "activation_dropout": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    student = XGLMForCausalLM(XGLMConfig(vocab_size=VOCAB, **sizes, **dropouts, **ends))
    for block in student.model.layers:
        block.dropout = 0.0  # what is left drops the embedding
    objective, transition, feed = staged(student, llama(4, 24, 1))
    transition.enter(0, False, feed)
    torch._dynamo.reset()
    compiled = torch.compile(objective, backend="eager")
    batch = feed.calibration()[0]

    def step() -> float:
        objective.train()
        with whole_graphs(COMPILES, objective):
            return compiled(**batch)["loss"].item()

    assert step() != step()
    objective.eval()
    assert objective(**batch)["loss"].item() == objective(**batch)["loss"].item()
    assert step() != step()


def test_many_stages_do_not_reach_the_limit_of_the_compiler() -> None:
    objective, _, _ = staged(llama(2, 16, 2), llama(4, 24, 1))
    limit = torch._dynamo.config.recompile_limit
    with whole_graphs(COMPILES, objective):
        assert torch._dynamo.config.recompile_limit >= 8 * len(STAGES) > limit
    assert torch._dynamo.config.recompile_limit == limit
    plain: Any = SimpleNamespace(state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)))
    with whole_graphs(plain, objective):
        assert torch._dynamo.config.recompile_limit == limit
