"""What a student that is started from its teacher cannot be, and how to describe a family of one's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaModel

from tests.tasks.family_models import FAMILIES, inputs, make, outputs
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
            "electra",
            {"embedding_size": 16},
            {},
            "the student has embeddings_project, the teacher no embeddings_project: set embedding_size to .*hidden_size, 32",
        ),
        (
            "electra, projected",
            {"hidden_size": 16, "num_attention_heads": 2},
            {},
            "the teacher has embeddings_project, the student no embeddings_project: set hidden_size to .* other than .*, 16",
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


def test_a_module_that_only_the_teacher_has_is_refused() -> None:
    teacher = make("llama")
    teacher.get_submodule("layers.0.self_attn").q_norm = nn.LayerNorm(8)
    message = (
        "the teacher has layers.0.self_attn.q_norm, the student no layers.1.self_attn.q_norm: use a student of the"
    )
    with pytest.raises(UserError, match=message):
        Layout(make("llama"), teacher, [2, 1])
    Layout(make("llama"), teacher, [2, 2])  # the block has no part in this student


def test_only_rows_of_embeddings_and_heads_may_differ_in_number() -> None:
    student, teacher = make("electra, projected", "Model", 1, embedding_size=8), make("electra, projected")
    student.config.embedding_size = 16
    with pytest.raises(UserError, match=r"word_embeddings.weight is \(50, 8\) in the student, but would be \(50, 16\)"):
        check_sizes(Layout.of(student, teacher), "identity")


def test_a_pooler_that_only_the_teacher_has_is_left_out() -> None:
    student, teacher = make("bert", seed=1), make("bert")
    student.pooler = None
    start(student, teacher, "bert", "identity")
    torch.testing.assert_close(outputs(student, "bert"), outputs(teacher, "bert"), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "head", "fields", "where"),
    [
        ("llama", "ForCausalLM", {"attention_bias": True}, "model.layers.0.self_attn.q_proj"),
        ("llama", "ForCausalLM", {"mlp_bias": True, "attention_bias": False}, "model.layers.0.mlp.gate_proj"),
        ("gpt_neox", "Model", {"attention_bias": True}, "layers.0.attention.query_key_value"),
        ("vit", "Model", {"qkv_bias": True}, "layers.0.attention.q_proj|encoder.layer.0.attention.attention.query"),
        ("modernbert", "ForMaskedLM", {"decoder_bias": True}, "decoder"),
        ("modernbert", "Model", {"norm_bias": True}, "embeddings.norm"),
    ],
)
def test_a_bias_that_the_student_lacks_is_refused_unless_it_is_zero(
    family: str, head: str, fields: dict[str, bool], where: str
) -> None:
    teacher = make(family, head, **fields)
    student = make(family, head, 1, **dict.fromkeys(fields, False))
    option = next(f"{name}={value}" for name, value in fields.items() if value)
    message = rf"the teacher has a bias in ({where}) that is not zero, the student none: set {option} for the student"
    with pytest.raises(UserError, match=message):
        Layout.of(student, teacher)
    kept = {name for name, _ in student.named_parameters()}
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name not in kept:
                parameter.zero_()
    start(student, teacher, family, "identity")
    torch.testing.assert_close(outputs(student, family), outputs(teacher, family), rtol=0, atol=1e-9)


def test_a_bias_without_values_is_not_taken_to_be_zero() -> None:
    """A plan has no values."""
    configs: list[Any] = [make("llama", attention_bias=biased).config for biased in (False, True)]
    with FakeTensorMode():
        student, teacher = (LlamaModel(config) for config in configs)
    with pytest.raises(UserError, match=r"a bias in layers.0.self_attn.q_proj that is not zero"):
        Layout.of(student, teacher)


def test_the_bias_of_a_norm_that_the_student_lacks_needs_readers_with_a_bias() -> None:
    """ModernBERT's first block has no first norm."""
    for biased in (True, False):
        kinds = {"norm_bias": True, "attention_bias": biased}
        student, teacher = (make("modernbert", layer_types=["full_attention"] * 2, **kinds) for _ in range(2))
        if biased:
            Layout(student, teacher, [2, 2])
        else:
            message = (
                "the teacher has a bias in layers.1.attn_norm that is not zero, the student none: change the layer map"
            )
            with pytest.raises(UserError, match=message):
                Layout(student, teacher, [2, 2])


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
