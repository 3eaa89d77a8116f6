"""Every causal, masked and classification architecture of transformers: the engine's states and logits are the model's own.

Each is built small, at random, from its default configuration. `forward_to` and the self-check run at block 1, at a block in
the middle, and at `final`, on a full and a padded row. Run with `pytest -m architectures`; another version of transformers
may need other lists."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from tests.architectures.building import KINDS, build
from tutelage import UserError, forward_to
from tutelage.core.blocks import FINAL, find_blocks
from tutelage.core.inputs import model_inputs, text_config
from tutelage.core.probe import probe_ids
from tutelage.tasks.base import HeadTask, Task
from tutelage.tasks.registry import detect_task, get_task
from tutelage.tasks.students import make_student, student_config
from tutelage.training.self_check import run_probe

pytestmark = [pytest.mark.architectures, pytest.mark.filterwarnings("ignore")]
TASKS = {"causal": "causal_lm", "masked": "masked_lm", "classification": "sequence_classification"}
LEAST = 150  # architectures that must be right

# Refused, with a part of the message. An encoder-decoder model has two lists of blocks.
_LISTS = "has several lists of blocks"
_CHANGES = "changes the output of its head in a way that no setting of its configuration explains"
REFUSED = {
    ("causal", "blt"): _LISTS,  # bytes, patches and bytes again
    ("causal", "gemma4_unified_assistant"): "cannot run 16 tokens",  # needs the keys of the model that it assists
    ("causal", "hrm_text"): _LISTS,  # two stacks that run in turn
    ("causal", "longcat_flash"): "runs its 4 block.* 2 times over",  # each block holds two layers of its configuration
    ("causal", "prophetnet"): _CHANGES,  # predicts several tokens, each from a state of its own
    ("causal", "xlm"): _LISTS,  # attentions and feed-forward parts are in lists of their own
    ("masked", "albert"): "blocks that share weights cannot be addressed",
    ("masked", "bart"): _LISTS,
    ("masked", "esm"): _CHANGES,  # adds a bias that is not its head's
    ("masked", "flaubert"): _LISTS,
    ("masked", "funnel"): _LISTS,
    ("masked", "mbart"): _LISTS,
    ("masked", "mobilebert"): "does not run its output head",  # it multiplies by the head's weight and one more matrix
    ("masked", "mvp"): _LISTS,
    ("masked", "perceiver"): "no linear output head",
    ("masked", "xlm"): _LISTS,
    ("classification", "albert"): "blocks that share weights cannot be addressed",
    ("classification", "bart"): _LISTS,
    ("classification", "bigbird_pegasus"): _LISTS,
    ("classification", "eurobert"): _CHANGES,  # the mean over positions, after the head
    ("classification", "flaubert"): _LISTS,
    ("classification", "funnel"): "blocks that share weights cannot be addressed",
    ("classification", "mbart"): _LISTS,
    ("classification", "mt5"): _LISTS,
    ("classification", "mvp"): _LISTS,
    ("classification", "perceiver"): "no linear output head",
    ("classification", "plbart"): _LISTS,
    ("classification", "t5"): _LISTS,
    ("classification", "t5gemma"): _LISTS,
    ("classification", "t5gemma2"): "no linear output head",
    ("classification", "umt5"): _LISTS,
    ("classification", "xlm"): _LISTS,
    ("classification", "xlnet"): "no linear output head",
}
# Right at `final`, but with states at blocks that no hidden stage can compare.
_SHAPE = "has the shape .*, but .* was expected"
BLOCKS_REFUSED = {
    ("causal", "cpmant"): _SHAPE,  # a prompt of 32 positions before the text
    ("causal", "deepseek_v4"): _SHAPE,  # four streams
    ("causal", "gemma3n_text"): _SHAPE,  # four streams
    ("causal", "hy_v4"): _SHAPE,  # four streams
    ("causal", "qwen4_exp"): _SHAPE,  # four streams, side by side
    ("causal", "qwen4_exp_text"): _SHAPE,
    ("causal", "xlnet"): _SHAPE,  # positions come before the batch
    ("masked", "longformer"): _SHAPE,  # padded to a multiple of its window
    ("masked", "squeezebert"): "was never computed",  # its blocks are run without their hooks
    ("classification", "canine"): _SHAPE,  # every fourth character
    ("classification", "longformer"): _SHAPE,
    ("classification", "squeezebert"): "was never computed",
}
# Not built, with the reason.
LEFT_OUT = {
    ("causal", "dots3_note"): "its default configuration has settings for layer 25",
    ("causal", "dots3_note_text"): "sizes of its layers are not fields of its configuration",
    ("causal", "gemma3n"): "needs timm",
    ("causal", "gemma4_assistant"): "drafts for another model, whose keys it needs",
    ("causal", "musicgen"): "the auto class cannot build it from the configuration of the whole model",
    ("causal", "musicgen_melody"): "the auto class cannot build it from the configuration of the whole model",
    ("classification", "layoutlmv2"): "needs detectron2",
}
# The hidden states that these give are not one before block 1 and one after each block.
OTHER_HIDDEN_STATES = {
    ("causal", "dory"): "two for each block",
    ("causal", "falcon_mamba"): "none before block 1",
    ("causal", "mamba"): "none before block 1",
    ("causal", "mamba2"): "none before block 1",
    ("causal", "mllama"): "none after some blocks",
    ("causal", "rwkv"): "none before block 1",
}
# Models with an image encoder, of which the language model is distilled.
_COMPOSITE = """
aria aya_vision cohere2_vision cohere_compass cosmos3_omni deepseek_vl exaone4_5 fuyu gemma3 git got_ocr2 granite_docling
hyperclovax_vision_v2 idefics2 idefics3 inkling2 inkling2_loop inkling_mm_model internvl kimi_k25 kosmos-2.5 lfm2_vl lfm3_vl
lighton_ocr llava llava_next llava_next_video llava_onevision minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3
mistral_large4 mllama muse_glimmer ovis2 paligemma pp_chart2table qianfan_ocr qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe
qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe shieldgemma2 smolvlm video_llama_3 video_llava vipllava
"""
ALL = [(kind, name) for kind in TASKS for name in KINDS[kind]]
BUILT = [case for case in ALL if case not in LEFT_OUT]
RIGHT = [case for case in BUILT if case not in REFUSED]


def case_of(kind: str, name: str) -> tuple[PreTrainedModel, Task, dict[str, torch.Tensor]]:
    model = build(kind, name)
    return model, get_task(TASKS[kind]), batch_of(model)


def batch_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A full row and one with five positions of padding at its end, before which its text ends with the padding token."""
    full = probe_ids(model)
    ids, mask = full.repeat(2, 1), torch.ones(2, full.shape[1], dtype=torch.long)
    mask[1, -5:] = 0
    ids[1, -6:] = getattr(text_config(model.config), "pad_token_id", None) or 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("kind", "name"), RIGHT)
@torch.no_grad()
def test_states_and_logits_are_the_models_own(kind: str, name: str) -> None:
    model, task, batch = case_of(kind, name)
    seen = run_probe("teacher", model, task)
    assert seen is not None
    seen.check([FINAL])
    inputs, real = model_inputs(model, batch), batch["attention_mask"].bool()
    blocks = len(find_blocks(model))
    places = sorted({1, (blocks + 1) // 2})
    if (reason := BLOCKS_REFUSED.get((kind, name))) is not None:
        with pytest.raises(UserError, match=reason):
            seen.check(places)
    else:
        seen.check(places)
        states = model(**inputs, output_hidden_states=True).hidden_states
        assert (len(states) == blocks + 1) or (kind, name) in OTHER_HIDDEN_STATES
        for place in places:
            state = forward_to(model, place, **inputs)
            assert state.shape == (2, 16, task.width(model, place))
            if place < blocks and (kind, name) not in OTHER_HIDDEN_STATES:
                torch.testing.assert_close(state[real], states[place][real], rtol=1e-5, atol=1e-5)
    head = task.output_head(model)
    assert head is not None
    expected = model(**inputs).logits
    assert isinstance(task, HeadTask)
    state = task.output_state(model, batch)
    if kind == "classification":
        logits = head(task.select(state, batch).state)
    else:
        logits, expected = head(state)[real], expected[real]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", _COMPOSITE.split())
def test_the_language_model_of_a_composite_model_is_distilled(name: str) -> None:
    teacher, preset = build("composite", name), "layers=2,hidden_size=16"
    task = detect_task(teacher)
    assert task.name == "causal_lm"
    student = make_student(preset, task, student_config(preset, teacher.config, task))
    assert len(find_blocks(student)) == 2
    for model in (teacher, student):
        seen = run_probe("model", model, task)
        assert seen is not None
        seen.check([1, 2, FINAL])


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_what_the_engine_cannot_do_is_refused_before_a_run(kind: str, name: str) -> None:
    model, task, _ = case_of(kind, name)
    with pytest.raises(UserError, match=REFUSED[kind, name]):
        run_probe("teacher", model, task)


@pytest.mark.parametrize(("kind", "name"), LEFT_OUT)
def test_what_is_left_out_cannot_be_built(kind: str, name: str) -> None:
    with pytest.raises((ImportError, ValueError, AttributeError, StrictDataclassError)):
        build(kind, name)


def test_every_architecture_is_right_or_listed_with_its_reason() -> None:
    for listed in (REFUSED, BLOCKS_REFUSED, LEFT_OUT, OTHER_HIDDEN_STATES):
        assert not set(listed) - set(ALL), "no longer in transformers"
    assert not set(REFUSED) & set(LEFT_OUT)
    assert not set(BLOCKS_REFUSED) & (set(REFUSED) | set(LEFT_OUT))
    assert len(RIGHT) - len(BLOCKS_REFUSED) >= LEAST
    assert len(ALL) == len(RIGHT) + len(REFUSED) + len(LEFT_OUT)
