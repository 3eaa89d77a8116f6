"""Fewer blocks of equal width: copies of the teacher's, which do what those do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.tasks.family_models import FAMILIES, inputs, make
from tutelage.core.blocks import find_blocks
from tutelage.core.errors import UserError
from tutelage.tasks.initialization.convert import BasisChoice, initialize
from tutelage.tasks.initialization.layout import Layout
from tutelage.tasks.students import student_config

SIZES: dict[str, dict[str, Any]] = {  # so that every second block is of another kind
    "smollm3": {"no_rope_layer_interval": 2, "num_hidden_layers": 8},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
}


def halved(teacher: Any) -> nn.Module:
    """A student of half the depth, as a preset gives it."""
    config = student_config(f"layers={teacher.config.num_hidden_layers // 2}", teacher.config)
    config._attn_implementation = "eager"
    return type(teacher)(config).double().eval()


def keeping(model: nn.Module, blocks: list[int]) -> nn.Module:
    """The teacher with these blocks alone, 1-based: what a student of equal width is to compute."""
    model = copy.deepcopy(model)
    name = find_blocks(model).names[0].rpartition(".")[0]
    parent, _, last = name.rpartition(".")
    whole: Any = model.get_submodule(name)
    setattr(model.get_submodule(parent), last, nn.ModuleList([whole[block - 1] for block in blocks]))
    config: Any = model.config
    config.num_hidden_layers, config.use_cache = (
        len(blocks),
        False,
    )  # blocks keep their numbers, which a cache counts by
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = [kinds[block - 1] for block in blocks]
    return model


def states(model: nn.Module, family: str) -> list[torch.Tensor]:
    """What each block gives, at non-padding positions."""
    found: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [model.get_submodule(name).register_forward_hook(note) for name in find_blocks(model).names]
    batch = inputs(family)
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    mask = batch.get("attention_mask")
    return [state if mask is None else state[mask.bool()] for state in found]


@pytest.mark.parametrize("family", ["llama", "smollm3", "gemma2", "gemma3_text", "bert", "gpt2", "vit"])
def test_copied_blocks_compute_what_the_teachers_blocks_do(family: str) -> None:
    teacher = make(family, FAMILIES[family][2].split()[0], **{"num_hidden_layers": 4, **SIZES.get(family, {})})
    student = halved(teacher)
    layout = Layout.of(student, teacher)
    initialize(layout, [inputs(family)], BasisChoice("identity"))
    reference = keeping(teacher, layout.pairs)
    for mine, expected in zip(states(student, family), states(reference, family), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)


def test_a_preset_keeps_which_blocks_have_positions() -> None:
    teacher: Any = make("smollm3", "ForCausalLM", num_hidden_layers=8)
    assert teacher.config.no_rope_layers == [1, 1, 1, 0, 1, 1, 1, 0]
    assert student_config("layers=4", teacher.config).no_rope_layers == [1, 0, 1, 0]
    assert student_config("layers=2", teacher.config).no_rope_layers == [0, 0]


@pytest.mark.parametrize(
    ("family", "field", "values"),
    [("gemma3_text", "layer_types", "full_attention.*sliding_attention"), ("smollm3", "no_rope_layers", "0.*1")],
)
def test_a_block_of_another_kind_than_its_teachers_is_refused(family: str, field: str, values: str) -> None:
    sizes = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3_text" else {}
    teacher = make(family, "ForCausalLM", num_hidden_layers=4, **(sizes or {"no_rope_layer_interval": 2}))
    student = halved(teacher)
    Layout.of(student, teacher, [(1, 2), (2, 4)])
    first, second = values.split(".*")
    message = f"block 1 of the student has {field} {first}, block 1 of the teacher, .*{second}: change the layer map"
    with pytest.raises(UserError, match=message):
        Layout.of(student, teacher, [(1, 1), (2, 4)])


def test_attention_that_is_scaled_by_the_number_of_its_block_is_refused_elsewhere() -> None:
    teacher, student = (
        make("gpt2", scale_attn_by_inverse_layer_idx=True, num_hidden_layers=layers) for layers in (4, 2)
    )
    Layout.of(student, teacher, [(1, 1), (2, 2)])
    with pytest.raises(UserError, match=r"block 1 of the student starts from block 2 .* different attention: use stud"):
        Layout.of(student, teacher)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("mistral", "sliding_window", 4),
        ("modernbert", "local_attention", 4),
        ("bert", "is_decoder", True),
        ("qwen3_moe", "norm_topk_prob", True),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "scale_attn_weights", False),
    ],
)
def test_fields_that_change_what_attention_does_must_be_the_teachers(family: str, field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"the student has (sliding_window|{field})=.*: set the teacher's"):
        Layout.of(make(family, **{field: value}), make(family))
