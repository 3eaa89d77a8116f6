"""Teachers with an image encoder beside the language model: the language model alone is distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BartConfig,
    BartForConditionalGeneration,
    Gemma3Config,
    Mistral3Config,
    PreTrainedConfig,
    Qwen3VLConfig,
)

from tests.architectures.building import tiny_config
from tests.conftest import POSITIONS, VOCAB, make_tokenizer
from tests.runs.conftest import STUDENT, settings, texts, train
from tutelage import UserError, detect_task, find_blocks, plan
from tutelage.runs.inputs import RunOptions
from tutelage.tasks.loading import load_config
from tutelage.tasks.registry import get_task
from tutelage.tasks.students import make_student, student_config

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "gemma3": Gemma3Config,
    "mistral3": Mistral3Config,
    "qwen3_vl": Qwen3VLConfig,
}
if hasattr(transformers, "Qwen3_5Config"):
    CONFIGS["qwen3_5"] = transformers.Qwen3_5Config
STUDENTS = {  # Qwen3-VL has no language model of its own
    "gemma3": "Gemma3ForCausalLM",
    "mistral3": "MistralForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForCausalLM",
}


class Teachers(dict[str, Path]):
    """Folders by name."""

    def __missing__(self, name: str) -> Path:
        pytest.skip(f"transformers {transformers.__version__} cannot make {name}")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = Teachers()
    for name, kind in CONFIGS.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("teachers") / name
        try:
            text = type(kind().get_text_config())
            sizes = {"text_config": tiny_config(text, vocab_size=VOCAB, max_position_embeddings=POSITIONS)}
            AutoModelForImageTextToText.from_config(tiny_config(kind, **sizes)).save_pretrained(folder)
        except AttributeError:  # Qwen3-VL in transformers 5.3
            continue
        make_tokenizer().save_pretrained(folder)
        found[name] = folder
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_blocks_are_those_of_the_language_model(teachers: dict[str, Path], name: str) -> None:
    task = detect_task(str(teachers[name]))
    model = task.load(str(teachers[name]))
    assert task.name == detect_task(model).name == "causal_lm"
    assert type(model).__name__.endswith("ForConditionalGeneration")
    assert find_blocks(model).names == tuple(f"model.language_model.layers.{number}" for number in range(4))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_is_of_the_language_model(teachers: dict[str, Path], name: str) -> None:
    task, base = get_task("causal_lm"), load_config(str(teachers[name]))
    student = make_student(STUDENT, task, student_config(STUDENT, base, task))
    assert type(student).__name__ == STUDENTS[name]
    assert len(find_blocks(student)) == 2
    assert task.width(student) == 16
    assert student.get_input_embeddings().weight.shape == (VOCAB, 16)  # type: ignore[operator]


def test_a_preset_has_the_classes_of_the_teacher() -> None:
    names = {0: "bad", 1: "fine", 2: "good"}
    teacher = Gemma3Config(id2label=names, label2id={name: number for number, name in names.items()})
    config = student_config(STUDENT, teacher, get_task("sequence_classification"))
    assert config.model_type == "gemma3_text"
    assert config.id2label == names


@pytest.mark.parametrize("method", ["one_shot", "extraction"])
@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_a_language_model_is_distilled_from_it(
    teachers: dict[str, Path], corpus: Path, tmp_path: Path, name: str, method: str
) -> None:
    fields = {} if method == "one_shot" else {"layer_map": "1:2,final:final", "warm_start": "head"}
    result = train(tmp_path, None, texts(corpus), teacher=teachers[name], method=method, max_steps=4, **fields)
    assert result.student.parameters is not None
    assert AutoConfig.from_pretrained(tmp_path).get_text_config().num_hidden_layers == 2


def test_a_student_from_disk_equals_the_student_from_the_teacher(
    teachers: dict[str, Path], extracted: Any, corpus: Path, tmp_path: Path
) -> None:
    fields = {"layer_map": "1:2,final:final", "warm_start": "head", "max_steps": 4}
    folder = extracted(teacher=teachers["mistral3"], **fields)
    train(tmp_path / "live", None, texts(corpus), teacher=teachers["mistral3"], top_k=64, **fields)
    train(tmp_path / "stored", folder, RunOptions(student=STUDENT), **fields)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "stored"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_a_plan_is_of_the_language_model(teachers: dict[str, Path], tmp_path: Path, name: str) -> None:
    found = plan(RunOptions(student=STUDENT), settings(tmp_path, teachers[name]))
    assert (found.teacher.hidden_size, len(found.teacher.blocks), found.vocabulary) == (32, 4, VOCAB)
    assert found.student.class_name == STUDENTS[name]


def test_an_encoder_decoder_is_not_a_causal_language_model() -> None:
    sizes = {"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    with pytest.raises(UserError, match="cannot tell the task of BartForConditionalGeneration"):
        detect_task(BartForConditionalGeneration(BartConfig(**sizes, **heads)))
