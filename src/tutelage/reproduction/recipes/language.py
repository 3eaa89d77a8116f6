"""Language models: the synthetic language of a grammar, and real text, masked and causal.

Public names: `PcfgFields`, `TextFields`, `pcfg`, `text`.

Settings follow arXiv:2410.05464 (PCFG: 30% masking, Adam with betas 0.9 and 0.95, cosine with 6% warm-up). All methods are
compared at the end of one budget; the target of a comparison is one-shot's final loss.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig, ModernBertConfig

from tutelage.core.errors import UserError
from tutelage.reproduction.comparison_setting import EVAL_SEED, TEACHER_SEED, RecipeFields, System, Teacher
from tutelage.reproduction.teachers import TeacherRule, trained_teacher
from tutelage.tasks.base import get_task
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_TEACHER, DEFAULT_TEXT
from tutelage.tasks.loading import load_model, load_tokenizer
from tutelage.tasks.pcfg import PcfgDataset, build_grammar, pcfg_collator, pcfg_config
from tutelage.tasks.text import make_collator, read_dataset, split_dataset, tokenize
from tutelage.training.evaluation import evaluate_batches

# Our best variant of each language, beside the paper's own extraction (`extraction`); chosen on a seed that is not reported.
_BEST = {
    "pcfg-mlm": "extraction:normalize=standardize",
    "pcfg-clm": "extraction:normalize=standardize",
    "text-mlm": "extraction:layer_map=final:final,warm_start=head,projection=logits,normalize=standardize",
    "text-clm": "extraction:layer_map=final:final,warm_start=head,projection=logits,normalize=standardize",
}


@dataclass(frozen=True)
class LanguageFields(RecipeFields):
    """What the language recipes share."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Reported seeds."""
    tuning_seeds: tuple[int, ...] = (1000,)
    """Seeds on which rates and schedules are chosen."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """The grid that every method gets."""
    tuning_share: float = 0.34
    """Share of the budget that tuning runs get."""
    batch_size: int = 32
    """Sequences a step."""
    budget_samples: int = 32_000
    """Sequences that each method may train on."""
    eval_every: int = 1_600
    """Sequences between evaluations."""
    eval_samples: int = 512
    """Held-out sequences."""
    layers: int = 4
    """Blocks of teacher and student."""
    teacher_heads: int = 16
    """Heads of the teacher."""
    student_heads: int = 4
    """Heads of the student."""
    head_width: int = 8
    """Width of a head."""
    stage_fraction: float = 0.25
    """Share of the steps given to the hidden stages together."""
    num_stages: int | None = 1
    """Hidden stages of the paper's extraction, evenly spaced; unset is one for each block."""
    teacher_learning_rate: float = 2e-3
    """Peak learning rate of the teacher."""
    teacher_samples: int = 64_000
    """Sequences that the teacher is trained on, with a cosine decay to zero: its loss has flattened by then."""
    teacher_checkpoints: int = 8
    """Checkpoints kept over its training, for progressive distillation."""
    teacher_path: str | None = None
    """Folder of a finished teacher, instead of training one."""
    teacher_seed: int = 0
    """Seed of the teacher."""


@dataclass(frozen=True)
class PcfgFields(LanguageFields):
    """Strings of a probabilistic context-free grammar."""

    levels: int = 5
    """Levels of the grammar, root and terminals included."""
    grammar_seed: int = 0
    """Seed of its rules."""
    mask_probability: float = 0.3
    """Share of terminals masked (masked prediction)."""


@dataclass(frozen=True)
class TextFields(LanguageFields):
    """Real text."""

    dataset: str | None = None
    """Hub name, folder or file; unset is the embedded Austen text, with Wikipedia summaries where they were fetched."""
    eval_dataset: str | None = None
    """Held-out text; unset holds out the end of each text."""
    max_length: int = 64
    """Tokens a sequence."""
    head_width: int = 16
    """Width of a head."""
    budget_samples: int = 16_000
    """Sequences that each method may train on."""
    eval_every: int = 800
    """Sequences between evaluations."""
    teacher_samples: int = 32_000
    """Sequences that the teacher is trained on."""
    mask_probability: float = 0.3
    """Share of tokens masked (masked prediction)."""


def pcfg(fields: PcfgFields, size: str, task: str) -> System:
    """Masked (BERT shape) or causal (GPT-2 shape) prediction of a grammar's strings."""
    grammar = build_grammar(fields.levels, seed=fields.grammar_seed)

    def config(heads: int) -> Any:
        return pcfg_config(task, fields.layers, heads, fields.head_width, grammar)

    def data(seed: int, count: int) -> Any:
        return PcfgDataset(grammar, count, seed)

    return _language(
        "pcfg-mlm" if task == "masked_lm" else "pcfg-clm",
        fields,
        size,
        task,
        config,
        train=data,
        held_out=lambda: data(EVAL_SEED, fields.eval_samples),
        collator=pcfg_collator(task, grammar, fields.mask_probability),
        identity={"levels": fields.levels, "grammar_seed": fields.grammar_seed, "masked": fields.mask_probability},
    )


def text(fields: TextFields, size: str, task: str) -> System:
    """Masked (ModernBERT shape) or causal (Llama shape) prediction of real text."""
    tokenizer = load_tokenizer(DEFAULT_TEACHER)
    assert tokenizer is not None
    if task == "masked_lm":
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    kind = get_task(task)
    train_rows, eval_rows = _text_rows(fields, tokenizer, kind)
    width = fields.head_width

    def config(heads: int) -> Any:
        shape = {
            "vocab_size": len(tokenizer),
            "hidden_size": heads * width,
            "num_hidden_layers": fields.layers,
            "num_attention_heads": heads,
            "max_position_embeddings": fields.max_length,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if task == "masked_lm":
            # BERT's normalisation after each block, and its learnt positions, stay at unigrams for this whole budget
            ends = dict.fromkeys(
                ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), tokenizer.eos_token_id
            )
            kinds = ["full_attention"] * fields.layers
            return ModernBertConfig(**shape, **ends, intermediate_size=2 * heads * width, layer_types=kinds)
        return LlamaConfig(**shape, intermediate_size=4 * heads * width, tie_word_embeddings=False)

    return _language(
        "text-mlm" if task == "masked_lm" else "text-clm",
        fields,
        size,
        task,
        config,
        train=lambda seed, count: train_rows.shuffle(seed=seed % 2**32),
        held_out=lambda: eval_rows.select(range(min(fields.eval_samples, len(eval_rows)))),
        collator=make_collator(kind, tokenizer, fields.mask_probability),
        identity={"text": train_rows._fingerprint, "length": fields.max_length, "masked": fields.mask_probability},
        record={"texts": [_text_name(source) for source, _ in _text_sources(fields)]},
        tokenizer=tokenizer,
    )


def _text_rows(fields: TextFields, tokenizer: Any, kind: Any) -> tuple[Any, Any]:
    """Training and held-out blocks."""
    parts = []
    for source, held_out in _text_sources(fields):
        data = read_dataset(source)
        pair = split_dataset(data, 0.05) if held_out is None else (data, read_dataset(held_out))
        parts.append([tokenize(part, tokenizer, kind, fields.max_length) for part in pair])
    train, evaluation = (concatenate_datasets(list(side)) for side in zip(*parts, strict=True))
    return train, evaluation.shuffle(seed=0)


def _text_sources(fields: TextFields) -> list[tuple[str, str | None]]:
    """Training and held-out texts: the user's, or the embedded one, with Wikipedia summaries where they were fetched."""
    if fields.dataset is not None:
        return [(fields.dataset, fields.eval_dataset)]
    sources: list[tuple[str, str | None]] = [(DEFAULT_TEXT, DEFAULT_EVAL_TEXT)]
    wikipedia = Path(os.environ.get("TUTELAGE_ASSETS") or ".assets") / "wikipedia"
    if (wikipedia / "train.jsonl").is_file():
        sources.append((str(wikipedia / "train.jsonl"), str(wikipedia / "heldout.jsonl")))
    return sources


def _text_name(source: str) -> str:
    """A text for the record, without where this machine keeps it."""
    return "/".join(Path(source).parts[-2:])


def _language(
    name: str,
    fields: LanguageFields,
    size: str,
    task: str,
    config: Callable[[int], Any],
    *,
    train: Callable[[int, int], Any],
    held_out: Callable[[], Any],
    collator: Any,
    identity: dict[str, Any],
    record: dict[str, Any] | None = None,
    tokenizer: Any = None,
) -> System:
    auto: Any = AutoModelForMaskedLM if task == "masked_lm" else AutoModelForCausalLM

    def build(heads: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return auto.from_config(config(heads))

    shared = {
        "optim": "adamw_torch",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.06,
        "per_device_eval_batch_size": 64,
    }

    def teacher(_: Path) -> Teacher:
        if fields.teacher_path is not None:
            model: Any = load_model(fields.teacher_path, auto)
            if (mine := config(1).vocab_size) != model.config.vocab_size:
                raise UserError(
                    f"teacher {Path(fields.teacher_path).name!r} has {model.config.vocab_size} vocabulary entries, the recipe "
                    f"has {mine}: it was made for another language"
                )
            return _given(model, fields, task, held_out(), collator)
        whole = {
            **identity,
            "shape": [fields.layers, fields.teacher_heads, fields.head_width],
            "seed": fields.teacher_seed,
            "eval": fields.eval_samples,
        }
        arguments = {
            **shared,
            "task": task,
            "learning_rate": fields.teacher_learning_rate,
            "per_device_train_batch_size": fields.batch_size,
            "seed": fields.teacher_seed,
            "train_sampling_strategy": "sequential",
        }
        every = fields.teacher_samples // fields.teacher_checkpoints
        rule = TeacherRule("loss", None, 1.0, fields.teacher_samples, every, better="lower")
        seed = TEACHER_SEED + fields.teacher_seed
        return trained_teacher(
            name,
            whole,
            lambda: build(fields.teacher_heads, fields.teacher_seed),
            lambda folder: load_model(folder, auto),
            rule,
            arguments,
            lambda count: (train(seed, count), held_out()),
            collator,
        )

    return System(
        recipe=name,
        size=size,
        fields=fields,
        task=task,
        metric="loss",
        better="lower",
        target=None,
        arguments=shared,
        methods={
            "extraction": {
                "num_stages": fields.num_stages,
                "stage_fraction": fields.stage_fraction,
                "normalize": "none",
                "warm_start": "none",
            }
        },
        make_teacher=teacher,
        make_student=lambda seeds: build(fields.student_heads, 31 + seeds[0]),
        train_data=lambda seeds, count: train(seeds[0], count),
        eval_data=lambda seeds: held_out(),
        collator=collator,
        default_methods=("extraction", _BEST[name], "one_shot", "progressive", "scratch"),
        tokenizer=tokenizer,
        identity=record or {},
        sketch_teacher=None if fields.teacher_path else lambda: build(fields.teacher_heads, fields.teacher_seed),
    )


def _given(model: Any, fields: LanguageFields, task: str, held_out: Any, collator: Any) -> Teacher:
    """A teacher from a folder, after checking that it knows this language better than chance."""
    with torch.random.fork_rng(devices=[]):
        batches = DataLoader(held_out, batch_size=64, collate_fn=collator)
        metrics = evaluate_batches(model, batches, get_task(task))
    name = Path(str(fields.teacher_path)).name
    if metrics["loss"] > math.log(model.config.vocab_size):
        raise UserError(
            f"teacher {name!r} has a held-out loss of {metrics['loss']:.3f} on this recipe's text, worse than chance: it was "
            "made for another language"
        )
    return Teacher(model, {"description": f"given: {name}", **metrics})


def smoke(fields: Any, **changes: Any) -> Any:
    """Fields of the `smoke` size: a few steps of tiny models."""
    tiny = {
        "seeds": (0,),
        "learning_rates": (3e-3,),
        "budget_samples": 320,
        "eval_every": 160,
        "eval_samples": 32,
        "batch_size": 16,
        "layers": 2,
        "teacher_heads": 4,
        "student_heads": 2,
        "num_stages": 2,
        "stage_fraction": 0.4,
        "teacher_samples": 640,
        "teacher_checkpoints": 2,
    }
    return dataclasses.replace(fields, **{**tiny, **changes})


def paper(fields: Any, **changes: Any) -> Any:
    """Fields of the `paper` size (arXiv:2410.05464): teacher 32 heads x 8, student 8 heads x 8, batch 512."""
    large = {
        "teacher_heads": 32,
        "student_heads": 8,
        "batch_size": 512,
        "budget_samples": 512 * 8_000,
        "eval_every": 512 * 200,
        "eval_samples": 4096,
        "teacher_samples": 512 * 16_000,
        "teacher_checkpoints": 32,
        "num_stages": None,
    }
    return dataclasses.replace(fields, **{**large, **changes})


def sizes(kind: type[LanguageFields], **changes: Any) -> dict[str, RecipeFields]:
    """The three sizes of a language recipe."""
    laptop = kind(**changes)
    extra: dict[str, Any] = {"levels": 4} if kind is PcfgFields else {"max_length": 32}
    wide: dict[str, Any] = {"levels": 7} if kind is PcfgFields else {"head_width": 8, "max_length": 512}
    return {"smoke": smoke(laptop, **extra), "laptop": laptop, "paper": paper(laptop, **wide)}
