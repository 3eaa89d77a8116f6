"""Tiny random models of the architectures that transformers knows: their default configuration, made small by the names of
its fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "composite": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
AUTO = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "composite": "AutoModelForImageTextToText",
}

# What fields are made, by a pattern of their name; the first that fits counts.
SMALL: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?|n_vocab|vocabulary_size|.*_byte_group_vocab", 96),
    (r"(.*_)?num_key_value_heads|num_kv_heads|n_head_kv|attn_num_kv_heads", 2),
    (r"(num|n)_(hidden_|encoder_|decoder_)?layers?|(encoder|decoder)_layers|depth|num_blocks", 4),
    (r"(.*_)?(attention_heads|num_heads|n_heads?|num_head)", 4),
    (r"qk_head_dim", 16),
    (r"(.*_)?head_dim|d_kv|d_head|(.*_)?head_size|rotary_dim|hidden_size_per_layer_input", 8),
    (r"n_routed_experts|num_(local_)?experts|moe_num_experts|num_routed_experts|zero_expert_num", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts", 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length", 64),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dim_ff|d_inner|n_inner)", 48),
    (r"hidden_size|n_embd|d_model|dim|emb_dim|embed_dim|model_dim|(.*_)?(embedding_size|hidden_dim|lru_width)", 32),
    (r"(.*_)?(embed_dim|hidden_size|embed_size)|coordinate_size|shape_size|d_latents|input_dim", 32),
    (r"n_groups?", 2),
    (r"topk_group", 1),
    (r"image_size|(.*_)?lora_rank", 16),
    (r"patch_size", 8),
)
# Where a default is None, but a model cannot be built without a value.
NEEDED = {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2, "vocab_size": 96, "pad_token_id": 0}


def tiny_config(config_class: type[PreTrainedConfig], **fields: Any) -> PreTrainedConfig:
    """A configuration of that class with small sizes; `fields` are set as given."""
    values: dict[str, Any] = {}
    defaults = _defaults(config_class)
    inside = config_class.sub_configs or {}
    for name, default in defaults.items():
        if name in inside:
            continue
        if default is None and name in NEEDED:
            values[name] = NEEDED[name]
        elif isinstance(default, int) and not isinstance(default, bool):
            small = next((size for pattern, size in SMALL if re.fullmatch(pattern, name)), None)
            if name.endswith(("token_id", "token_index")):
                small = 3
            if small is not None and default > small:
                values[name] = small
    if defaults.get("num_key_value_heads", 0) == defaults.get("num_attention_heads"):
        values["num_key_value_heads"] = values["num_attention_heads"]
    whole = config_class() if inside else None
    for name in inside:
        kind = type(getattr(whole, name, None))
        if name not in fields and issubclass(kind, PreTrainedConfig):
            values[name] = tiny_config(kind, **FIELDS.get(kind.model_type, {}))
    return config_class(**{**values, **fields})


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    if dataclasses.is_dataclass(config_class):
        return {f.name: f.default for f in dataclasses.fields(config_class)}
    return {name: p.default for name, p in inspect.signature(config_class.__init__).parameters.items()}


_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What a model type needs beyond small sizes.
FIELDS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8},
    "neomme": {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "qwen2_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen2_5_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def config_of(kind: str, name: str) -> PreTrainedConfig:
    """A small configuration of a model type; that of a causal model is one of a decoder."""
    config_class = CONFIG_MAPPING[name]
    fields = dict(FIELDS.get(name, {}))
    if "is_decoder" in _defaults(config_class) and name != "xlm":
        fields["is_decoder"] = kind == "causal"
    return tiny_config(config_class, **fields)


def build(kind: str, name: str) -> PreTrainedModel:
    """A random model in evaluation mode; ValueError where it would have more than 5 million parameters."""
    config, auto_class = config_of(kind, name), getattr(transformers, AUTO[kind])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())
    if size > 5_000_000:
        raise ValueError(
            f"{name} has {size:,} parameters: its configuration is not made small by the names of its fields"
        )
    torch.manual_seed(0)
    return vary(auto_class.from_config(config).eval())


@torch.no_grad()
def vary(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with random biases and scales: at their initial zeros and ones they would not show where they are applied."""
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("bias")]
    for vector in (*model.parameters(), *biases):
        if vector.dim() == 1 and vector.is_floating_point():
            vector += (0.1 if bool((vector == 1).all()) else 0.3) * torch.randn_like(vector)
    return model
