"""The load-balancing loss of mixture-of-experts students, against transformers' own loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.training.conftest import batches_of, llama
from tutelage import CurriculumTrainer
from tutelage.core.curriculum import Curriculum, one_shot, scratch
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import NoTargets
from tutelage.tasks.registry import get_task
from tutelage.training.objective import StageObjective

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "jamba"]
if Version(transformers.__version__) >= Version("5.24"):  # 5.3 cannot compute theirs
    FAMILIES += ["granitemoe", "jetmoe"]
COEFFICIENT = 0.1
_SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "output_router_logits": True,
    "router_aux_loss_coef": COEFFICIENT,
    "aux_loss_coef": COEFFICIENT,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}


def experts(family: str = "mixtral", **fields: Any) -> Any:
    torch.manual_seed(0)
    extra = {
        "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
        "jetmoe": {"kv_channels": 8},
    }
    settings = {**_SIZES, **extra.get(family, {}), **fields}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings)).train()


def padded_batch(rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (rows, 10), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def objective_of(student: Any, curriculum: Curriculum | None = None) -> StageObjective:
    source = NoTargets(get_task("causal_lm"))
    source.attach(curriculum or scratch(1), student)
    return StageObjective(student, source)


def test_in_training_a_step_is_that_of_the_models_own_loss(make_trainer: Callable[..., CurriculumTrainer]) -> None:
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0, "max_steps": 3}
    trainer = make_trainer(method="scratch", student=experts(), ragged=True, **settings)
    batches = batches_of(trainer)
    model = experts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for mine, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def gradients(loss: torch.Tensor, model: Any) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], materialize_grads=True))


def assert_all_close(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for mine, theirs in zip(left, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_on_labels_alone_is_the_models_own(family: str, asked: bool) -> None:
    model, batch = experts(family, output_router_logits=asked), padded_batch()
    own = model(**batch, use_cache=False)
    assert (own.aux_loss is not None) == asked
    mine = objective_of(model)(**batch)["loss"]
    torch.testing.assert_close(mine, own.loss, rtol=1e-6, atol=0)
    assert_all_close(gradients(mine, model), gradients(own.loss, model))


def test_gradient_checkpointing_changes_nothing() -> None:
    model, batch = experts(), padded_batch()
    expected = gradients(model(**batch).loss, model)
    objective = objective_of(model)
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    assert_all_close(gradients(objective(**batch)["loss"], model), expected)


def test_under_autocast_it_is_what_the_model_computes_under_autocast() -> None:
    model, batch = experts(), padded_batch()
    objective = objective_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(objective(**batch)["loss"], model(**batch).loss, rtol=2e-3, atol=0)
        found, expected = objective(**batch)["loss"], model(**batch).aux_loss
        objective.router_coefficient = 0.0
        torch.testing.assert_close(found - objective(**batch)["loss"], COEFFICIENT * expected, rtol=1e-5, atol=0)


def test_distillation_adds_it_whole() -> None:
    model, teacher, batch = experts(), llama(2, 16, seed=1), padded_batch()
    source = LiveTargets(teacher, get_task("causal_lm"))
    source.attach(one_shot(1, label_weight=0.25), model)
    objective = StageObjective(model, source)
    with_balance = objective(**batch)["loss"]
    objective.router_coefficient = 0.0
    own = model(**batch)
    torch.testing.assert_close(with_balance, objective(**batch)["loss"] + COEFFICIENT * own.aux_loss)


def test_accumulation_takes_the_mean_over_micro_batches() -> None:
    """Weighed by their items, as the rest of the loss is, where transformers' own trainer takes the sum."""
    model, batches = experts(), [padded_batch(rows, seed=rows) for rows in (2, 5)]
    objective = objective_of(model)
    items = [objective.count_items(batch) for batch in batches]
    found = sum(objective(num_items=sum(items), **batch)["loss"] for batch in batches)
    own = [model(**batch).loss for batch in batches]
    expected = sum(count * loss for count, loss in zip(items, own, strict=True)) / sum(items)
    torch.testing.assert_close(found, expected)


def test_the_models_own_forward_runs_its_head_at_one_position() -> None:
    """The loss runs it in chunks."""
    model, batch = experts(), padded_batch()
    objective, rows = objective_of(model), []
    objective(**batch)
    undo = model.lm_head.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[1]))
    objective(**batch)
    undo.remove()
    assert rows == [1] and not model.lm_head._forward_pre_hooks


def test_a_model_whose_own_loss_has_none_is_refused() -> None:
    fields = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    model = experts("deepseek_v3", n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=0, **fields)
    with pytest.raises(
        ValueError, match=r"DeepseekV3ForCausalLM has output_router_logits=True.*set output_router_logits"
    ):
        objective_of(model)


def test_a_model_whose_own_loss_is_a_different_one_is_refused() -> None:
    model = experts()
    model.loss_function = lambda logits, *_, **__: logits.square().mean()
    with pytest.raises(ValueError, match="MixtralForCausalLM has output_router_logits=True, but its loss is not"):
        objective_of(model)
