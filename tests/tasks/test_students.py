"""Students from presets, config files and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
)

from tests.conftest import bert_config, llama_config
from tutelage.core.errors import UserError
from tutelage.core.stages import uniform_layer_map
from tutelage.tasks import students
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.parity import ParityMLPConfig
from tutelage.tasks.registry import TASKS
from tutelage.tasks.students import feed_forward_width, is_preset, make_student, student_config

CAUSAL = TASKS["causal_lm"]


def _forward(config: PreTrainedConfig) -> torch.Tensor:
    """The last hidden state of a random model of this configuration, on 5 tokens."""
    model = T5EncoderModel(config) if config.model_type == "t5" else AutoModel.from_config(config)
    return model.eval()(input_ids=torch.arange(1, 6)[None]).last_hidden_state


SMALL = {"vocab_size": 50, "num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4}
GROUPED_EIGHTS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
GROUPED = {**SMALL, "intermediate_size": 160, "num_key_value_heads": 2}

# teacher, fields of the student `layers=3,hidden_size=32` that follow
FOLLOWING = [
    (
        LlamaConfig(**GROUPED, head_dim=16),
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 80},
    ),
    (GPT2Config(**SMALL), {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_inner": None}),
    (GPT2Config(**SMALL, n_inner=160), {"n_embd": 32, "n_head": 2, "n_inner": 80}),
    (BertConfig(**SMALL, intermediate_size=160), {"num_attention_heads": 2, "intermediate_size": 80}),
    (
        DistilBertConfig(vocab_size=50, n_layers=6, dim=64, n_heads=4, hidden_dim=160),
        {"n_layers": 3, "dim": 32, "n_heads": 2, "hidden_dim": 80},
    ),
    (
        OPTConfig(**SMALL, ffn_dim=160, word_embed_proj_dim=64),
        {"num_attention_heads": 2, "ffn_dim": 80, "word_embed_proj_dim": 32},
    ),
    (
        ModernBertConfig(
            **SMALL,
            intermediate_size=160,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        {"num_attention_heads": 2, "intermediate_size": 80},
    ),
    (
        T5Config(vocab_size=50, d_model=64, d_kv=16, d_ff=160, num_layers=6, num_heads=4),
        {"num_layers": 3, "d_model": 32, "num_heads": 2, "d_kv": 16, "d_ff": 80},
    ),
    (
        Qwen2Config(**GROUPED, layer_types=["full_attention", "sliding_attention"] * 3, use_sliding_window=True),
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 80},
    ),
    (
        Gemma2Config(**GROUPED, head_dim=16),
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 80},
    ),
]


@pytest.mark.parametrize(("teacher", "following"), FOLLOWING, ids=lambda value: getattr(value, "model_type", ""))
def test_heads_and_feed_forward_follow_the_width(teacher: PreTrainedConfig, following: dict[str, Any]) -> None:
    before = teacher.to_dict()
    student = student_config("layers=3,hidden_size=32", teacher)
    assert (student.num_hidden_layers, student.hidden_size) == (3, 32)
    assert {name: getattr(student, name) for name in following} == following
    assert student.vocab_size == teacher.vocab_size
    assert _forward(student).shape == (1, 5, 32)
    assert teacher.to_dict() == before


@pytest.mark.parametrize("config_class", [Qwen2Config, Gemma2Config, ModernBertConfig])
def test_each_block_has_the_attention_type_of_the_block_it_is_paired_with(config_class: type[PreTrainedConfig]) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    teacher = config_class(**{**SMALL, "num_key_value_heads": 2, "num_hidden_layers": 5}, layer_types=kinds)
    for layers, blocks in ((1, [5]), (2, [2, 5]), (3, [2, 3, 5]), (4, [1, 2, 4, 5]), (5, [1, 2, 3, 4, 5])):
        assert [block for _, block in uniform_layer_map(layers, 5)] == blocks
        assert student_config(f"layers={layers}", teacher).layer_types == [kinds[block - 1] for block in blocks]
    assert student_config("layers=12", teacher).layer_types[0] == kinds[0]  # deeper than its teacher


def test_what_is_given_does_not_follow() -> None:
    student = student_config("layers=2,width=32,heads=4,intermediate_size=24,num_key_value_heads=4", llama_config())
    assert student.num_attention_heads == student.num_key_value_heads == 4
    assert (student.head_dim, student.intermediate_size) == (8, 24)


def test_key_value_heads_follow_heads_that_are_given() -> None:
    student = student_config("heads=2", llama_config())
    assert (student.hidden_size, student.num_attention_heads, student.num_key_value_heads) == (32, 2, 1)
    assert (student.head_dim, student.intermediate_size) == (8, llama_config().intermediate_size)
    assert _forward(student).shape == (1, 5, 32)


@pytest.mark.parametrize("preset", ["kv_heads=2", "num_key_value_heads=2"])
def test_heads_follow_key_value_heads_that_are_given(preset: str) -> None:
    teacher = LlamaConfig(vocab_size=50, hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    student = student_config(f"layers=1,{preset}", teacher)
    assert (student.num_attention_heads, student.num_key_value_heads, student.head_dim) == (8, 2, 8)
    assert _forward(student).shape == (1, 5, 72)
    assert student_config("kv_heads=1", teacher).num_attention_heads == 9
    assert student_config("kv_heads=6,hidden_size=48", teacher).num_attention_heads == 6


def test_the_head_size_stays_the_teachers_and_key_value_groups_stay_whole() -> None:
    teacher = LlamaConfig(vocab_size=50, hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    student = student_config("layers=1,hidden_size=360", teacher)
    assert (student.num_attention_heads, student.head_dim) == (6, 64)
    assert _forward(student).shape == (1, 5, 360)
    assert student_config("heads=3", teacher).head_dim == 64
    assert student_config("hidden_size=360,head_dim=72", teacher).head_dim == 72


def test_heads_follow_the_width_where_they_are_wider_than_it_together() -> None:
    teacher = Qwen3Config(**GROUPED, head_dim=32)
    student = student_config("layers=1,hidden_size=32", teacher)
    assert (student.num_attention_heads, student.num_key_value_heads, student.head_dim) == (2, 1, 32)
    assert _forward(student).shape == (1, 5, 32)


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        (GPT2Config(**SMALL), "n_inner"),
        (OPTConfig(**SMALL, ffn_dim=160, word_embed_proj_dim=64), "ffn_dim"),
        (DistilBertConfig(vocab_size=50, n_layers=6, dim=64, n_heads=4, hidden_dim=160), "hidden_dim"),
        (T5Config(vocab_size=50, d_model=64, d_kv=16, d_ff=160, num_layers=6, num_heads=4), "d_ff"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_intermediate_size_is_the_feed_forward_width_of_every_family(teacher: PreTrainedConfig, name: str) -> None:
    student = student_config("layers=1,hidden_size=32,intermediate_size=56", teacher)
    assert getattr(student, name) == feed_forward_width(student) == 56
    assert _forward(student).shape == (1, 5, 32)


def test_a_feed_forward_width_that_the_configuration_leaves_open_is_four_times_the_hidden_size() -> None:
    assert feed_forward_width(GPT2Config(**SMALL)) == 256
    assert feed_forward_width(BloomConfig(n_layer=1)) is None


def test_a_width_that_the_head_size_does_not_divide_gets_fewer_heads() -> None:
    student = student_config("hidden_size=26", Qwen3Config(**GROUPED_EIGHTS))
    assert (student.num_attention_heads, student.head_dim) == (4, 8)
    assert _forward(student).shape == (1, 5, 26)
    # without a head size of its own: 3 heads would have to be 26 / 3; 2 would be odd (13), as rotary positions cannot be
    assert student_config("hidden_size=26", bert_config()).num_attention_heads == 1


def test_an_architectures_own_names_work() -> None:
    student = student_config("n_layer=2,n_embd=32", GPT2Config(**SMALL))
    assert (student.num_hidden_layers, student.hidden_size, student.num_attention_heads) == (2, 32, 2)


def test_the_teachers_name_and_quantization_do_not_stick() -> None:
    teacher = llama_config()
    teacher.name_or_path, teacher.quantization_config = "org/teacher", {"quant_method": "gguf"}
    student = student_config("layers=2", teacher)
    assert not student.name_or_path
    assert "quantization_config" not in student.to_dict()


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("layers=2,depth=3", "LlamaConfig has no field 'depth'"),
        ("layers=2,32", "'32' is not a setting such as layers=3"),
        ("layers=two", "num_hidden_layers must be a positive whole number, got 'two'"),
        ("layers=0", "num_hidden_layers must be a positive whole number, got 0"),
        ("layers=true", "num_hidden_layers must be a positive whole number, got True"),
        ("heads=0", "num_attention_heads must be a positive whole number, got 0"),
        ("intermediate_size=", "intermediate_size must be a positive whole number, got None"),
        ("kv_heads=0", "num_key_value_heads must be a positive whole number, got 0"),
        ("heads=4,num_key_value_heads=3", "4 heads are not divisible by 3 key/value heads"),
    ],
)
def test_bad_presets(preset: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student_config(preset, llama_config())


def test_sizes_that_a_family_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="BertConfig has no field 'num_key_value_heads'"):
        student_config("kv_heads=2", bert_config())
    with pytest.raises(ValueError, match="BloomConfig has no field 'intermediate_size'"):
        student_config("intermediate_size=64", BloomConfig(n_layer=1))


def test_width_not_divisible_by_heads() -> None:
    with pytest.raises(ValueError, match="hidden_size 30 is not divisible by 4 heads"):
        student_config("hidden_size=30,heads=4", bert_config())


def test_a_preset_gives_a_random_student() -> None:
    assert is_preset("layers=2")
    config = student_config("layers=2,hidden_size=16", llama_config())
    student = make_student("layers=2,hidden_size=16", CAUSAL, config)
    assert isinstance(student, LlamaForCausalLM)
    assert len(student.model.layers) == 2


def test_a_config_file_gives_a_random_student(tmp_path: Path) -> None:
    file = tmp_path / "layers=2.json"
    file.write_text(llama_config(num_hidden_layers=1).to_json_string())
    assert not is_preset(str(file))
    config = student_config(str(file), llama_config())
    assert isinstance(config, LlamaConfig)
    assert len(make_student(str(file), CAUSAL, config).model.layers) == 1


def test_a_folder_with_weights_is_loaded(causal_teacher: Path) -> None:
    config = student_config(str(causal_teacher), llama_config(hidden_size=64))
    assert config.hidden_size == 32
    student = make_student(str(causal_teacher), CAUSAL, config)
    stored = load_file(causal_teacher / "model.safetensors")
    torch.testing.assert_close(student.lm_head.weight, stored["lm_head.weight"], rtol=0, atol=0)


def test_a_folder_without_weights_gives_a_random_student(tmp_path: Path) -> None:
    llama_config(num_hidden_layers=2).save_pretrained(tmp_path)
    config = student_config(str(tmp_path), llama_config())
    assert len(make_student(str(tmp_path), CAUSAL, config).model.layers) == 2


def test_a_folder_with_a_pickle_is_no_folder_without_weights(tmp_path: Path) -> None:
    llama_config(num_hidden_layers=2).save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    config = student_config(str(tmp_path), llama_config())
    with pytest.raises(ValueError, match=r"student .* stores its weights as a pickle \(pytorch_model.bin\)"):
        make_student(str(tmp_path), CAUSAL, config)


def test_student_files_that_are_no_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match="has no model_type"):
        student_config(str(file), llama_config())
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        student_config(str(file), llama_config())
    with pytest.raises(ValueError, match="no student at '/nowhere/student'"):
        student_config("/nowhere/student", llama_config())


def test_a_preset_over_a_network_without_attention_is_refused() -> None:
    with pytest.raises(
        UserError, match="needs a teacher whose configuration has num_attention_heads, but ParityMLPConfig"
    ):
        student_config("width=20", ParityMLPConfig(8, 40))


def test_an_encoder_student_gets_a_head_to_the_teachers_width(tmp_path: Path) -> None:
    task, teacher = TASKS["embedding"], EmbeddingModel(AutoModel.from_config(bert_config()))
    narrow = bert_config(hidden_size=16, num_hidden_layers=1)
    AutoModel.from_config(narrow).save_pretrained(tmp_path)
    for student in ("layers=1,hidden_size=16", str(tmp_path)):
        made = make_student(student, task, narrow, task.teacher_shape(teacher))
        assert isinstance(made, EmbeddingModel)
        assert (made.head.in_features, made.head.out_features) == (16, 32)


def test_an_encoder_student_with_a_head_to_another_width(tmp_path: Path) -> None:
    narrow = bert_config(hidden_size=16, num_hidden_layers=1)
    EmbeddingModel(AutoModel.from_config(narrow), embedding_size=24).save_pretrained(tmp_path)
    task, teacher = TASKS["embedding"], EmbeddingModel(AutoModel.from_config(bert_config()))
    with pytest.raises(ValueError, match="the student's embeddings have 24 dimensions, the teacher's 32"):
        make_student(str(tmp_path), task, narrow, task.teacher_shape(teacher))


def test_a_configuration_that_a_preset_cannot_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4 has head sizes that differ between layers."""

    def fail(*args: object) -> None:
        raise RuntimeError("'head_dim' may vary across layers")

    monkeypatch.setattr(students, "_set_heads", fail)
    with pytest.raises(UserError, match=r"preset 'width=16' cannot be made from a llama teacher: 'head_dim' may vary"):
        student_config("width=16", llama_config())
