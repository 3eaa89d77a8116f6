"""What reads and writes the residual stream in each family of transformers, as tables.

To add a family, write a `Family` and register it: `register_family("my_model", Family(...))`. Names of `block` are relative
to a block, names of `outside` are the ends of dotted names anywhere else. A *space* is what a dimension of a weight counts:

- `STREAM`: the residual stream.
- `QUERIES`, `KEYS`: the attention heads, and the key-value heads, times their size.
- `HEADS`: the attention heads, one entry each.
- `NEURONS`: the hidden layer of a feed-forward network.
- `POOLED`: the hidden layer of an output head.
- `EXPERTS`: the experts of a mixture.
- `POSITIONS`: learned positions. One of the models may have more.
- `SAME`: what student and teacher have in common (vocabulary, labels, the values of a head). One of the models may have more
  rows of an embedding or of an output head.

`a+b` is two spaces one after the other in one dimension, `a|b` head by head in turn."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tutelage.core.errors import UserError

STREAM, QUERIES, KEYS, HEADS = "stream", "queries", "keys", "heads"
NEURONS, POOLED, EXPERTS, POSITIONS, SAME = "neurons", "pooled", "experts", "positions", "same"
_QKV = f"{QUERIES}+{KEYS}+{KEYS}"


@dataclass(frozen=True)
class Linear:
    """A linear map with or without a bias; `reads` and `writes` are spaces."""

    reads: str
    writes: str


@dataclass(frozen=True)
class Tensor:
    """Parameters of other kinds: the spaces of the dimensions, by name or for all parameters of the module ("")."""

    dimensions: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream.

    With `readers` it stands before these maps (pre-norm), and its gain is folded into them. With a `writer` it normalises
    what this map writes, before that is added to the stream. With neither its output is the stream (post-norm)."""

    readers: tuple[str, ...] = ()
    writer: str | None = None


Rule = Linear | Tensor | Norm


@dataclass(frozen=True)
class Family:
    """How the models of a family are built."""

    block: Mapping[str, Rule]
    outside: Mapping[str, Rule]
    rms: bool = False  # whether norms are RMSNorm, which subtracts no mean
    gain_offset: float = 0.0  # what is added to the weight of a norm to give its gain (Gemma: 1)
    scaled_embeddings: bool = False  # whether token embeddings are multiplied by the root of the width (Gemma)
    same_heads: bool = False  # whether all blocks share something per head, so that all keep the same heads
    start_blocks: str = "uniform"  # default of the setting: decoders cannot do without their first blocks
    # by modules of `outside`: fields of the configuration that decide what these do and must be the teacher's
    decided_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def rows(space: str = STREAM, count: str = SAME) -> Tensor:
    """An embedding."""
    return Tensor({"weight": (count, space)})


def selected(space: str) -> Tensor:
    """A norm over a space other than the stream."""
    return Tensor({"": (space,)})


_COPIED = selected(SAME)


def _attention(names: str, reads: str = STREAM) -> dict[str, Rule]:
    """Query, key, value and output maps."""
    query, key, value, output = names.split()
    spaces = (Linear(reads, QUERIES), Linear(reads, KEYS), Linear(reads, KEYS), Linear(QUERIES, STREAM))
    return dict(zip((query, key, value, output), spaces, strict=True))


def _feed_forward(names: str) -> dict[str, Rule]:
    """The maps into the hidden layer, then the one out of it."""
    *into, out = names.split()
    return {**{name: Linear(STREAM, NEURONS) for name in into}, out: Linear(NEURONS, STREAM)}


_LAST_TOKEN = {"score": ("pad_token_id",)}  # a decoder's classifier reads the last token that is not the padding token
_QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Family(
    block={
        **_attention("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"),
        **_feed_forward("mlp.gate_proj mlp.up_proj mlp.down_proj"),
        "self_attn.q_norm": _COPIED,
        "self_attn.k_norm": _COPIED,
        "input_layernorm": Norm(readers=_QUERY_KEY_VALUE),
        "post_attention_layernorm": Norm(readers=("mlp.gate_proj", "mlp.up_proj")),
    },
    outside={
        "embed_tokens": rows(),
        "norm": Norm(readers=("lm_head", "score")),
        "lm_head": Linear(STREAM, SAME),
        "score": Linear(STREAM, SAME),
    },
    rms=True,
    start_blocks="ends",
    decided_by=_LAST_TOKEN,
)
_GEMMA = replace(
    _LLAMA,
    block={
        **_LLAMA.block,
        "post_attention_layernorm": Norm(writer="self_attn.o_proj"),
        "pre_feedforward_layernorm": Norm(readers=("mlp.gate_proj", "mlp.up_proj")),
        "post_feedforward_layernorm": Norm(writer="mlp.down_proj"),
    },
    gain_offset=1.0,
    scaled_embeddings=True,
)
_PHI3 = replace(
    _LLAMA,
    block={
        "self_attn.qkv_proj": Linear(STREAM, _QKV),
        "self_attn.o_proj": Linear(QUERIES, STREAM),
        "mlp.gate_up_proj": Linear(STREAM, f"{NEURONS}+{NEURONS}"),
        "mlp.down_proj": Linear(NEURONS, STREAM),
        "input_layernorm": Norm(readers=("self_attn.qkv_proj",)),
        "post_attention_layernorm": Norm(readers=("mlp.gate_up_proj",)),
    },
)
_MIXTURE = replace(
    _LLAMA,
    block={
        **_LLAMA.block,
        "mlp.gate": Linear(STREAM, EXPERTS),
        "mlp.experts": Tensor(
            {"gate_up_proj": (EXPERTS, f"{NEURONS}+{NEURONS}", STREAM), "down_proj": (EXPERTS, STREAM, NEURONS)}
        ),
        "post_attention_layernorm": Norm(
            readers=("mlp.gate", "mlp.experts.gate_up_proj", "mlp.gate_proj", "mlp.up_proj")
        ),
    },
)
_BERT = Family(
    block={
        **_attention("attention.self.query attention.self.key attention.self.value attention.output.dense"),
        **_feed_forward("intermediate.dense output.dense"),
        "attention.output.LayerNorm": Norm(),
        "output.LayerNorm": Norm(),
    },
    outside={
        "embeddings.word_embeddings": rows(),
        "embeddings.position_embeddings": rows(count=POSITIONS),
        "embeddings.token_type_embeddings": rows(),
        "embeddings.LayerNorm": Norm(),
        "pooler.dense": Linear(STREAM, POOLED),  # BERT
        "classifier": Linear(POOLED, SAME),
        "cls.predictions.transform.dense": Linear(STREAM, POOLED),
        "cls.predictions.transform.LayerNorm": selected(POOLED),
        "cls.predictions.decoder": Linear(POOLED, SAME),
        "cls.predictions": _COPIED,
        "classifier.dense": Linear(STREAM, POOLED),  # RoBERTa and ELECTRA
        "classifier.out_proj": Linear(POOLED, SAME),
        "lm_head.dense": Linear(STREAM, POOLED),  # RoBERTa
        "lm_head.layer_norm": selected(POOLED),
        "lm_head.decoder": Linear(POOLED, SAME),
        "lm_head": _COPIED,
        "generator_predictions.dense": Linear(STREAM, POOLED),  # ELECTRA
        "generator_predictions.LayerNorm": selected(POOLED),
        "generator_lm_head": Linear(POOLED, SAME),
    },
)
# positions are counted from the padding token's id on
_ROBERTA = replace(_BERT, decided_by={"embeddings.position_embeddings": ("pad_token_id",)})
_ELECTRA_PROJECTED = replace(
    _BERT,
    outside={
        **_BERT.outside,
        "embeddings.word_embeddings": rows(SAME),
        "embeddings.position_embeddings": rows(SAME, POSITIONS),
        "embeddings.token_type_embeddings": rows(SAME),
        "embeddings.LayerNorm": _COPIED,
        "embeddings_project": Linear(SAME, STREAM),
        "generator_predictions.LayerNorm": _COPIED,
        "generator_predictions.dense": Linear(STREAM, SAME),
        "generator_lm_head": Linear(SAME, SAME),
    },
    decided_by={"embeddings_project": ("embedding_size",)},
)
_DISTILBERT = Family(
    block={
        **_attention("attention.q_lin attention.k_lin attention.v_lin attention.out_lin"),
        **_feed_forward("ffn.lin1 ffn.lin2"),
        "sa_layer_norm": Norm(),
        "output_layer_norm": Norm(),
    },
    outside={
        "embeddings.word_embeddings": rows(),
        "embeddings.position_embeddings": rows(count=POSITIONS),
        "embeddings.LayerNorm": Norm(),
        "pre_classifier": Linear(STREAM, POOLED),
        "classifier": Linear(POOLED, SAME),
        "vocab_transform": Linear(STREAM, POOLED),
        "vocab_layer_norm": selected(POOLED),
        "vocab_projector": Linear(POOLED, SAME),
    },
)
_MPNET = replace(
    _BERT,
    block={
        **_attention("attention.attn.q attention.attn.k attention.attn.v attention.attn.o"),
        **_feed_forward("intermediate.dense output.dense"),
        "attention.LayerNorm": Norm(),
        "output.LayerNorm": Norm(),
    },
    outside={**_BERT.outside, "encoder.relative_attention_bias": rows(HEADS)},
    same_heads=True,
)
_MODERNBERT = Family(
    block={
        "attn.Wqkv": Linear(STREAM, _QKV),
        "attn.Wo": Linear(QUERIES, STREAM),
        "mlp.Wi": Linear(STREAM, f"{NEURONS}+{NEURONS}"),
        "mlp.Wo": Linear(NEURONS, STREAM),
        "attn_norm": Norm(readers=("attn.Wqkv",)),
        "mlp_norm": Norm(readers=("mlp.Wi",)),
    },
    outside={
        "embeddings.tok_embeddings": rows(),
        "embeddings.norm": Norm(),
        "final_norm": Norm(readers=("head.dense",)),
        "head.dense": Linear(STREAM, POOLED),
        "head.norm": selected(POOLED),
        "classifier": Linear(POOLED, SAME),
        "decoder": Linear(POOLED, SAME),
    },
    decided_by={"head.dense": ("classifier_activation",), "classifier": ("classifier_pooling",)},
)
_GPT2 = Family(
    block={
        "attn.c_attn": Linear(STREAM, _QKV),
        "attn.c_proj": Linear(QUERIES, STREAM),
        **_feed_forward("mlp.c_fc mlp.c_proj"),
        "ln_1": Norm(readers=("attn.c_attn",)),
        "ln_2": Norm(readers=("mlp.c_fc",)),
    },
    outside={
        "wte": rows(),
        "wpe": rows(count=POSITIONS),
        "ln_f": Norm(readers=("lm_head", "score")),
        "lm_head": Linear(STREAM, SAME),
        "score": Linear(STREAM, SAME),
    },
    start_blocks="ends",
    decided_by=_LAST_TOKEN,
)
_NEOX = Family(
    block={
        "attention.query_key_value": Linear(STREAM, f"{QUERIES}|{QUERIES}|{QUERIES}"),
        "attention.dense": Linear(QUERIES, STREAM),
        **_feed_forward("mlp.dense_h_to_4h mlp.dense_4h_to_h"),
        "input_layernorm": Norm(readers=("attention.query_key_value",)),
        "post_attention_layernorm": Norm(readers=("mlp.dense_h_to_4h",)),
    },
    outside={
        "embed_in": rows(),
        "final_layer_norm": Norm(readers=("lm_head", "embed_out", "score")),
        "lm_head": Linear(STREAM, SAME),
        "embed_out": Linear(STREAM, SAME),
        "score": Linear(STREAM, SAME),
    },
    start_blocks="ends",
    decided_by=_LAST_TOKEN,
)
_VIT = Family(
    block={
        **_attention("attention.q_proj attention.k_proj attention.v_proj attention.o_proj"),
        **_feed_forward("mlp.fc1 mlp.fc2"),
        "layernorm_before": Norm(readers=("attention.q_proj", "attention.k_proj", "attention.v_proj")),
        "layernorm_after": Norm(readers=("mlp.fc1",)),
    },
    outside={
        "embeddings": Tensor({"": (SAME, SAME, STREAM)}),
        "patch_embeddings.projection": Linear(SAME, STREAM),
        "layernorm": Norm(readers=("classifier",)),
        "pooler.dense": Linear(STREAM, POOLED),
        "classifier": Linear(STREAM, SAME),
    },
    decided_by={
        "patch_embeddings.projection": ("image_size", "patch_size", "num_channels"),
        "pooler.dense": ("pooler_act",),
    },
)
_VIT_5_3 = replace(  # the names of transformers 5.3
    _VIT,
    block={
        **_attention(
            "attention.attention.query attention.attention.key attention.attention.value attention.output.dense"
        ),
        **_feed_forward("intermediate.dense output.dense"),
        "layernorm_before": Norm(readers=tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))),
        "layernorm_after": Norm(readers=("intermediate.dense",)),
    },
)

_FAMILIES: dict[str, tuple[Family, ...]] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "smollm3"], (_LLAMA,)),
    **dict.fromkeys(["gemma2", "gemma3_text"], (_GEMMA,)),
    "gemma": (replace(_LLAMA, gain_offset=1.0, scaled_embeddings=True),),
    "phi3": (_PHI3,),
    **dict.fromkeys(["mixtral", "qwen3_moe"], (_MIXTURE,)),
    "bert": (_BERT,),
    **dict.fromkeys(["roberta", "xlm-roberta", "camembert"], (_ROBERTA,)),
    "electra": (_BERT, _ELECTRA_PROJECTED),
    "distilbert": (_DISTILBERT,),
    "mpnet": (_MPNET,),
    "modernbert": (_MODERNBERT,),
    "gpt2": (_GPT2,),
    "gpt_neox": (_NEOX,),
    "vit": (_VIT, _VIT_5_3),
}


def register_family(model_type: str, *families: Family) -> None:
    """Let models of a configuration's `model_type` be initialised from a teacher; the first family that fits counts."""
    _FAMILIES[model_type] = families


def families_of(model_type: str) -> tuple[Family, ...]:
    """The families of a model type; UserError where there is none."""
    if model_type not in _FAMILIES:
        raise UserError(
            f"student_init='teacher' does not know how a {model_type!r} model is built (known: {', '.join(sorted(_FAMILIES))})"
            f": use student_init='random', or describe it: register_family({model_type!r}, Family(...)), see {__name__}"
        )
    return _FAMILIES[model_type]


def usual_blocks(model_type: str) -> str:
    """The default of `start_blocks` for models of a type."""
    return _FAMILIES[model_type][0].start_blocks if model_type in _FAMILIES else "uniform"
