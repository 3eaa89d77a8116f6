"""Sentence encoders: pooling, and the folder format of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import BertModel

from tests.conftest import bert_config, make_tokenizer, sentences
from tutelage.core.blocks import find_blocks
from tutelage.core.errors import UserError
from tutelage.tasks.embedding import EmbeddingModel, load_embedding_model

IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def make(seed: int = 0, **settings: Any) -> EmbeddingModel:
    torch.manual_seed(seed)
    return EmbeddingModel(BertModel(bert_config()), **settings).eval()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_count(pooling: str) -> None:
    model = make(pooling=pooling)
    together, alone = model(IDS, MASK), model(IDS[1:, :3], MASK[1:, :3])
    torch.testing.assert_close(together[1:], alone)
    torch.testing.assert_close(model(IDS[:1]), together[:1])


def test_padding_at_the_left_does_not_count_either() -> None:
    model = make(pooling="cls")
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    hidden = model.encoder(IDS[1:].roll(2, 1), mask).last_hidden_state
    torch.testing.assert_close(model(IDS[1:].roll(2, 1), mask), F.normalize(hidden[:, 2], dim=-1))


def test_pooling_head_and_norm() -> None:
    hidden = (model := make(embedding_size=12, normalize=False)).encoder(IDS, MASK).last_hidden_state
    mean = torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)])
    torch.testing.assert_close(model(IDS, MASK), model.head(mean))
    model.normalize = True
    torch.testing.assert_close(model(IDS, MASK), F.normalize(model.head(mean), dim=-1))
    model.pooling = "cls"
    torch.testing.assert_close(model(IDS, MASK), F.normalize(model.head(hidden[:, 0]), dim=-1))


def test_token_types_are_used() -> None:
    model = make()
    assert not torch.equal(model(IDS, MASK, torch.ones_like(IDS)), model(IDS, MASK, torch.zeros_like(IDS)))
    torch.testing.assert_close(model(IDS, MASK, torch.zeros_like(IDS)), model(IDS, MASK), rtol=0, atol=0)


def test_unknown_pooling() -> None:
    with pytest.raises(ValueError, match="unknown pooling 'max': use one of mean, cls"):
        make(pooling="max")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("embedding_size", [None, 12])
def test_a_saved_model_is_the_same_model(
    tmp_path: Path, pooling: str, normalize: bool, embedding_size: int | None
) -> None:
    model = make(pooling=pooling, normalize=normalize, embedding_size=embedding_size)
    model.save_pretrained(tmp_path)
    loaded = load_embedding_model(str(tmp_path)).eval()
    torch.testing.assert_close(loaded(IDS, MASK), model(IDS, MASK), rtol=0, atol=0)
    assert (loaded.pooling, loaded.normalize, loaded.embedding_size) == (pooling, normalize, embedding_size or 32)


def test_the_encoder_lies_at_the_root(tmp_path: Path) -> None:
    model = make(embedding_size=12)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.encoder.state_dict())
    torch.testing.assert_close(BertModel.from_pretrained(tmp_path).state_dict(), model.encoder.state_dict())


def test_a_plain_encoder_is_mean_pooled(tmp_path: Path) -> None:
    encoder = make().encoder
    encoder.save_pretrained(tmp_path)
    loaded = load_embedding_model(str(tmp_path))
    assert (loaded.pooling, loaded.head, loaded.normalize) == ("mean", None, True)


def _rewrite(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_the_newer_pooling_key(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode": "cls"}))
    assert load_embedding_model(str(tmp_path)).pooling == "cls"


def test_a_dense_module_without_bias(tmp_path: Path) -> None:
    model = make(embedding_size=12)
    torch.nn.init.zeros_(model.head.bias)
    model.save_pretrained(tmp_path)
    save_file({"linear.weight": model.head.weight.detach()}, tmp_path / "2_Dense" / "model.safetensors")
    torch.testing.assert_close(load_embedding_model(str(tmp_path)).eval()(IDS, MASK), model(IDS, MASK), rtol=0, atol=0)


def test_what_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    make(embedding_size=12).save_pretrained(tmp_path)
    dense, pooling = tmp_path / "2_Dense", tmp_path / "1_Pooling" / "config.json"
    _rewrite(dense / "config.json", activation_function="torch.nn.modules.activation.Tanh")
    with pytest.raises(ValueError, match=r"Dense module with the activation torch.nn.modules.activation.Tanh"):
        load_embedding_model(str(tmp_path))
    _rewrite(dense / "config.json", activation_function="torch.nn.modules.linear.Identity")
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"the Dense module of teacher .* stores its weights as a pickle"):
        load_embedding_model(str(tmp_path))
    _rewrite(pooling, pooling_mode_cls_token=True)
    with pytest.raises(ValueError, match=r"pools by \['pooling_mode_cls_token', 'pooling_mode_mean_tokens'\]"):
        load_embedding_model(str(tmp_path))
    _rewrite(pooling, pooling_mode_cls_token=False, pooling_mode_mean_tokens=False, pooling_mode="max")
    with pytest.raises(ValueError, match="pools by max; known: mean, cls"):
        load_embedding_model(str(tmp_path))
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"idx": 9, "name": "9", "path": "9_CNN", "type": "sentence_transformers.models.CNN"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="has a module of kind CNN; known: Transformer, Pooling"):
        load_embedding_model(str(tmp_path))


@pytest.mark.assets  # sentence-transformers is an optional extra
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("embedding_size", [None, 12])
def test_sentence_transformers_gives_the_same_embeddings(
    tmp_path: Path, pooling: str, embedding_size: int | None
) -> None:
    from sentence_transformers import SentenceTransformer

    model, tokenizer = make(pooling=pooling, embedding_size=embedding_size), make_tokenizer(encoder=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [*sentences(6), " ".join(sentences(20))]  # the last is longer than the model's positions
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        expected = model(batch["input_ids"], batch["attention_mask"])
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    with pytest.raises(UserError, match="is a pipeline of modules"):
        find_blocks(loaded)
    torch.testing.assert_close(loaded.encode(texts, convert_to_tensor=True), expected)


def test_a_hub_name_reads_the_same_modules_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooling, head and norm of a sentence encoder are read from the Hub too."""
    from tutelage.tasks import embedding as module
    from tutelage.tasks import loading
    from tutelage.tasks.registry import detect_task

    model = make(embedding_size=12, pooling="cls", normalize=False)
    model.save_pretrained(tmp_path / "files")

    def cached(name: str, file: str) -> str:
        assert name == "org/encoder"
        if not (tmp_path / "files" / file).is_file():
            raise OSError("no such entry")
        return str(tmp_path / "files" / file)

    original_config, original_model = loading.load_config, loading.load_model
    monkeypatch.setattr(loading, "cached_file", cached)
    monkeypatch.setattr(module, "load_config", lambda _name, **kw: original_config(str(tmp_path / "files"), **kw))
    monkeypatch.setattr(module, "load_model", lambda _name, *a, **kw: original_model(str(tmp_path / "files"), *a, **kw))
    assert detect_task("org/encoder").name == "embedding"
    loaded = load_embedding_model("org/encoder")
    assert (loaded.pooling, loaded.normalize, loaded.embedding_size) == ("cls", False, 12)
    torch.testing.assert_close(loaded.eval()(IDS, MASK), model(IDS, MASK))


def test_positions_of_a_roberta_student_leave_out_its_padding_offset(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    EmbeddingModel(RobertaModel(config)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text())["max_seq_length"] == 64


def test_a_t5_encoder_is_loaded_without_its_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    torch.manual_seed(0)
    EmbeddingModel(T5EncoderModel(config)).save_pretrained(tmp_path)
    assert type(load_embedding_model(str(tmp_path)).encoder) is T5EncoderModel
