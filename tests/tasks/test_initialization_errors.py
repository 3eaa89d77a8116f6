"""What a student that is started from its teacher cannot be, and how to describe a family of one's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.tasks.family_models import FAMILIES, inputs, make
from tutelage.core.errors import UserError
from tutelage.tasks.initialization import families
from tutelage.tasks.initialization.convert import BasisChoice, check_sizes, initialize
from tutelage.tasks.initialization.families import NEURONS, SAME, STREAM, Family, Linear, Norm, register_family, rows
from tutelage.tasks.initialization.layout import Layout


def start(student: nn.Module, teacher: nn.Module, family: str = "", basis: str = "pca") -> None:
    initialize(Layout.of(student, teacher), [inputs(family, count=12)], BasisChoice(basis))


@pytest.mark.parametrize(
    ("family", "student", "teacher", "message"),
    [
        (
            "llama",
            {"num_hidden_layers": 3},
            {},
            "the student has 3 blocks, the teacher 2: .* not deeper; use student_init='rand",
        ),
        ("llama", {"hidden_size": 40}, {}, "the student is 40 wide, the teacher 32: .* use student_init='random'"),
        ("llama", {"head_dim": 4}, {}, "heads have 4 values, the teacher's 8: set num_attention_heads .or head_dim"),
        ("bert", {"num_attention_heads": 2}, {}, "heads have 16 values, the teacher's 8: set num_attention_heads .or"),
        ("bert", {"hidden_size": 28}, {}, "heads have 7 values, the teacher's 8: set hidden_size to a multiple of 8"),
        (
            "llama",
            {"num_key_value_heads": 1},
            {},
            "4 heads in 1 key-value groups, the teacher 4 in 2: .* at most 2 heads",
        ),
        (
            "llama",
            {"intermediate_size": 64},
            {},
            "the student has 64 feed-forward neurons, the teacher only 48: lower them",
        ),
        ("mixtral", {"num_local_experts": 5}, {}, "the student has 5 experts, the teacher only 4"),
        (
            "llama",
            {"hidden_act": "gelu"},
            {},
            "hidden_act=gelu, the teacher silu: set the teacher's in the student's con",
        ),
        ("gpt_neox", {"use_parallel_residual": False}, {}, "use_parallel_residual=False, the teacher True"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}},
            {},
            "the student has rope_parameters=",
        ),
        ("mixtral", {"num_experts_per_tok": 1}, {}, "the student has num_experts_per_tok=1, the teacher 2"),
        (
            "llama",
            {"attention_bias": True},
            {},
            "the student has a bias in layers.0.self_attn.q_proj, the teacher none",
        ),
        (
            "vit",
            {"patch_size": 2},
            {},
            r"embeddings.patch_embeddings.projection is \(32, 3, 2, 2\) in the student, but would be",
        ),
        (
            "electra",
            {"embedding_size": 16},
            {},
            "the student has embeddings_project, the teacher no embeddings_project",
        ),
    ],
)
def test_sizes_that_cannot_come_from_the_teacher_are_refused(
    family: str, student: dict[str, Any], teacher: dict[str, Any], message: str
) -> None:
    """Before the teacher runs, so that a plan knows it and the default can fall back to random weights."""
    with pytest.raises(UserError, match=message):
        check_sizes(Layout.of(make(family, **student), make(family, **teacher)), "pca")


def test_too_many_groups_for_the_teachers_are_refused() -> None:
    teacher = make("llama", num_attention_heads=6, num_key_value_heads=2, hidden_size=36)
    student = make("llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=36)
    with pytest.raises(
        UserError, match=r"groups of 2 heads can be taken 2 times .* the student has 3: lower num_key_value"
    ):
        start(student, teacher)


def test_models_of_different_families_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"the student is a 'mistral' model, the teacher a 'llama' model: .* one family"
    ):
        start(make("mistral"), make("llama"))


def test_models_of_different_classes_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"the student has embed_tokens, the teacher no embed_tokens: .* the teacher's class"
    ):
        start(make("llama"), make("llama", "ForCausalLM"))


def test_an_unknown_basis_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown residual_basis 'svd': use one of pca, logits, random, identity"):
        start(make("llama"), make("llama"), basis="svd")


def test_the_identity_of_different_widths_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"'identity' needs equal widths, but the teacher is 32 wide and the student 24"
    ):
        start(make("llama", hidden_size=24), make("llama"), basis="identity")


def test_a_quantized_teacher_is_refused() -> None:
    teacher = make("llama")
    weight = torch.zeros(4, 4, dtype=torch.int8)
    teacher.get_submodule("layers.0.self_attn.q_proj").weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(
        UserError, match=r"layers.0.self_attn.q_proj .* no floating-point weight: load .* without quantiz"
    ):
        start(make("llama"), teacher)


def test_an_offloaded_teacher_is_refused() -> None:
    teacher = make("llama")
    teacher.get_submodule("layers.0.mlp").to("meta")
    with pytest.raises(
        UserError, match=r"mlp.gate_proj of the teacher is offloaded or sharded: load the whole model on one"
    ):
        start(make("llama"), teacher)


def test_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), make("llama"))
    for models in ((make("llama"), adapted), (adapted, make("llama"))):
        with pytest.raises(UserError, match=r"does not know what layers.0.self_attn.q_proj.base_layer of a LlamaModel"):
            start(*models)


def test_a_module_that_no_table_describes_is_named() -> None:
    for models in ((make("llama"), make("llama")), (make("llama"), make("llama"))[::-1]):
        models[0].get_submodule("layers.1.mlp").adapter = nn.Linear(2, 2)
        with pytest.raises(
            UserError, match=r"what layers.1.mlp.adapter of a LlamaModel .* describe it: register_family"
        ):
            start(*models)


def test_a_block_whose_teacher_lacks_its_norm_is_refused() -> None:
    """ModernBERT's first block has no first norm."""
    models = [make("modernbert", layer_types=["full_attention"] * 2) for _ in range(2)]
    for basis in ("identity", "pca"):
        with pytest.raises(
            UserError, match=r"the student has a norm layers.1.attn_norm, the teacher none: change the layer map"
        ):
            check_sizes(Layout(*models, [1, 1]), basis)


def test_a_norms_bias_that_the_teacher_lacks_is_refused_where_norms_are_copied() -> None:
    models = [make("modernbert", norm_bias=biased) for biased in (True, False)]
    with pytest.raises(UserError, match=r"the student has a bias in embeddings.norm, the teacher none"):
        check_sizes(Layout.of(*models), "identity")
    check_sizes(Layout.of(*models), "pca")


@pytest.mark.parametrize(
    "family",
    [name for name, (_, _, heads) in FAMILIES.items() if "ForMaskedLM" in heads and name != "electra, projected"],
)
def test_a_rotated_masked_language_model_needs_a_head_of_its_own(family: str) -> None:
    """The decoder's rows are the embeddings, which are in the residual stream's coordinates; the head reads its own."""
    student, teacher = (make(family, "ForMaskedLM", tie_word_embeddings=True) for _ in range(2))
    with pytest.raises(
        UserError, match=r"is tied to another module, but the embeddings .*: set tie_word_embeddings=false"
    ):
        start(student, teacher, family)


def test_a_student_may_not_tie_what_its_teacher_keeps_apart() -> None:
    student, teacher = (make("llama", "ForCausalLM", tie_word_embeddings=tied) for tied in (True, False))
    with pytest.raises(
        UserError, match=r"is tied to another module, the teacher's is not: set tie_word_embeddings=false"
    ):
        start(student, teacher, "llama")


# ---- A family of one's own ----


class Block(nn.Module):
    """A feed-forward block after a LayerNorm."""

    def __init__(self, width: int):
        super().__init__()
        self.before, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return hidden_BTD + self.down(self.up(self.before(hidden_BTD)).relu())


class MadeUp(nn.Module):
    """A language model without attention."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.config = SimpleNamespace(
            model_type="made_up", hidden_size=width, num_hidden_layers=2, num_attention_heads=1, head_dim=8
        )
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.last = nn.LayerNorm(width)
        self.out = nn.Linear(width, 50)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.double()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden_BTD = self.embed(input_ids)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        return self.out(self.last(hidden_BTD))


def test_a_family_of_ones_own_is_registered_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    student, teacher = MadeUp(), MadeUp()
    with pytest.raises(
        UserError, match=r"how a 'made_up' model is built .*: register_family\('made_up', Family\(...\)\)"
    ):
        start(student, teacher)
    family = Family(
        block={"up": Linear(STREAM, NEURONS), "down": Linear(NEURONS, STREAM), "before": Norm(readers=("up",))},
        outside={"embed": rows(), "last": Norm(readers=("out",)), "out": Linear(STREAM, SAME)},
    )
    register_family("made_up", family)
    start(student, teacher)
    batch = inputs("made_up", seed=3)
    torch.testing.assert_close(student(**batch), teacher(**batch), rtol=0, atol=1e-4)
