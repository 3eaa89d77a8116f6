"""Truncated forwards against each model's own hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
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
    MixtralConfig,
    MixtralForCausalLM,
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
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tutelage import find_blocks, forward_to
from tutelage.core.blocks import FINAL, head_module
from tutelage.core.heads import OutputHead

BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**BASE, "num_key_value_heads": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 99}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# name: (builder, dotted name of a final norm that the last entry of hidden_states has been through, or None)
MODELS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "bert": (lambda: BertForMaskedLM(BertConfig(**BASE)), None),
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**BASE)), None),
    "distilbert": (
        lambda: DistilBertForMaskedLM(
            DistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=48, vocab_size=99, pad_token_id=0)
        ),
        None,
    ),
    "mpnet": (lambda: MPNetForMaskedLM(MPNetConfig(**BASE)), None),
    "modernbert": (
        lambda: ModernBertForMaskedLM(ModernBertConfig(**BASE, cls_token_id=1, sep_token_id=2)),
        "model.final_norm",
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=99, **SPECIAL)),
        "transformer.ln_f",
    ),
    "gpt_neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**BASE)), "gpt_neox.final_layer_norm"),
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(
                hidden_size=32,
                num_hidden_layers=3,
                ffn_dim=48,
                num_attention_heads=4,
                vocab_size=99,
                word_embed_proj_dim=32,
                **SPECIAL,
            )
        ),
        "model.decoder.final_layer_norm",
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)), "model.norm"),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)), "model.norm"),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)), "model.norm"),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**GROUPED)), "model.norm"),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8)), "model.norm"),
    "mixtral": (lambda: MixtralForCausalLM(MixtralConfig(**GROUPED)), "model.norm"),
    "t5_encoder": (lambda: T5EncoderModel(T5Config(**T5)), "encoder.final_layer_norm"),
    "vit": (
        lambda: ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=32,
                patch_size=8,
            )
        ),
        None,
    ),
}


@functools.cache  # no test changes a model
def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], str | None]:
    torch.manual_seed(0)
    builder, norm = MODELS[name]
    model = builder().eval()
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, norm
    ids, mask = torch.randint(5, 99, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    return model, {"input_ids": ids, "attention_mask": mask}, norm


@pytest.mark.parametrize("name", MODELS)
def test_forward_to_equals_hidden_states(name: str) -> None:
    model, inputs, norm = build(name)
    blocks = find_blocks(model)
    assert len(blocks) == 3
    states = model(**inputs, output_hidden_states=True).hidden_states
    for place in range(4):
        reached = forward_to(model, place, **inputs)
        if place == 3 and norm is not None:
            reached = model.get_submodule(norm)(reached)
        torch.testing.assert_close(reached, states[place], rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_gradients_equal_those_through_the_whole_model(name: str, place: int) -> None:
    model, inputs, norm = build(name)
    parameters = list(model.parameters())
    state = forward_to(model, place, **inputs)
    if place == 3 and norm is not None:
        state = model.get_submodule(norm)(state)
    weight = torch.randn(state.shape, generator=torch.Generator().manual_seed(place))
    mine = torch.autograd.grad((state * weight).sum(), parameters, allow_unused=True)
    whole = model(**inputs, output_hidden_states=True).hidden_states[place]
    theirs = torch.autograd.grad((whole * weight).sum(), parameters, allow_unused=True)
    assert any(gradient is not None for gradient in mine)
    for left, right in zip(mine, theirs, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "t5_encoder"])
def test_head_place_and_output_head_give_the_models_logits(name: str) -> None:
    model, inputs, _ = build(name)
    if name == "gemma2":
        assert OutputHead.of(model).softcap == 30.0
    logits = OutputHead.of(model)(forward_to(model, FINAL, **inputs))
    torch.testing.assert_close(logits, model(**inputs).logits)


def test_head_place_without_a_head_is_the_last_hidden_state() -> None:
    model, inputs, _ = build("t5_encoder")
    torch.testing.assert_close(forward_to(model, FINAL, **inputs), model(**inputs).last_hidden_state, rtol=0, atol=0)
    with pytest.raises(ValueError, match="T5EncoderModel has no linear output head"):
        OutputHead.of(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", [0, 1, 2, 3, FINAL])
def test_nothing_deeper_is_executed(name: str, place: int | str) -> None:
    model, inputs, norm = build(name)
    counts = {module_name: 0 for module_name, _ in model.named_modules()}

    def count(module_name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[module_name] += 1

        return hook

    # forward hooks run once a module has finished
    handles = [module.register_forward_hook(count(n)) for n, module in model.named_modules()]
    blocks = find_blocks(model)
    forward_to(model, place, **inputs)
    for handle in handles:
        handle.remove()
    deepest = 3 if place == FINAL else place
    for number, block in enumerate(blocks.names, 1):
        inside = [counts[n] for n in counts if n == block or n.startswith(block + ".")]
        assert counts[block] == (1 if number <= deepest else 0)
        assert any(inside) == (number <= deepest)
    head = next((name for name, module in model.named_modules() if module is head_module(model)), None)
    assert norm is None or counts[norm] == (1 if place == FINAL else 0)
    assert head is None or counts[head] == 0


@pytest.mark.parametrize("place", [0, 2, FINAL])
def test_hooks_are_removed_even_after_an_error(place: int | str) -> None:
    model, inputs, _ = build("llama")

    def hooks() -> list[list[int]]:  # transformers leaves one of its own where it once gave hidden states out
        return [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]

    before = hooks()
    forward_to(model, place, **inputs)
    assert hooks() == before
    with pytest.raises(IndexError):
        forward_to(model, place, input_ids=torch.full((1, 3), 10_000))
    assert hooks() == before


def test_sequential_and_the_users_own_module() -> None:
    mlp = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    x = torch.randn(4, 5)
    assert find_blocks(mlp).names == ("0", "1", "2")
    torch.testing.assert_close(forward_to(mlp, 0, x), x)
    torch.testing.assert_close(forward_to(mlp, 1, x), mlp[0](x))
    torch.testing.assert_close(forward_to(mlp, 2, x), mlp[0](x).relu())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 2)
            self.parts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for part in self.parts:
                x = part(x).tanh()
            return self.head(x)

    own = Own()
    assert find_blocks(own).names == ("parts.0", "parts.1", "parts.2")
    torch.testing.assert_close(forward_to(own, 0, x), own.stem(x))
    torch.testing.assert_close(forward_to(own, 2, x), own.parts[1](own.parts[0](own.stem(x)).tanh()))
    torch.testing.assert_close(own.head(forward_to(own, FINAL, x)), own(x))


def test_ambiguous_and_missing_blocks_are_refused() -> None:
    both = T5ForConditionalGeneration(T5Config(**T5))
    with pytest.raises(ValueError, match=r"several lists of blocks: encoder.block \(3 x T5Block\), decoder.block"):
        find_blocks(both)
    assert find_blocks(both, "decoder.block").names[0] == "decoder.block.0"
    with pytest.raises(ValueError, match=r"'encoder.none' is not a list of blocks .* candidates: encoder.block"):
        find_blocks(both, "encoder.none")
    with pytest.raises(ValueError, match="found no blocks in Linear"):
        find_blocks(nn.Linear(2, 2))


def test_places_that_do_not_exist_are_refused() -> None:
    model, inputs, _ = build("gpt2")
    with pytest.raises(ValueError, match=r"no block 9 in GPT2LMHeadModel: it has blocks 1 to 3 \(transformer.h.0 to"):
        forward_to(model, 9, **inputs)
    with pytest.raises(ValueError, match="no block 0 in GPT2LMHeadModel"):  # a place, but no block
        find_blocks(model).module(model, 0)
    with pytest.raises(ValueError, match="no place 'middle' in GPT2LMHeadModel"):
        forward_to(model, "middle", **inputs)


class Experts(nn.Module):
    """A block with a list inside, which puts out a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.experts[0](hidden) + self.experts[1](hidden), None


class Listed(nn.Module):
    """Lists of modules under the names given; the forward runs `layers`, passing the state by keyword."""

    def __init__(self, depth: int | None = None, **lists: list[nn.Module]):
        super().__init__()
        for name, modules in lists.items():
            self.add_module(name, nn.ModuleList(modules))
        if depth is not None:
            self.config = LlamaConfig(num_hidden_layers=depth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x, _ = layer(hidden=x)
        return x


def test_lists_inside_a_block_do_not_count() -> None:
    model, x = Listed(layers=[Experts(), Experts()]), torch.randn(4, 6)
    assert find_blocks(model).names == ("layers.0", "layers.1")
    assert forward_to(model, 0, x) is x
    torch.testing.assert_close(forward_to(model, 1, x), model.layers[0](x)[0], rtol=0, atol=0)


def test_a_list_of_several_classes_counts_at_the_depth_of_the_config() -> None:
    layers = [nn.Linear(6, 6), Experts()]
    with pytest.raises(ValueError, match="found no blocks in Listed"):  # and not the experts of its second layer
        find_blocks(Listed(layers=layers))
    assert find_blocks(Listed(layers=layers), "layers").names == ("layers.0", "layers.1")
    assert find_blocks(Listed(depth=2, layers=layers)).names == ("layers.0", "layers.1")


def test_the_depth_of_the_config_decides_between_lists() -> None:
    def lists(*counts: int) -> dict[str, list[nn.Module]]:
        return {f"list{n}": [nn.Linear(6, 6) for _ in range(count)] for n, count in enumerate(counts)}

    assert find_blocks(Listed(depth=3, **lists(2, 3))).names == ("list1.0", "list1.1", "list1.2")
    for model in (Listed(**lists(2, 3)), Listed(depth=4, **lists(2, 3)), Listed(depth=3, **lists(3, 3))):
        with pytest.raises(ValueError, match=r"list1 \(3 x Linear\); name one with `blocks=`, e.g. blocks='list0'"):
            find_blocks(model)
    activations = Listed(acts=[nn.ReLU(), nn.ReLU()], layers=[nn.Linear(6, 6)])
    assert find_blocks(activations).names == ("layers.0",)  # a list without parameters holds no blocks


def test_a_container_without_blocks_is_refused() -> None:
    empty = Listed(layers=[])
    for container in ("layers", ""):
        with pytest.raises(ValueError, match=f"'{container}' is not a list of blocks of Listed; candidates: none"):
            find_blocks(empty, container)
    with pytest.raises(ValueError, match="found no blocks in Sequential"):
        find_blocks(nn.Sequential())


def test_a_block_that_the_forward_never_reaches() -> None:
    model = Listed(layers=[Experts()], spare=[Experts()])
    with pytest.raises(ValueError, match="the forward of Listed never reached Experts with these inputs"):
        forward_to(model, 1, torch.ones(4, 6), blocks=find_blocks(model, "spare"))
