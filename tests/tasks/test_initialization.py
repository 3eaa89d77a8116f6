"""A student that is started from its teacher: where the result must be exact, and what is kept where it cannot be.

Shapes: N positions, D teacher width, R student width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.tasks.family_models import CASES, FAMILIES, POST_NORM, RMS, inputs, make, outputs
from tutelage.core.blocks import FINAL, find_blocks, head_module
from tutelage.core.forward import observe
from tutelage.core.stages import uniform_layer_map
from tutelage.tasks.initialization import families
from tutelage.tasks.initialization.calibration import state_moments
from tutelage.tasks.initialization.convert import BasisChoice, Initialized, initialize
from tutelage.tasks.initialization.layout import Layout, block_pairs

NARROWER = {"hidden_size": 24, "intermediate_size": 40}
GEMMAS = ["gemma", "gemma2", "gemma3_text"]


def start(student: nn.Module, teacher: nn.Module, family: str, basis: str = "pca") -> Initialized:
    batches = [inputs(family, seed=seed) for seed in range(4)]
    return initialize(Layout.of(student, teacher), batches, BasisChoice(basis))


def untied(family: str) -> dict[str, Any]:
    return {} if family == "vit" else {"tie_word_embeddings": False}


def narrower(family: str) -> dict[str, Any]:
    """Sizes of a student that keeps the head size."""
    sizes = {**NARROWER} if family in RMS else {**NARROWER, "num_attention_heads": 3}
    sizes |= {"embedding_size": 24} if family == "electra" else {}
    return sizes | ({"moe_intermediate_size": 16} if family == "qwen3_moe" else {})


def block_states(model: nn.Module, family: str, places: list[Any]) -> list[torch.Tensor]:
    """States at places, (N, D), at non-padding positions."""
    batch = inputs(family, seed=2)
    states = observe(model, places, batch, head=head_module(model)).states
    mask = batch.get("attention_mask")
    return [s[mask.bool()] if mask is not None and s.dim() == 3 else s.flatten(0, -2) for s in map(states.get, places)]


def make_commuting(model: nn.Module, family: str) -> None:
    """Set the gains that cannot be folded into a neighbour to one number: an output that is scaled per dimension and then
    added to the stream is not a rotation of the same thing scaled in other coordinates."""
    for name, module in model.named_modules():
        post_norm = family in POST_NORM and isinstance(module, nn.LayerNorm)
        branch = family in ("gemma2", "gemma3_text") and name.endswith(
            ("attention_layernorm", "post_feedforward_layernorm")
        )
        if post_norm or branch or (family == "modernbert" and name.endswith("embeddings.norm")):
            nn.init.constant_(module.get_parameter("weight"), 0.4 if branch else 1.0)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_a_student_of_equal_shape_computes_what_its_teacher_does(family: str, head: str) -> None:
    teacher, student = make(family, head), make(family, head, seed=1)
    assert not torch.allclose(outputs(student, family), outputs(teacher, family))
    start(student, teacher, family, "identity")
    torch.testing.assert_close(outputs(student, family), outputs(teacher, family), rtol=0, atol=1e-9)


HEADS = [case for case in CASES if case[1] != "Model"]
FIRST_HEADS = [(family, heads.split()[0]) for family, (_, _, heads) in FAMILIES.items()]


@pytest.mark.parametrize(
    ("family", "head", "basis"), [(*case, "pca") for case in HEADS] + [(*case, "random") for case in FIRST_HEADS]
)
def test_a_square_rotation_of_the_residual_stream_changes_no_output(family: str, head: str, basis: str) -> None:
    """Pre-norm families fold their gains into the next map, which is exact; heads are untied, since a shared matrix cannot
    take the final gain. The gain of a norm whose output is added to the stream (post-norm, and Gemma 2 and 3 after a branch)
    cannot be folded, so it is one number here."""
    teacher, student = (make(family, head, seed, **untied(family)) for seed in (0, 1))
    make_commuting(teacher, family)
    started = start(student, teacher, family, basis)
    expected = outputs(teacher, family)
    torch.testing.assert_close(outputs(student, family), expected, rtol=0, atol=2e-5 * float(expected.std()))
    places = [0, 1, 2, FINAL]
    states = (block_states(model, family, places) for model in (teacher, student))
    for place, hidden_ND, mine_ND in zip(places, *states, strict=True):
        expected = hidden_ND @ started.matrix(place).double()
        torch.testing.assert_close(mine_ND, expected, rtol=0, atol=3e-5 * float(expected.std()))


@pytest.mark.parametrize("family", POST_NORM)
def test_a_base_model_with_post_norm_ends_in_the_rotated_state_of_its_teacher(family: str) -> None:
    teacher, student = make(family), make(family, seed=1)
    make_commuting(teacher, family)
    started = start(student, teacher, family)
    expected = outputs(teacher, family) @ started.matrix(FINAL).double()
    torch.testing.assert_close(outputs(student, family), expected, rtol=0, atol=2e-5 * float(expected.std()))


def of_one_kind(family: str, layers: int) -> dict[str, Any]:
    """Sizes of a model whose blocks are all of one kind."""
    sizes: dict[str, Any] = {"num_hidden_layers": layers}
    if family in ("gemma2", "modernbert"):
        sizes["layer_types"] = ["full_attention"] * layers
    return sizes | ({"no_rope_layer_interval": 9} if family == "smollm3" else {})


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "modernbert"])
def test_fewer_layers_of_equal_width_are_copies_of_the_teachers(family: str) -> None:
    """ModernBERT's first block has no first norm, so that it has a test of its own."""
    head = FAMILIES[family][2].split()[0]
    teacher, student = (make(family, head, seed, **of_one_kind(family, layers)) for seed, layers in ((0, 4), (1, 2)))
    expected = teacher.state_dict()
    start(student, teacher, family, "identity")
    prefix = find_blocks(student).names[0][:-1]
    for name, value in student.state_dict().items():
        for mine, theirs in (("0", "1"), ("1", "3")):
            if name.startswith(f"{prefix}{mine}."):
                name = f"{prefix}{theirs}.{name.removeprefix(f'{prefix}{mine}.')}"
                break
        assert torch.equal(value, expected[name]), name


def test_the_gain_of_a_norm_that_the_student_lacks_goes_into_its_reader() -> None:
    teacher, student = (make("modernbert", "Model", layers, **of_one_kind("modernbert", layers)) for layers in (4, 2))
    start(student, teacher, "modernbert", "identity")
    copied = student.get_parameter("layers.0.attn.Wqkv.weight")
    gain, weight = (teacher.get_parameter(f"layers.1.{name}.weight") for name in ("attn_norm", "attn.Wqkv"))
    assert isinstance(student.get_submodule("layers.0.attn_norm"), nn.Identity)
    scale = copied / (weight * gain)
    torch.testing.assert_close(scale, scale[:1, :1].expand_as(scale))
    assert float(scale[0, 0].detach()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_narrower_student_comes_from_its_teacher(family: str) -> None:
    head = FAMILIES[family][2].split()[-1]
    teacher, student = (
        make(family, head, **untied(family)),
        make(family, head, seed=1, **untied(family), **narrower(family)),
    )
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    places = [0, 1, 2]
    random_states = block_states(student, family, places)
    started = start(student, teacher, family)
    for name, parameter in student.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert (parameter != before[name]).all(), name
    teacher_states = block_states(teacher, family, places)
    for theirs_ND, mine_ND, random_ND in zip(
        teacher_states, block_states(student, family, places), random_states, strict=True
    ):
        expected_NR = theirs_ND @ started.basis_DR.double()
        found = correlation(mine_ND, expected_NR)
        assert found > 0.4
        assert found > correlation(random_ND, expected_NR) + 0.3


@pytest.mark.parametrize("width", [32, 24])
def test_a_bias_beside_a_tiny_gain_is_read_as_the_teachers(width: int) -> None:
    """In the final norm, whose gain goes into an output head without a bias of its own."""
    errors = []
    for gain in (1.0, 1e-3, 0.0):
        teacher = make("gpt2", "LMHeadModel", **untied("gpt2"))
        student = make("gpt2", "LMHeadModel", 1, **untied("gpt2"), hidden_size=width, num_attention_heads=width // 8)
        with torch.no_grad():
            teacher.get_parameter("transformer.ln_f.weight")[3] = gain
            teacher.get_parameter("transformer.ln_f.bias")[3] = 1.0
        started = start(student, teacher, "gpt2")
        assert torch.isfinite(started.matrix(FINAL)).all()
        expected = outputs(teacher, "gpt2")
        errors.append(float((outputs(student, "gpt2") - expected).norm() / expected.norm()))
    assert errors[1] < 1.2 * errors[0] + 1e-6
    assert errors[2] < 1.2 * errors[0] + 0.12  # no weight of the head is left that could carry it


def test_every_described_family_is_tested() -> None:
    assert set(families._FAMILIES) == {name.split(",")[0] for name in FAMILIES}


def test_directions_that_the_output_head_reads_are_kept() -> None:
    teacher, student = make("llama", "ForCausalLM"), make("llama", "ForCausalLM", 1, hidden_size=24)
    batches = [inputs("llama", count=12)]
    read_D = torch.linalg.eigh(state_moments(Layout.of(student, teacher), batches, [2])[0])[1][:, 0]
    kept = {}
    for basis, gram_DD in (("pca", None), ("logits", 1e-9 * torch.eye(32) + torch.outer(read_D, read_D))):
        started = initialize(Layout.of(student, teacher), batches, BasisChoice(basis, gram_DD=gram_DD))
        kept[basis] = float((read_D @ started.basis_DR.double()).square().sum())
    assert kept["logits"] > 0.99 > 0.9 > kept["pca"]


def correlation(mine_NR: torch.Tensor, theirs_NR: torch.Tensor) -> float:
    """Mean cosine of two models' states after their means."""
    return float(torch.cosine_similarity(mine_NR - mine_NR.mean(0), theirs_NR - theirs_NR.mean(0), dim=-1).mean())


# ---- What is kept ----


def zero_columns(model: nn.Module, map_name: str, columns: torch.Tensor) -> None:
    """In all blocks, let a map ignore some of its inputs."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(map_name):
                weight = module.get_parameter("weight")
                view = weight.T if type(module).__name__ == "Conv1D" else weight
                view[:, columns] = 0.0


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
def test_head_groups_and_neurons_without_effect_are_the_ones_dropped(family: str) -> None:
    teacher = make(family, "ForCausalLM", num_attention_heads=8, num_key_value_heads=4)
    zero_columns(teacher, "o_proj", torch.arange(8 * 2, 8 * 6))  # the second and third group of two heads
    zero_columns(teacher, "down_proj", torch.arange(0, 48, 3))
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    student = make(family, "ForCausalLM", seed=1, **sizes)
    started = start(student, teacher, family, "identity")
    torch.testing.assert_close(outputs(student, family), outputs(teacher, family), rtol=0, atol=1e-9)
    assert started.kept == {"heads": (4, 8), "key-value heads": (2, 4), "neurons": (32, 48)}


@pytest.mark.parametrize(
    ("family", "query", "output"),
    [
        ("bert", "self.query", "attention.output.dense"),
        ("distilbert", "attention.q_lin", "attention.out_lin"),
        ("mpnet", "attn.q", "attention.attn.o"),
        ("gpt2", "attn.c_attn", "attn.c_proj"),
        ("gpt_neox", "attention.query_key_value", "attention.dense"),
    ],
)
def test_heads_without_effect_are_dropped_from_a_narrower_student(family: str, query: str, output: str) -> None:
    teacher, student = make(family), make(family, seed=1, **narrower(family))
    zero_columns(teacher, output, torch.arange(8, 16))
    with torch.no_grad():  # the query's bias tells heads apart
        for name, module in teacher.named_modules():
            if name.endswith(("ln_1", "input_layernorm")) and getattr(module, "bias", None) is not None:
                module.get_parameter("bias").zero_()
            if name.endswith(query):
                bias = module.get_parameter("bias")
                maps, size = (1, len(bias) // 4) if family == "gpt_neox" else (len(bias) // 32, 8)
                bias.copy_(torch.arange(4.0).repeat_interleave(size).repeat(maps))
    start(student, teacher, family)
    for name, module in student.named_modules():
        if name.endswith(query):
            assert module.get_parameter("bias").unique().tolist() == [0, 2, 3]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_the_router_never_chooses_are_dropped(family: str) -> None:
    teacher = make(family, "ForCausalLM")
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter.add_(5.0)
            if name.endswith("mlp.gate.weight"):
                parameter[1] = -100.0
    count = {"num_local_experts" if family == "mixtral" else "num_experts": 3}
    student = make(family, "ForCausalLM", seed=1, **count)
    started = start(student, teacher, family, "identity")
    torch.testing.assert_close(outputs(student, family), outputs(teacher, family), rtol=0, atol=1e-9)
    assert started.kept["experts"] == (3, 4)


def test_an_expert_that_only_padding_chooses_is_dropped() -> None:
    teacher, student = make("mixtral", "ForCausalLM"), make("mixtral", "ForCausalLM", 1, num_local_experts=3)
    embeddings = teacher.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        embeddings.add_(5.0)[0] -= 10.0
        for block in (0, 1):
            teacher.get_parameter(f"model.layers.{block}.mlp.gate.weight")[1] = -100.0
    batch = inputs("mixtral", count=8)
    batch["attention_mask"][:, 2:] = 0
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    initialize(Layout.of(student, teacher), [batch], BasisChoice("identity"))
    torch.testing.assert_close(outputs(student, "mixtral"), outputs(teacher, "mixtral"), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_neurons_of_experts_without_effect_are_dropped(family: str) -> None:
    size = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    teacher, student = make(family, "ForCausalLM", **{size: 48}), make(family, "ForCausalLM", 1, **{size: 32})
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("experts.down_proj"):
                parameter[..., ::3] = 0.0
    start(student, teacher, family, "identity")
    torch.testing.assert_close(outputs(student, family), outputs(teacher, family), rtol=0, atol=1e-9)


# ---- Tied embeddings, tables of other lengths, layer maps ----


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "ForCausalLM"), ("gpt2", "LMHeadModel"), ("gemma", "ForCausalLM")]
)
def test_tied_embeddings_are_rotated_and_the_final_norm_is_fitted(family: str, head: str) -> None:
    """The student's matrix is E Q, and stands for both; Gemma multiplies embeddings by the root of the width, which the
    matrix makes up for and the final norm takes back."""
    teacher, student = (
        make(family, head, tie_word_embeddings=True),
        make(family, head, 1, tie_word_embeddings=True, **narrower(family)),
    )
    started = start(student, teacher, family)
    basis = started.basis_DR.double()
    embeddings: Any = [model.get_input_embeddings().weight for model in (teacher, student)]  # type: ignore[operator]
    scale = (32 / 24) ** 0.5 if family in GEMMAS else 1.0
    torch.testing.assert_close(embeddings[1], embeddings[0] @ basis * scale)
    assert student.get_submodule("lm_head").weight is embeddings[1]

    names = ("model.norm", "transformer.ln_f")
    norm, mine = (next(m for name, m in model.named_modules() if name in names) for model in (teacher, student))
    given: list[torch.Tensor] = []
    handle = norm.register_forward_hook(lambda module, args, output: given.append(args[0].detach()))
    for seed in range(4):
        batch = inputs(family, seed=seed)
        teacher(**batch)
        given[-1] = given[-1][batch["attention_mask"].bool()]
    handle.remove()
    hidden_ND = torch.cat(given)
    target_NR = norm(hidden_ND).detach() @ basis
    with torch.no_grad():
        made_NR = mine(hidden_ND @ basis) * scale
        # least squares: what is left over is orthogonal to what the gain multiplies
        left_over_R = ((made_NR - target_NR) * made_NR).mean(0)
    torch.testing.assert_close(left_over_R, torch.zeros_like(left_over_R), rtol=0, atol=1e-5)
    assert (torch.cosine_similarity(made_NR, target_NR, dim=0) > 0.5).all()


def test_tied_embeddings_stay_exact_when_the_final_gain_is_one_number() -> None:
    for family in ("llama", "gemma"):
        teacher, student = (make(family, "ForCausalLM", seed, tie_word_embeddings=True) for seed in (0, 1))
        nn.init.constant_(teacher.get_parameter("model.norm.weight"), 0.7)
        start(student, teacher, family)
        expected = outputs(teacher, family)
        torch.testing.assert_close(outputs(student, family), expected, rtol=0, atol=2e-5 * float(expected.std()))


def test_tables_of_other_lengths_share_their_first_rows() -> None:
    teacher, student = make("gpt2", "LMHeadModel"), make("gpt2", "LMHeadModel", 1, vocab_size=56, n_positions=16)
    padding = student.get_parameter("transformer.wte.weight")[50:].detach().clone()
    start(student, teacher, "gpt2", "identity")
    wte, wpe = (student.get_parameter(f"transformer.{name}.weight") for name in ("wte", "wpe"))
    assert torch.equal(wte[:50], teacher.get_parameter("transformer.wte.weight"))
    assert torch.equal(wte[50:], padding)
    assert torch.equal(wpe, teacher.get_parameter("transformer.wpe.weight")[:16])


@pytest.mark.parametrize(
    ("student", "teacher", "pairs", "expected"),
    [
        (2, 4, [], [2, 4]),
        (3, 4, [], [1, 3, 4]),
        (4, 6, [(2, 2)], [1, 2, 4, 6]),
        (2, 6, [(1, 2), (FINAL, FINAL)], [2, 6]),
    ],
)
def test_blocks_between_those_of_the_layer_map_are_paired_in_proportion(
    student: int, teacher: int, pairs: list[tuple[Any, Any]], expected: list[int]
) -> None:
    assert block_pairs(student, teacher, pairs) == expected


@pytest.mark.parametrize(("student", "teacher"), [(2, 4), (3, 4), (6, 7), (7, 12), (10, 26), (12, 26), (22, 29)])
def test_the_number_of_stages_does_not_change_which_blocks_are_copied(student: int, teacher: int) -> None:
    expected = [place for _, place in uniform_layer_map(student, teacher)]
    assert block_pairs(student, teacher) == expected
    for stages in range(1, student + 1):
        pairs = [*uniform_layer_map(student, teacher, stages), (FINAL, FINAL)]
        assert block_pairs(student, teacher, pairs) == expected, stages


@pytest.mark.parametrize(
    ("student", "pairs", "expected", "repeated", "instead"),
    [
        (3, [(2, 4)], [2, 4, 4], "2:4, 3:4", "2:3"),
        (4, [(2, 1)], [1, 1, 2, 4], "1:1, 2:1", "2:2"),
        (3, [(FINAL, FINAL), (1, 1), (3, 2)], [1, 2, 2], "2:2, 3:2", "1:1,3:4"),
        (2, [(1, 3), (2, 3)], [3, 3], "1:3, 2:3", "1:2,2:4"),
    ],
)
def test_a_layer_map_that_copies_a_block_twice_gets_a_warning(
    student: int, pairs: list[tuple[Any, Any]], expected: list[int], repeated: str, instead: str
) -> None:
    message = (
        rf"blocks of the student start from one of the teacher .student:teacher {repeated}.*e.g. layer_map={instead}$"
    )
    with pytest.warns(UserWarning, match=message):
        assert block_pairs(student, 4, pairs) == expected
    mapped = [tuple(map(int, pair.split(":"))) for pair in instead.split(",")]
    assert len(set(block_pairs(student, 4, mapped))) == student  # without a warning
