"""Loading models: safetensors only, whole models only, and a clear word about what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, BertModel, LlamaForCausalLM

from tests.conftest import bert_config, llama_config, make_tokenizer
from tutelage.tasks.loading import check_weights, has_weights, load_config, load_model, load_tokenizer


@pytest.fixture
def folder(causal_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the teacher, to be damaged."""
    return Path(shutil.copytree(causal_teacher, tmp_path / "teacher"))


def test_safetensors_are_loaded(causal_teacher: Path) -> None:
    model = load_model(str(causal_teacher), AutoModelForCausalLM)
    assert isinstance(model, LlamaForCausalLM)
    stored = load_file(causal_teacher / "model.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), stored, rtol=0, atol=0)
    assert load_model(str(causal_teacher), AutoModelForCausalLM, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "exploded",)

    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / "pytorch_model.bin")
    message = (
        r"teacher '.*' stores its weights as a pickle \(pytorch_model.bin\).*: convert it with `model.save_pretrained"
    )
    with pytest.raises(ValueError, match=message):
        load_model(str(folder), AutoModelForCausalLM)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_beside_safetensors_is_ignored(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    check_weights(str(folder))
    load_model(str(folder), AutoModelForCausalLM)


def test_nothing_there() -> None:
    with pytest.raises(
        ValueError,
        match="no teacher at '/nowhere/teacher': there is no local folder of that name, and it was not found on the Hub",
    ):
        load_model("/nowhere/teacher", AutoModelForCausalLM)
    with pytest.raises(
        ValueError,
        match="no student at 'nobody/nothing': there is no local folder of that name, and it was not found on the Hub",
    ):
        load_config("nobody/nothing", what="student")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"teacher folder '.*' has no config.json: it is not a Hugging Face model folder"
    ):
        load_model(str(folder), AutoModelForCausalLM)


@pytest.mark.parametrize("content", ["{", json.dumps({"model_type": "unheard-of"})])
def test_a_config_that_cannot_be_read(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match="could not read the config of teacher"):
        load_model(str(folder), AutoModelForCausalLM)


def test_a_folder_without_weights(folder: Path) -> None:
    assert has_weights(folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "training_args.bin")
    assert not has_weights(folder)
    with pytest.raises(ValueError, match=r"teacher folder '.*' holds no weights: expected model.safetensors"):
        load_model(str(folder), AutoModelForCausalLM)


def test_weights_that_are_damaged_or_of_another_size(folder: Path) -> None:
    llama_config(hidden_size=16).save_pretrained(folder)
    with pytest.raises(ValueError, match="could not load teacher"):
        load_model(str(folder), AutoModelForCausalLM)
    llama_config().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="could not load teacher"):
        load_model(str(folder), AutoModelForCausalLM)


def test_a_teacher_without_its_head_is_refused(tmp_path: Path) -> None:
    BertModel(bert_config()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no weights for cls\..*: it was saved without the part that AutoModelForMaskedLM"
    ):
        load_model(str(tmp_path), AutoModelForMaskedLM)
    load_model(str(tmp_path), AutoModelForMaskedLM, what="student")  # a student may begin with a new head


def test_a_pooler_that_no_task_reads_may_be_missing(mlm_teacher: Path) -> None:
    load_model(str(mlm_teacher), AutoModel)


def test_a_teacher_with_a_missing_block_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "layers.2.mlp" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model.layers.2.mlp"):
        load_model(str(folder), AutoModelForCausalLM)


def test_tokenizers(causal_teacher: Path, tmp_path: Path) -> None:
    loaded = load_tokenizer(str(causal_teacher))
    assert loaded is not None
    assert loaded.get_vocab() == make_tokenizer().get_vocab()
    assert load_tokenizer(str(tmp_path)) is None
    assert load_tokenizer("/nowhere/teacher") is None
    assert load_tokenizer(str(causal_teacher / "config.json")) is None
