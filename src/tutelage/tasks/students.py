"""Students: from a folder, from a config file, or from a preset relative to the teacher."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from tutelage.core.errors import UserError, as_user_error
from tutelage.core.inputs import text_config
from tutelage.tasks.base import Task
from tutelage.tasks.initialization.layout import PER_BLOCK
from tutelage.tasks.loading import MOST_BLOCKS, MOST_WIDTH, check_name, check_sizes, has_class, has_weights, load_config

WEIGHTS = "_tutelage_weights"  # where a model keeps what its weights are: `random`, `own` or `teacher` (initialised)
_FINGERPRINT = "_tutelage_fingerprint"  # where `make_student` keeps what tells weights that were changed since
_ALIASES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
}
# names of the feed-forward width, by architecture family; a preset may say intermediate_size for each
_FEED_FORWARD = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner", "hidden_dim", "d_ff", "dff")
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
# sizes, and the largest that a preset may have
_SIZES = {
    **{"num_hidden_layers": MOST_BLOCKS, "hidden_size": MOST_WIDTH},
    **dict.fromkeys(_HEADS, MOST_WIDTH),
    **dict.fromkeys(_FEED_FORWARD, 2**20),
}


def student_config(student: str, teacher: PreTrainedConfig, task: Task | None = None) -> PreTrainedConfig:
    """The configuration of a student.

    `student` is a model folder, a `config.json`, or a preset such as `layers=3,hidden_size=192`: comma-separated settings that
    replace those of the teacher. The number of heads and the feed-forward width follow the hidden size unless they are given;
    every other field (head size, vocabulary, positions, activation...) is that of the teacher. Of a teacher with an image or
    sound encoder, a preset changes the language model; if `task` has a model of it alone, that is the student.
    Raises UserError: not a folder, file or preset; an unknown field; a width that does not fit the heads."""
    if is_preset(student):
        whole = copy.deepcopy(language_config(teacher, task))
        whole.id2label, whole.label2id = teacher.id2label, teacher.label2id
        with as_user_error(f"student preset {student!r} cannot be made from a {whole.model_type} teacher"):
            text = _preset(student, text_config(whole))
        for name in whole.sub_configs:
            if getattr(whole, name, None) is text_config(whole):
                setattr(whole, name, text)
                return _untrained(whole)
        return text
    check_name(student, "student")
    path = Path(student)
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(fields, dict) or "model_type" not in fields:
            raise UserError(f"student config {student!r} has no model_type: it is not a transformers configuration")
        check_sizes(fields, f"student config {student!r}")
        with as_user_error(f"student config {student!r} cannot be used"):
            return AutoConfig.for_model(**fields)
    return load_config(student, what="student")


def language_config(config: PreTrainedConfig, task: Task | None) -> PreTrainedConfig:
    """The part of a configuration that is about its language model, if `task` has a model of it alone; else all of it."""
    text: PreTrainedConfig = text_config(config)
    return text if task is not None and has_class(task.auto_class, text) else config


def is_preset(student: str) -> bool:
    """Whether `student` is a preset, not a folder, a file or a Hub name."""
    return "=" in student and not os.path.exists(student)  # a preset may be longer than a file's name


def is_untrained(student: str) -> bool:
    """Whether `student` names a shape without weights: a preset, a configuration, or a folder with one alone."""
    path = Path(student)
    return is_preset(student) or path.is_file() or (path.is_dir() and not has_weights(path))


def make_student(
    student: str, task: Task, config: PreTrainedConfig, shape: Mapping[str, Any] | None = None
) -> nn.Module:
    """The student model: loaded if `student` is a folder or Hub name with weights, else randomly initialised.

    `config` is the result of `student_config`, `shape` is `Task.teacher_shape` of the teacher."""
    if is_untrained(student):
        model = task.build(config, shape)
    else:
        model = task.load(student, what="student")
        task.fit_to_teacher(model, shape)
    model.__dict__[WEIGHTS] = "random" if is_untrained(student) else "own"
    model.__dict__[_FINGERPRINT] = _fingerprint(model)
    return model


def weights_of(model: nn.Module) -> str | None:
    """What the weights of a model are, as `WEIGHTS`; None where nobody said. Weights that were changed since `make_student`
    made the model are its own."""
    made = model.__dict__.get(_FINGERPRINT)
    return model.__dict__.get(WEIGHTS) if made is None or made == _fingerprint(model) else "own"


def _fingerprint(model: nn.Module) -> list[list[float]]:
    """A few values of each parameter."""
    flat = [parameter.detach().flatten() for parameter in model.parameters()]
    return [values[:: max(1, len(values) // 8)].cpu().double().tolist() for values in flat]


def feed_forward_width(config: PreTrainedConfig) -> int | None:
    """Neurons of a feed-forward layer; None where the configuration does not say."""
    if name := _feed_forward_name(config):
        return getattr(config, name) or 4 * config.hidden_size  # as GPT-2 reads None
    return None


def _feed_forward_name(config: PreTrainedConfig) -> str | None:
    return next((name for name in _FEED_FORWARD if name in config.to_dict()), None)


def _preset(text: str, teacher: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(teacher)
    settings = _settings(text, config)
    depth, width = config.num_hidden_layers, config.hidden_size
    new_depth = settings.setdefault("num_hidden_layers", depth)
    new_width = settings.setdefault("hidden_size", width)
    if new_width != width or not settings.keys().isdisjoint(_HEADS):
        _set_heads(config, settings, width, new_width)
    if new_width != width:
        _scale_width(config, settings, width, new_width)
    for name in PER_BLOCK:
        # keep the mixture of attention types: each block has the type of the one that the uniform layer map pairs it with
        if kinds := getattr(config, name, None):
            setattr(config, name, [kinds[max(1, round(s * depth / new_depth)) - 1] for s in range(1, new_depth + 1)])
    for name, value in config.to_dict().items():
        if depth > 1 and value == list(range(depth)):  # each block by its number, such as kv_source_layers
            setattr(config, name, list(range(new_depth)))
    for key, value in settings.items():
        with as_user_error(f"student preset {text!r}: {key}={value} cannot be used"):
            setattr(config, key, value)
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if new_width % heads and not getattr(config, "head_dim", None):
        raise UserError(f"student preset {text!r}: hidden_size {new_width} is not divisible by {heads} heads")
    if groups and heads % groups:
        raise UserError(f"student preset {text!r}: {heads} heads are not divisible by {groups} key/value heads")
    size, rope = getattr(config, "head_dim", None) or new_width // heads, getattr(config, "rope_parameters", None)
    if rope and int(size * (rope.get("partial_rotary_factor") or 1)) % 2:
        raise UserError(
            f"student preset {text!r}: each head has {size} values, but rotary position embeddings need an even number: change "
            "hidden_size, heads or head_dim"
        )
    if hasattr(config, "validate"):  # as it would be only when the trained student is saved
        with as_user_error(f"student preset {text!r} cannot be saved by transformers, so change it"):
            config.validate()
    return _untrained(config)


def _settings(text: str, config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a preset sets, by their usual names."""
    given: list[tuple[str, Any]] = []
    for part in text.split(","):
        key, _, value = part.partition("=")
        if "=" not in part or not key.strip():
            raise UserError(f"student preset {text!r}: {part!r} is not a setting such as layers=3")
        with as_user_error(f"student preset {text!r}: cannot read {part!r}"):
            given.append((_ALIASES.get(key.strip(), key.strip()), yaml.safe_load(value)))
    for needed in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if getattr(config, needed, None) is None:
            raise UserError(
                f"student preset {text!r} needs a teacher whose configuration has {needed}, but {type(config).__name__} has "
                "none: give a folder or a config.json as the student"
            )
    common = {own: name for name, own in config.attribute_map.items()}  # GPT-2's n_embd is hidden_size
    neurons = _feed_forward_name(config) or "intermediate_size"
    settings: dict[str, Any] = {}
    for key, value in given:
        name = common.get(key, key)
        name = neurons if name == "intermediate_size" else name
        if name in settings:
            raise UserError(f"student preset {text!r} has {name} twice: leave one of them out")
        settings[name] = value
    known = {*config.to_dict(), *config.attribute_map}
    if unknown := [key for key in settings if key not in known]:
        raise UserError(f"student preset {text!r}: {type(config).__name__} has no field {unknown[0]!r}")
    for key, value in settings.items():
        if key in _SIZES and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"student preset {text!r}: {key} must be a positive whole number, got {value!r}")
        if key in _SIZES and value > _SIZES[key]:
            raise UserError(f"student preset {text!r}: {key} must be at most {_SIZES[key]}, got {value}")
    return settings


def _untrained(config: PreTrainedConfig) -> PreTrainedConfig:
    """Without what belongs to the weights of the teacher."""
    for stale in ("quantization_config", "_name_or_path"):
        if hasattr(config, stale):
            delattr(config, stale)
    config.dtype = torch.float32  # of random weights that are to be trained, whatever the teacher is stored in
    return config


def _set_heads(config: PreTrainedConfig, settings: dict[str, Any], width: int, new_width: int) -> None:
    """Set what is not given of the heads: their number follows the hidden size, their own size is the teacher's."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or width // heads
    has_size = not {"head_dim", "d_kv"}.isdisjoint(config.to_dict())
    if "num_attention_heads" not in settings:
        size = heads // (groups or heads)  # whole groups, so that a student can start from the teacher's
        new_heads = (
            max(1, round(heads / size * new_width / width)) * size if has_size else max(1, new_width // head_dim)
        )
        # without a size of their own, heads share the width, and rotary embeddings need an even size
        while not has_size and new_heads > 1 and new_width % (2 * new_heads):
            new_heads -= 1
        if given := settings.get("num_key_value_heads"):
            new_heads = max(1, new_heads // given) * given
        settings["num_attention_heads"] = new_heads
    new_heads = settings["num_attention_heads"]
    if groups and "num_key_value_heads" not in settings:
        new_groups = max(1, round(new_heads * groups / heads))
        while new_heads % new_groups:
            new_groups -= 1
        settings["num_key_value_heads"] = new_groups
    if "head_dim" in config.to_dict():
        settings.setdefault("head_dim", head_dim)


def _scale_width(config: PreTrainedConfig, settings: dict[str, Any], width: int, new_width: int) -> None:
    """Set the feed-forward and embedding widths for the hidden size, unless they are given."""
    for name in _FEED_FORWARD:
        if getattr(config, name, None) and name not in settings:
            settings[name] = max(8, round(getattr(config, name) * new_width / width / 8) * 8)
    for name in ("embedding_size", "word_embed_proj_dim"):
        if config.to_dict().get(name) == width:
            settings.setdefault(name, new_width)
