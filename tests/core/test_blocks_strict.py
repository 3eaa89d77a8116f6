"""Finding blocks and stopping at a place, against the hidden states that every architecture reports itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tutelage.core.blocks import HEAD, Blocks, find_blocks, forward_to, output_head
from tutelage.core.heads import OutputHead

DEPTH, WIDTH, VOCAB = 3, 32, 99
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GROUPED_8 = {**GROUPED, "head_dim": 8}
T5_SIZES: dict[str, Any] = {
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": DEPTH,
    "num_heads": 4,
    "vocab_size": VOCAB,
}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class UserModel(nn.Module):
    """What someone may bring: an embedding, a ModuleList, a final norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Residual() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden=hidden)
        return self.head(self.norm(hidden))


def mlp() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)))


# name -> (builder, name of the container of blocks, final norm that the model's last hidden state has had)
MODELS: dict[str, tuple[Callable[[], nn.Module], str, str | None]] = {
    "bert": (lambda: BertForMaskedLM(BertConfig(**SIZES)), "bert.encoder.layer", None),
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)), "roberta.encoder.layer", None),
    "distilbert": (
        lambda: DistilBertForMaskedLM(
            DistilBertConfig(dim=WIDTH, n_layers=DEPTH, n_heads=4, hidden_dim=48, vocab_size=VOCAB)
        ),
        "distilbert.transformer.layer",
        None,
    ),
    "mpnet": (lambda: MPNetForMaskedLM(MPNetConfig(**SIZES)), "mpnet.encoder.layer", None),
    "modernbert": (
        lambda: ModernBertForMaskedLM(
            ModernBertConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
        ),
        "model.layers",
        "model.final_norm",
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=WIDTH, n_layer=DEPTH, n_head=4, vocab_size=VOCAB, bos_token_id=1, eos_token_id=1)
        ),
        "transformer.h",
        "transformer.ln_f",
    ),
    "gpt_neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), "gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(
                hidden_size=WIDTH,
                num_hidden_layers=DEPTH,
                ffn_dim=48,
                num_attention_heads=4,
                vocab_size=VOCAB,
                word_embed_proj_dim=WIDTH,
                pad_token_id=0,
            )
        ),
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**GROUPED_8)), "model.layers", "model.norm"),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)), "model.layers", "model.norm"),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED_8)), "model.layers", "model.norm"),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**GROUPED_8)), "model.layers", "model.norm"),
    "gemma2": (  # a cap low enough to bend the logits of a random model
        lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED_8, final_logit_softcapping=0.05)),
        "model.layers",
        "model.norm",
    ),
    "t5": (lambda: T5EncoderModel(T5Config(**T5_SIZES)), "encoder.block", "encoder.final_layer_norm"),
    "bert_classifier": (
        lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=5)),
        "bert.encoder.layer",
        None,
    ),
    "roberta_classifier": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=5)),
        "roberta.encoder.layer",
        None,
    ),
    "vit": (
        lambda: ViTForImageClassification(
            ViTConfig(
                hidden_size=WIDTH,
                num_hidden_layers=DEPTH,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=32,
                patch_size=8,
                num_labels=5,
            )
        ),
        "vit.layers",
        None,
    ),
    "mlp": (mlp, "", None),
    "user": (UserModel, "layers", None),
}
HEADLESS = ("t5", "mlp")
every_model = pytest.mark.parametrize("name", MODELS)
every_head = pytest.mark.parametrize("name", [name for name in MODELS if name not in HEADLESS])


@functools.cache
def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def inputs_of(name: str) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Positional and named inputs of a forward."""
    generator = torch.Generator().manual_seed(1)
    if name == "mlp":
        return (torch.randn(5, WIDTH, generator=generator),), {}
    if name == "vit":
        return (), {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids = torch.randint(5, VOCAB, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return (), {"input_ids": ids, "attention_mask": mask}


def full_forward(name: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """All hidden states, by the model's own account, and the outputs (logits where there are any)."""
    model, (args, inputs) = built(name), inputs_of(name)
    if isinstance(model, nn.Sequential):
        states = [args[0]]
        for block in model:
            states.append(block(states[-1]))
        return states, states[-1]
    if isinstance(model, UserModel):
        states = [model.embed(inputs["input_ids"])]
        for layer in model.layers:
            states.append(layer(states[-1]))
        return states, model(**inputs)
    output = model(**inputs, output_hidden_states=True)
    return list(output.hidden_states), output.logits if "logits" in output else output.last_hidden_state


def run_to(name: str, place: int | str) -> torch.Tensor:
    args, inputs = inputs_of(name)
    return forward_to(built(name), place, *args, **inputs)


def comparable(name: str, place: int) -> torch.Tensor:
    """`forward_to(place)`, with the final norm where `hidden_states` has had it."""
    hidden, norm = run_to(name, place), MODELS[name][2]
    return built(name).get_submodule(norm)(hidden) if norm is not None and place == DEPTH else hidden


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[str]]:
    """Names of the submodules that ran to their end, in that order."""
    names: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: names.append(name)

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


@every_model
def test_blocks_are_found(name: str) -> None:
    container = MODELS[name][1]
    prefix = f"{container}." if container else ""
    blocks = find_blocks(built(name))
    assert blocks == Blocks(tuple(f"{prefix}{index}" for index in range(DEPTH)))
    assert len(blocks) == DEPTH
    assert blocks.module(built(name), 2) is built(name).get_submodule(f"{prefix}1")


@every_model
@torch.no_grad()
def test_state_equals_the_models_own_at_every_place(name: str) -> None:
    states, _ = full_forward(name)
    assert len(states) == DEPTH + 1
    for place, expected in enumerate(states):
        torch.testing.assert_close(comparable(name, place), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][2] is not None])
@torch.no_grad()
def test_last_state_is_the_one_before_the_final_norm(name: str) -> None:
    states, _ = full_forward(name)
    assert not torch.allclose(run_to(name, DEPTH), states[DEPTH])


@every_model
@pytest.mark.parametrize("place", range(DEPTH + 1))
def test_gradients_equal_those_of_a_full_forward(name: str, place: int) -> None:
    model = built(name)
    parameters = dict(model.named_parameters())

    def gradients(hidden: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        if not hidden.requires_grad:  # what enters a plain MLP
            return (None,) * len(parameters)
        return torch.autograd.grad((hidden * weights).sum(), list(parameters.values()), allow_unused=True)

    stopped, full = gradients(comparable(name, place)), gradients(full_forward(name)[0][place])
    assert (name, place) == ("mlp", 0) or any(gradient is not None for gradient in stopped)
    for parameter, ours, theirs in zip(parameters, stopped, full, strict=True):
        assert (ours is None) == (theirs is None), parameter
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, msg=lambda text, at=parameter: f"{at}: {text}")


@every_head
@torch.no_grad()
def test_head_place_and_output_head_give_the_models_logits(name: str) -> None:
    _, logits = full_forward(name)
    torch.testing.assert_close(OutputHead.of(built(name))(run_to(name, HEAD)), logits)


@torch.no_grad()
def test_soft_capping_bends_the_logits_of_the_gemma_case() -> None:
    head = OutputHead.of(built("gemma2"))
    assert head.softcap == 0.05
    hidden = run_to("gemma2", HEAD)
    assert float(head(hidden).abs().max()) <= 0.05 < float(head.linear(hidden).abs().max())


@pytest.mark.parametrize("name", HEADLESS)
@torch.no_grad()
def test_head_place_of_a_model_without_head_is_its_output(name: str) -> None:
    assert output_head(built(name)) is None
    torch.testing.assert_close(run_to(name, HEAD), full_forward(name)[1], rtol=0, atol=0)


@every_model
@torch.no_grad()
def test_nothing_deeper_runs(name: str) -> None:
    model, blocks, head, norm = built(name), find_blocks(built(name)), output_head(built(name)), MODELS[name][2]
    args, inputs = inputs_of(name)

    def within(executed: list[str], block: int) -> list[str]:
        return [at for at in executed if at == blocks.names[block - 1] or at.startswith(blocks.names[block - 1] + ".")]

    with recorded(model) as everything:
        model(*args, **inputs)
    for place in range(DEPTH + 1):
        with recorded(model) as executed:
            run_to(name, place)
        assert executed == everything[: len(executed)]
        for block in range(1, DEPTH + 1):
            assert executed.count(blocks.names[block - 1]) == (block <= place)
            assert bool(within(executed, block)) == (block <= place)
        assert norm not in executed
        assert head is None or head[0] not in executed
        if place > 0:
            assert executed[-1] == blocks.names[place - 1]
    if head is not None:
        with recorded(model) as executed:
            run_to(name, HEAD)
        assert [executed.count(block) for block in blocks.names] == [1] * DEPTH
        assert norm is None or executed.count(norm) == 1
        assert head[0] not in executed and everything.count(head[0]) == 1


@pytest.mark.parametrize("name", ["bert", "llama", "mlp", "user"])
@pytest.mark.parametrize("place", [0, 2, HEAD])
@torch.no_grad()
def test_hooks_are_removed(name: str, place: int | str) -> None:
    model = built(name)
    full_forward(name)  # transformers leaves hooks of its own once it has been asked for hidden states
    before = hook_count(model)
    run_to(name, place)
    assert hook_count(model) == before
    full_forward(name)  # and the model still runs to its end


@pytest.mark.parametrize("place", [1, 3, HEAD])
def test_hooks_are_removed_after_an_exception(place: int | str) -> None:
    model = built("user")

    def fail(*_: Any) -> None:
        assert hook_count(model) == 2  # this one, and the one that stops the forward
        raise ArithmeticError("in the embedding")

    handle = model.embed.register_forward_hook(fail)
    try:
        with pytest.raises(ArithmeticError, match="in the embedding"):
            run_to("user", place)
    finally:
        handle.remove()
    assert hook_count(model) == 0


def test_given_blocks_are_used() -> None:
    model, inputs = built("user"), inputs_of("user")[1]
    reversed_blocks = Blocks(tuple(reversed(find_blocks(model).names)))
    torch.testing.assert_close(
        forward_to(model, 1, blocks=reversed_blocks, **inputs), forward_to(model, DEPTH, **inputs), rtol=0, atol=0
    )


def test_a_place_that_the_forward_skips() -> None:
    class Skips(UserModel):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(input_ids))

    model = Skips()
    with pytest.raises(ValueError, match=r"the forward of Skips never reached Residual with these inputs"):
        forward_to(model, 2, **inputs_of("user")[1])
    assert hook_count(model) == 0


@pytest.mark.parametrize("place", [-1, DEPTH + 1])
def test_block_out_of_range(place: int) -> None:
    with pytest.raises(
        ValueError, match=rf"no block {place} in UserModel: it has blocks 1 to 3 \(layers\.0 to layers\.2\)"
    ):
        run_to("user", place)


def test_unknown_place() -> None:
    with pytest.raises(ValueError, match=r"no place 'logits' in UserModel: use a block number or 'head'"):
        run_to("user", "logits")


def test_no_blocks() -> None:
    with pytest.raises(ValueError, match=r"found no blocks in Linear: .*name the list of blocks with `blocks=`"):
        find_blocks(nn.Linear(2, 2))


@functools.cache
def full_t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(**T5_SIZES))


def test_several_lists_of_blocks_are_all_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"T5ForConditionalGeneration has several lists of blocks: "
        r"encoder\.block \(3 x T5Block\), decoder\.block \(3 x T5Block\); "
        r"name one with `blocks=`, e\.g\. blocks='encoder\.block'",
    ):
        find_blocks(full_t5())


@pytest.mark.parametrize("container", ["encoder.block", "decoder.block"])
def test_container_resolves_the_ambiguity(container: str) -> None:
    assert find_blocks(full_t5(), container).names == tuple(f"{container}.{index}" for index in range(DEPTH))


@pytest.mark.parametrize("container", ["encoder", "nowhere.block", "shared"])
def test_container_that_is_no_list(container: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"'{container}' is not a list of blocks of T5ForConditionalGeneration; "
        r"candidates: encoder\.block \(3 x T5Block\), decoder\.block \(3 x T5Block\)",
    ):
        find_blocks(full_t5(), container)


def test_container_that_is_no_list_of_a_model_with_none() -> None:
    with pytest.raises(ValueError, match=r"'weight' is not a list of blocks of Linear; candidates: none"):
        find_blocks(nn.Linear(2, 2), "weight")


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.feed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_lists_within_a_block_do_not_count() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(Mixture() for _ in range(2))
    assert find_blocks(model).names == ("layers.0", "layers.1")


def test_lists_without_parameters_do_not_count() -> None:
    model = nn.Module()
    model.dropouts = nn.ModuleList(nn.Dropout() for _ in range(4))
    model.empty = nn.ModuleList()
    model.layers = nn.ModuleList(Residual() for _ in range(2))
    assert find_blocks(model).names == ("layers.0", "layers.1")


def test_depth_in_the_config_decides_between_lists() -> None:
    model = nn.Module()
    model.convolutions = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
    model.layers = nn.ModuleList(Residual() for _ in range(2))
    with pytest.raises(ValueError, match=r"convolutions \(5 x Linear\), layers \(2 x Residual\)"):
        find_blocks(model)
    model.config = SimpleNamespace(num_hidden_layers=2)
    assert find_blocks(model).names == ("layers.0", "layers.1")


def test_hybrid_list_counts_at_the_depth_of_the_config() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Residual(), Mixture(), Residual()])
    with pytest.raises(ValueError, match="found no blocks in Module"):  # nor do the experts inside it count
        find_blocks(model)
    model.config = SimpleNamespace(num_hidden_layers=3)
    assert find_blocks(model).names == ("layers.0", "layers.1", "layers.2")


def test_model_without_head_at_the_head_place() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval()
    inputs = inputs_of("bert")[1]
    torch.testing.assert_close(forward_to(model, HEAD, **inputs), model(**inputs).last_hidden_state, rtol=0, atol=0)
