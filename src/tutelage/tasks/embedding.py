"""Sentence encoders, distilled on their pooled embedding; their folders have the format of sentence-transformers.
Shapes: B batch, T positions, D encoder width, E embedding width."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel

from tutelage.core.correlation import pearson, spearman
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import first_token, model_inputs, text_config, usable_positions
from tutelage.core.losses import OutputSettings, embedding_loss
from tutelage.tasks.base import Batch, Clues, EvaluationTools, OutputTarget, Task
from tutelage.tasks.loading import check_weights, find_file, load_config, load_model

_PAIRED_SENTENCES = 1000  # half a million pairs
_POOLING_KEYS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
POOLINGS = tuple(_POOLING_KEYS)
_DENSE = "2_Dense"
_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")


@final
class SentenceEmbedding(Task):
    """Encoder, pooling and a linear head (`EmbeddingModel`); the output is the embedding itself."""

    name = "embedding"
    suffixes = ("SentenceTransformer",)
    embeds = True
    learns_from_labels = False
    warm_start = "head"
    metric, better = "cosine", "higher"
    pipeline_tag, library = "sentence-similarity", "sentence-transformers"

    def recognizes(self, clues: Clues) -> bool:
        if clues.model is not None:
            return isinstance(clues.model, EmbeddingModel)
        first = clues.names[0]
        return super().recognizes(clues) or (first.endswith("Model") and not first.endswith("LMHeadModel"))

    def load(self, path: str, *, what: str = "teacher", **kwargs: Any) -> nn.Module:
        return load_embedding_model(path, what=what, **kwargs)

    def build(self, config: PreTrainedConfig, shape: Mapping[str, Any] | None = None) -> nn.Module:
        """An encoder; with the `shape` of a teacher it has the teacher's pooling and embedding width."""
        return EmbeddingModel(super().build(config), **(shape or {}))  # type: ignore[arg-type]

    def teacher_shape(self, teacher: nn.Module) -> dict[str, Any] | None:
        assert isinstance(teacher, EmbeddingModel)
        return {"embedding_size": teacher.embedding_size, "pooling": teacher.pooling, "normalize": teacher.normalize}

    def fit_to_teacher(self, student: nn.Module, shape: Mapping[str, Any] | None) -> None:
        assert isinstance(student, EmbeddingModel)
        if shape is not None:
            student.fit_head(shape["embedding_size"])

    def backbone(self, model: nn.Module) -> nn.Module:
        return model.encoder if isinstance(model, EmbeddingModel) else model

    def output_head(self, model: nn.Module, outputs: int | None = None) -> OutputHead | None:
        """The linear map from the pooled state to the embedding; None if they are the same."""
        head = model.head if isinstance(model, EmbeddingModel) else None
        return None if head is None else OutputHead(head)

    def restore(self, model: nn.Module, folder: Path, standard: Callable[[], None]) -> None:
        model.load_state_dict(load_embedding_model(str(folder)).state_dict())

    def output_loss(
        self, student: nn.Module, batch: Batch, target: OutputTarget | None, settings: OutputSettings
    ) -> Tensor:
        assert target is not None and target.whole is not None
        return embedding_loss(student(**model_inputs(student, batch)), target.whole, settings.embedding_loss)

    def measure(self, student: nn.Module, batch: Batch, target: OutputTarget | None, tools: EvaluationTools) -> Tensor:
        """Embeddings of student and teacher, (B, 2, E)."""
        if target is None or target.whole is None:
            raise UserError("an embedding model is evaluated against its teacher: give one with --teacher")
        return torch.stack([student(**model_inputs(student, batch)).float(), target.whole.float()], dim=1)

    def summarize(self, parts: list[Tensor], with_teacher: bool) -> dict[str, float]:
        """`loss` (1 - cosine), `cosine` (mean over sentences), and over all pairs of the first 1,000 sentences the Pearson
        and Spearman correlation of pairwise cosine similarities, `similarity_pearson` and `similarity_spearman`."""
        student_BE, teacher_BE = torch.cat(parts).transpose(0, 1).contiguous()
        cosine = F.cosine_similarity(student_BE, teacher_BE, dim=-1).mean().item()
        metrics = {"loss": 1 - cosine, "cosine": cosine}
        count = min(len(student_BE), _PAIRED_SENTENCES)
        if count >= 3:
            upper = torch.triu_indices(count, count, offset=1)
            units = [F.normalize(embeddings[:count], dim=-1) for embeddings in (student_BE, teacher_BE)]
            similarities = [(unit @ unit.T)[upper[0], upper[1]].double().numpy() for unit in units]
            metrics["similarity_pearson"] = pearson(*similarities)
            metrics["similarity_spearman"] = spearman(*similarities)
        return metrics


class EmbeddingModel(nn.Module):
    """An encoder with a pooling, an optional linear head, and optional scaling to unit norm.
    `embedding_size` is E, the width of the head's output, None for no head (E = D); `pooling` is `mean` over non-padding
    positions, or `cls` for the first of them."""

    def __init__(
        self, encoder: PreTrainedModel, embedding_size: int | None = None, pooling: str = "mean", normalize: bool = True
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"unknown pooling {pooling!r}: use one of {', '.join(POOLINGS)}")
        self.encoder = encoder
        self.pooling, self.normalize = pooling, normalize
        self.width: int = text_config(encoder.config).hidden_size  # D
        self.head = None if embedding_size is None else nn.Linear(self.width, embedding_size)

    @property
    def embedding_size(self) -> int:
        return self.width if self.head is None else self.head.out_features

    def fit_head(self, embedding_size: int) -> None:
        """Add a head with the output width `embedding_size`, if the encoder has a different width; UserError if it has a
        head already."""
        if self.embedding_size == embedding_size:
            return
        if self.head is not None:
            found = f"the student's embeddings have {self.embedding_size} dimensions, the teacher's {embedding_size}"
            raise UserError(f"{found}: use a student without a Dense module; tutelage adds one of the right size")
        self.head = nn.Linear(self.width, embedding_size)

    def stored_parts(self) -> list[tuple[str, nn.Module, str]]:
        """The parts that `save_pretrained` writes: folder, module, and prefix of the names in the file."""
        return [("", self.encoder, "")] + ([] if self.head is None else [(_DENSE, self.head, "linear.")])

    @property
    def config(self) -> Any:
        return self.encoder.config

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """As the encoder's."""
        self.encoder.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """The same under its older name."""
        self.encoder.gradient_checkpointing_enable(**kwargs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Embeddings, (B, T) ids -> (B, E)."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden_BTD = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden_BTD[:, 0] if attention_mask is None else first_token(hidden_BTD, attention_mask)
        elif attention_mask is None:
            pooled = hidden_BTD.mean(1)
        else:
            weight = attention_mask.unsqueeze(-1).to(hidden_BTD.dtype)
            pooled = (hidden_BTD * weight).sum(1) / weight.sum(1).clamp_min(1)
        if self.head is not None:
            pooled = self.head(pooled)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the encoder to the root of the folder, and the other parts as modules of sentence-transformers."""
        folder = Path(folder)
        kwargs.pop("state_dict", None)
        self.encoder.save_pretrained(folder, **kwargs)
        modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
        pooling = {key: self.pooling == name for name, key in _POOLING_KEYS.items()}
        _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": self.width, **pooling})
        if self.head is not None:
            modules.append(("Dense", _DENSE))
            shape = {"in_features": self.width, "out_features": self.head.out_features, "bias": True}
            activation = {"activation_function": "torch.nn.modules.linear.Identity"}
            _write_json(folder / _DENSE / "config.json", {**shape, **activation})
            weights = {f"linear.{name}": value.cpu() for name, value in self.head.state_dict().items()}
            save_file(weights, folder / _DENSE / "model.safetensors", metadata={"format": "pt"})
        if self.normalize:
            modules.append(("Normalize", f"{len(modules)}_Normalize"))
            (folder / modules[-1][1]).mkdir(exist_ok=True)
        entries = [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (kind, path) in enumerate(modules)
        ]
        _write_json(folder / "modules.json", entries)
        positions = usable_positions(self.config)
        _write_json(folder / "sentence_bert_config.json", {"max_seq_length": positions, "do_lower_case": False})


def load_embedding_model(folder: str, *, what: str = "teacher", **kwargs: Any) -> EmbeddingModel:
    """Load an encoder, with the pooling and head of its sentence-transformers files (default: mean pooling, no head);
    UserError for an unknown module or pooling."""
    config = load_config(folder, what=what, trust_remote_code=bool(kwargs.get("trust_remote_code")))
    # a T5 encoder is one half of an encoder-decoder model
    half = getattr(config, "is_encoder_decoder", False) or (config.architectures or [""])[0].endswith("EncoderModel")
    encoder = load_model(folder, AutoModelForTextEncoding if half else AutoModel, what=what, **kwargs)
    if (modules := find_file(folder, "modules.json")) is None:
        return EmbeddingModel(encoder)
    kinds = {entry["type"].rsplit(".", 1)[-1]: entry["path"] for entry in _read_json(modules)}
    if unknown := set(kinds) - set(_MODULES):
        raise UserError(f"{what} {folder!r} has a module of kind {sorted(unknown)[0]}; known: {', '.join(_MODULES)}")
    pooling = "mean"
    if "Pooling" in kinds:
        settings = _read_json(_part(folder, f"{kinds['Pooling']}/config.json", what))
        chosen = [key for key, value in settings.items() if key.startswith("pooling_mode") and value is True]
        named = [name for name, key in _POOLING_KEYS.items() if chosen == [key]]
        pooling = named[0] if named else settings.get("pooling_mode", "mean")
        if (chosen and not named) or pooling not in POOLINGS:
            raise UserError(f"{what} {folder!r} pools by {sorted(chosen) or pooling}; known: mean, cls")
    model = EmbeddingModel(encoder, None, pooling, "Normalize" in kinds)
    if "Dense" in kinds:
        weights = _dense_weights(folder, kinds["Dense"], what)
        model.head = nn.Linear(model.width, len(weights["weight"]))
        model.head.load_state_dict(weights)
    return model


def _part(folder: str, name: str, what: str) -> Path:
    found = find_file(folder, name)
    if found is None:
        raise UserError(f"{what} {folder!r} names {name} in its modules.json but has no such file")
    return found


def _dense_weights(folder: str, part: str, what: str) -> dict[str, Tensor]:
    """State of the linear head in a Dense module; a missing bias is zero."""
    whose = f"{what} {folder!r}"
    activation = _read_json(_part(folder, f"{part}/config.json", what)).get("activation_function", "Tanh")
    if not activation.endswith("Identity"):
        raise UserError(f"{whose} has a Dense module with the activation {activation}; known: Identity (a linear map)")
    if Path(folder).is_dir():
        check_weights(str(Path(folder) / part), what=f"the Dense module of {whose}, folder")
    stored = load_file(_part(folder, f"{part}/model.safetensors", what))
    weights = {name.removeprefix("linear."): value for name, value in stored.items()}
    return {"bias": torch.zeros(len(weights["weight"])), **weights}


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
