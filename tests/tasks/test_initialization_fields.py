"""Fields of a configuration in which a student may differ from the teacher that it is started from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from tests.tasks.family_models import CASES, inputs, make, outputs
from tutelage.core.errors import UserError
from tutelage.tasks.initialization.convert import BasisChoice, check_sizes, initialize
from tutelage.tasks.initialization.layout import Layout

# change outputs: the student is smaller, or its norms add another small number to the variance
MAY_DIFFER = {"num_hidden_layers", "num_attention_heads", "num_local_experts", "num_experts", "n_layer", "n_layers"}
MAY_DIFFER |= {"intermediate_size", "moe_intermediate_size", "hidden_dim", "n_inner", "pooler_output_size"}
MAY_DIFFER |= {"layer_norm_eps", "layer_norm_epsilon", "norm_eps", "rms_norm_eps"}
# say nothing about what weights do; the vocabulary is that of the text
NOT_TRIED = {"dtype", "output_hidden_states", "output_attentions", "return_dict", "problem_type", "vocab_size"}
CHOICES = {"classifier_pooling": ("cls", "mean"), "pooler_act": ("tanh", "relu")}
QUICK = ("modernbert", "ForSequenceClassification")  # the case of the default tests


def other_values(name: str, value: Any) -> list[Any]:
    """What a scalar field may be instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value if value else 1, max(1, value // 2)]
    if isinstance(value, float):
        return [10 * value if value else 0.5]
    if isinstance(value, str):
        choices = CHOICES.get(name, ("relu", "gelu") if value in ACT2FN else ())
        return [choice for choice in choices if choice != value][:1]
    return [True, 8] if value is None else []


def varied(family: str, head: str) -> Iterator[tuple[str, nn.Module]]:
    """Models that differ from `make` in one field of the configuration and run: field=value, model."""
    model: Any = make(family, head)
    for name, value in model.config.to_dict().items():
        if name in NOT_TRIED or name.startswith("_"):
            continue
        for other in other_values(name, value):
            try:
                changed = make(family, head, 1, **{name: other})
                outputs(changed, family)
            except Exception:  # not a value of this field
                continue
            yield f"{name}={other}", changed


def all_outputs(model: nn.Module, family: str) -> list[torch.Tensor]:
    """Outputs at non-padding positions and, where there is one, the pooled state."""
    batch = inputs(family, seed=2)
    with torch.no_grad():
        found = model(**batch)
    states = [getattr(found, name, None) for name in ("last_hidden_state", "logits", "pooler_output")]
    mask = batch.get("attention_mask", torch.ones(1)).bool()
    return [s[mask] if s.dim() == 3 and s.shape[:2] == mask.shape else s for s in states if s is not None]


def differs(student: nn.Module, teacher: nn.Module, family: str) -> bool:
    """Whether a student computes something else than the teacher that it was started from; False for a refused start."""
    try:
        layout = Layout.of(student, teacher)
        check_sizes(layout, "identity")
    except UserError:
        return False
    initialize(layout, [inputs(family)], BasisChoice("identity"))
    pairs = zip(all_outputs(student, family), all_outputs(teacher, family), strict=True)
    return any(mine.shape != theirs.shape or not torch.allclose(mine, theirs) for mine, theirs in pairs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "head"),
    [pytest.param(*case, marks=() if case == QUICK else pytest.mark.architectures) for case in CASES],
)
def test_models_that_differ_in_a_field_compute_the_same_after_the_start_or_are_refused(family: str, head: str) -> None:
    teacher, student = make(family, head), make(family, head, 2)
    wrong, tried = [], set()
    for field, changed in varied(family, head):
        tried.add(field.split("=")[0])
        # the changed model is the teacher first, since it is written over as a student
        if differs(student, changed, family) or differs(changed, teacher, family):
            wrong.append(field)
    assert {field.split("=")[0] for field in wrong} <= MAY_DIFFER, wrong
    assert len(tried) >= 15


@pytest.mark.parametrize(
    ("family", "head", "field", "value"),
    [
        ("roberta", "Model", "pad_token_id", 1),  # its positions begin after it
        ("llama", "ForSequenceClassification", "pad_token_id", 1),  # it pools the last token before it
        ("modernbert", "ForSequenceClassification", "classifier_pooling", "mean"),
        ("modernbert", "ForMaskedLM", "classifier_activation", "relu"),
        ("electra, projected", "Model", "embedding_size", 8),
        ("electra, projected", "Model", "embedding_size", 32),
        ("vit", "Model", "image_size", 4),
        ("vit", "Model", "patch_size", 2),
        ("vit", "Model", "num_channels", 1),
    ],
)
def test_a_field_that_decides_what_a_module_does_must_be_the_teachers(
    family: str, head: str, field: str, value: Any
) -> None:
    teacher: Any = make(family, head)
    theirs = getattr(teacher.config, field)
    message = f"the student has {field}={value}, the teacher {theirs}: set the teacher's in the student's configuration"
    with pytest.raises(UserError, match=message):
        Layout.of(make(family, head, 1, **{field: value}), teacher)


def test_the_padding_token_of_a_language_model_may_differ() -> None:
    student, teacher = make("llama", "ForCausalLM", 1, pad_token_id=1), make("llama", "ForCausalLM")
    assert not differs(student, teacher, "llama")


@pytest.mark.parametrize(
    ("family", "table"),
    [
        ("bert", "embeddings.position_embeddings"),
        ("electra, projected", "embeddings.position_embeddings"),
        ("gpt2", "wpe"),
    ],
)
def test_positions_that_the_teacher_lacks_stay_random_and_get_a_warning(family: str, table: str) -> None:
    field = "n_positions" if family == "gpt2" else "max_position_embeddings"
    teacher, student = make(family), make(family, seed=1, **{field: 30})
    weights = [model.get_parameter(f"{table}.weight") for model in (student, teacher)]
    random = weights[0][24:].detach().clone()
    message = "the student has 30 positions, the teacher 24: the rest stay random; set max_position_embeddings=24"
    with pytest.warns(UserWarning, match=message):
        assert not differs(student, teacher, family)
    assert torch.equal(weights[0], torch.cat([weights[1], random]))


def test_rotary_positions_may_be_more_than_the_teachers() -> None:
    assert not differs(make("llama", seed=1, max_position_embeddings=48), make("llama"), "llama")
