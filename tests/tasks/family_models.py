"""Tiny models of every family that a student can be initialised in, with weights in which nothing is trivial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

VOCAB, POSITIONS = 50, 24
_DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": POSITIONS}
_GEMMA = {**_DECODER, "query_pre_attn_scalar": 8, "sliding_window": 8}
_MOE = {**_DECODER, "num_experts_per_tok": 2, "experts_implementation": "eager"}
_ENCODER = {name: _DECODER[name] for name in _DECODER if name not in ("num_key_value_heads", "head_dim")}
_DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB}
_GPT2 = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": POSITIONS}
_VIT = {**{n: _ENCODER[n] for n in list(_ENCODER)[:4]}, "image_size": 8, "patch_size": 4}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

# model type: stem of the class names, sizes, heads
FAMILIES: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "llama": ("Llama", _DECODER, "ForCausalLM ForSequenceClassification"),
    "mistral": ("Mistral", _DECODER, "ForCausalLM ForSequenceClassification"),
    "qwen2": ("Qwen2", _DECODER, "ForCausalLM ForSequenceClassification"),
    "qwen3": ("Qwen3", _DECODER, "ForCausalLM ForSequenceClassification"),
    "smollm3": ("SmolLM3", _DECODER, "ForCausalLM ForSequenceClassification"),
    "phi3": ("Phi3", _DECODER, "ForCausalLM ForSequenceClassification"),
    "gemma": ("Gemma", _DECODER, "ForCausalLM ForSequenceClassification"),
    "gemma2": ("Gemma2", _GEMMA, "ForCausalLM ForSequenceClassification"),
    "gemma3_text": ("Gemma3", _GEMMA, "ForCausalLM"),
    "mixtral": ("Mixtral", {**_MOE, "num_local_experts": 4}, "ForCausalLM ForSequenceClassification"),
    "qwen3_moe": (
        "Qwen3Moe",
        {**_MOE, "num_experts": 4, "moe_intermediate_size": 24},
        "ForCausalLM ForSequenceClassification",
    ),
    "bert": ("Bert", _ENCODER, "ForSequenceClassification ForMaskedLM"),
    "roberta": ("Roberta", _ENCODER, "ForSequenceClassification ForMaskedLM"),
    "xlm-roberta": ("XLMRoberta", _ENCODER, "ForSequenceClassification ForMaskedLM"),
    "camembert": ("Camembert", _ENCODER, "ForSequenceClassification"),
    "distilbert": (
        "DistilBert",
        {**_DISTILBERT, "max_position_embeddings": POSITIONS},
        "ForSequenceClassification ForMaskedLM",
    ),
    "mpnet": ("MPNet", _ENCODER, "ForSequenceClassification ForMaskedLM"),
    "electra": ("Electra", {**_ENCODER, "embedding_size": 32}, "ForSequenceClassification ForMaskedLM"),
    "electra, projected": ("Electra", {**_ENCODER, "embedding_size": 16}, "ForSequenceClassification ForMaskedLM"),
    "modernbert": ("ModernBert", {**_ENCODER, "local_attention": 8}, "ForSequenceClassification ForMaskedLM"),
    "gpt2": ("GPT2", _GPT2, "ForSequenceClassification LMHeadModel"),
    "gpt_neox": ("GPTNeoX", _ENCODER, "ForCausalLM ForSequenceClassification"),
    "vit": ("ViT", _VIT, "ForImageClassification"),
}
RMS = list(FAMILIES)[:11]
POST_NORM = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet", "electra", "electra, projected"]
CASES = [(name, head) for name, (_, _, heads) in FAMILIES.items() for head in ("Model", *heads.split())]


def make(family: str, head: str = "Model", seed: int = 0, **sizes: Any) -> nn.Module:
    """A model in float64 whose every parameter is perturbed, so that no gain is one and no bias zero.

    `sizes` may use the names of other families for width, depth, and feed-forward."""
    stem, own, _ = FAMILIES[family]
    text = "Text" if stem == "Gemma3" and head == "Model" else ""
    config_class = getattr(transformers, f"{stem}TextConfig" if stem == "Gemma3" else f"{stem}Config")
    settings = {**(_SPECIAL if family != "vit" else {}), **own, "attn_implementation": "eager", "num_labels": 3}
    if family not in ("gpt2", "vit", "distilbert", *RMS):
        settings["initializer_range"] = 0.2
    config = config_class(**{**settings, **{_name(own, field): value for field, value in sizes.items()}})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}{text}{head}")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


_ALIASES = {
    "hidden_size": "dim n_embd",
    "num_hidden_layers": "n_layers n_layer",
    "num_attention_heads": "n_heads n_head",
}
_ALIASES |= {"intermediate_size": "hidden_dim n_inner"}


def _name(own: Mapping[str, Any], field: str) -> str:
    return next((name for name in _ALIASES.get(field, "").split() if name in own), field)


def inputs(family: str, count: int = 6, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch; the last rows of text end in padding, except for images."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(2 * count, 3, 8, 8, generator=generator, dtype=torch.float64)}
    tokens = torch.randint(3, VOCAB, (count, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-2:, length - 4 :] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


@torch.no_grad()
def outputs(model: nn.Module, family: str) -> torch.Tensor:
    """A model's outputs on a batch, at non-padding positions."""
    batch = inputs(family, seed=2)
    found = model(**batch)
    output = found.logits if hasattr(found, "logits") else found.last_hidden_state
    mask = batch.get("attention_mask")
    return output[mask.bool()] if mask is not None and output.dim() == 3 else output
