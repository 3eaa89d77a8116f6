"""Language models: the synthetic language of a grammar, and real text, masked and causal.

Settings follow arXiv:2410.05464 (PCFG: 30% masking, Adam with betas 0.9 and 0.95, cosine with 6% warm-up). All methods are
compared at the end of one budget; the target of a comparison is one-shot's final loss."""

import dataclasses
import math
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import concatenate_datasets
from torch import nn
from transformers import LlamaConfig, ModernBertConfig

from tutelage.core.errors import UserError, check_range
from tutelage.reproduction.recipe import EVAL_SEED, TEACHER_SEED, PaperRecipe, at_least_one
from tutelage.reproduction.search import Axis
from tutelage.reproduction.teachers import Teacher, TeacherRule
from tutelage.reproduction.variants import SHARES, Variant, parse_variant, plain_variant
from tutelage.targets.identity import data_fingerprint
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_TEACHER, DEFAULT_TEXT
from tutelage.tasks.loading import MOST_BLOCKS, MOST_WIDTH, load_tokenizer
from tutelage.tasks.pcfg import PcfgDataset, pcfg_collator, pcfg_config
from tutelage.tasks.pcfg_grammar import Grammar, build_grammar
from tutelage.tasks.registry import get_task
from tutelage.tasks.text import read_dataset, split_dataset, tokenize

_TEXTS = ("austen+wikipedia", "austen")
_OTHER = "it was made for a different language"


# students that start from the teacher's weights
_FROM_TEACHER = (
    "extraction-teacher:method=extraction,student_init=teacher,projection=residual",
    "joint-teacher:method=joint,student_init=teacher,projection=residual",
    "one_shot-teacher:method=one_shot,student_init=teacher",
    "progressive-teacher:method=progressive,student_init=teacher",
)
_FURTHER = (
    "joint-equal:method=joint,hidden_weight=1",
    "joint-learned:method=joint,projection=learned",
    "one_shot-labels:method=one_shot,temperature=1|2|4,label_weight=0|0.5",
    "one_shot-transplant:method=one_shot,warm_start=head,projection=logits,normalize=standardize",
    "one_shot-embedding:method=one_shot,warm_start=embedding",
    "scratch-flops:method=scratch,match=flops",
)
_FINAL_STATE = "layer_map=final:final,projection=logits,normalize=standardize"
_ALL_POSITIONS = "one_shot-all:method=one_shot,output_positions=all"


@dataclass(frozen=True)
class LanguageRecipe(PaperRecipe):
    """What the language recipes have in common."""

    metric = "loss"
    better = "lower"
    schedules = SHARES  # the teacher is trained for many times the student's budget, so none of its paces fits
    best: ClassVar[tuple[Variant, Variant]]
    """Our best variant of extraction, in addition to the paper's, chosen on a seed that is not reported; and joint training
    on the same targets."""

    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    trials: int | None = 8
    batch_size: int = 32
    budget_samples: int = 32_000
    eval_every: int = 1_600
    eval_samples: int = 512
    layers: int = 4  # blocks of teacher and student
    teacher_heads: int = 16
    student_heads: int = 4
    head_width: int = 8
    stage_fraction: float = 0.25  # fraction of the steps given to the hidden stages together
    num_stages: int | None = 1  # hidden stages that are tried first, evenly spaced; `none`: one for each block
    teacher_samples: int = 256_000  # sequences that the teacher is trained on, with a cosine decay to zero
    teacher_checkpoints: int = 10  # checkpoints kept over its training, for progressive distillation
    teacher_plateau: float = 0.05
    """Its held-out loss must fall by less than this over the last fifth of its training, in which the decay of the rate to zero
    lowers it too."""
    mlm_probability: float = 0.3  # fraction of tokens masked (masked prediction)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "layers", "teacher_heads", "student_heads", "head_width", most=MOST_BLOCKS)
        check_range("teacher_heads * head_width", self.teacher_heads * self.head_width, 1, MOST_WIDTH)
        at_least_one(self, "teacher_samples", "teacher_checkpoints")

    @abstractmethod
    def model_config(self, heads: int) -> Any:
        """The configuration of a model with this number of heads."""

    @abstractmethod
    def sequences(self, seed: int, count: int) -> Any:
        """Training sequences in the order of a seed."""

    @property
    def default_methods(self) -> tuple[Variant, ...]:
        names = ("extraction", "joint", "one_shot", "progressive", "scratch")
        first, *others = map(plain_variant, names)
        return (first, *self.best, *others, *map(parse_variant, _FROM_TEACHER))

    @property
    def further_methods(self) -> tuple[Variant, ...]:
        masked = (_ALL_POSITIONS,) if self.task == "masked_lm" else ()
        return tuple(map(parse_variant, (*_FURTHER, *masked)))

    def arguments(self) -> dict[str, Any]:
        optimizer = {"optim": "adamw_torch", "adam_beta2": 0.95, "weight_decay": 0.0}
        schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 0.06}
        return {**optimizer, **schedule, "per_device_eval_batch_size": 64, "preset": "paper"}

    @property
    def places(self) -> dict[str, Any]:
        return {"num_stages": self.num_stages}

    def stage_arguments(self) -> dict[str, Any]:
        return {"stage_fraction": self.stage_fraction}

    def stage_axes(self) -> dict[str, Axis]:
        shares = (self.stage_fraction / 2, self.stage_fraction, min(2 * self.stage_fraction, 0.75))
        return {"stage_fraction": Axis(shares, start=self.stage_fraction, grows=True)}

    def place_axes(self) -> dict[str, Axis]:
        counts = tuple(count for count in (1, 2, 4, 8) if count <= self.layers)
        return {"num_stages": Axis(counts, start=self.num_stages or self.layers)}

    @property
    def first_phase(self) -> int:
        return self.budget_samples // 4

    def _build(self, heads: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return get_task(self.task).auto_class.from_config(self.model_config(heads))

    def make_student(self, seeds: Sequence[int]) -> nn.Module:
        return self._build(self.student_heads, 31 + seeds[0])

    def train_data(self, seeds: Sequence[int], count: int) -> Any:
        return self.sequences(seeds[0], count)

    def new_teacher(self) -> nn.Module:
        return self._build(self.teacher_heads, self.teacher_seed)

    def teacher_rule(self) -> TeacherRule:
        every = self.teacher_samples // self.teacher_checkpoints
        return TeacherRule("loss", None, 1.0, self.teacher_samples, every, "lower", self.teacher_plateau)

    def teacher_data(self, count: int) -> tuple[Any, Any]:
        return self.sequences(TEACHER_SEED + self.teacher_seed, count), self.eval_data(())

    def teacher_identity(self) -> dict[str, Any]:
        shape = [self.layers, self.teacher_heads, self.head_width]
        rest = {"seed": self.teacher_seed, "eval": self.eval_samples, "tied": False}
        return {"masked": self.mlm_probability, "shape": shape, **rest}

    def checked_teacher(self, teacher: Teacher) -> Teacher:
        """A given teacher has to have this vocabulary and to know this language better than chance."""
        if not self.teacher_is_given:
            return teacher
        model, name = teacher.model, Path(self.teacher).name
        entries, mine = int(model.config.vocab_size), self.model_config(1).vocab_size  # type: ignore[union-attr, arg-type]
        if mine != entries:
            raise UserError(f"teacher {name!r} has {entries} vocabulary entries, the recipe has {mine}: {_OTHER}")
        metrics = self.evaluate(model, self.eval_data(()), batch_size=64)
        if metrics["loss"] > math.log(entries):
            found = f"teacher {name!r} has a held-out loss of {metrics['loss']:.3f} on this recipe's text"
            raise UserError(f"{found}, worse than chance: {_OTHER}")
        return dataclasses.replace(teacher, metrics=metrics)


@dataclass(frozen=True)
class PcfgRecipe(LanguageRecipe):
    """Strings of a probabilistic context-free grammar."""

    best = (
        Variant("extraction-standardized", "extraction", {"normalize": "standardize"}),
        Variant("joint-standardized", "joint", {"normalize": "standardize"}),
    )

    levels: int = 5  # levels of the grammar, root and terminals included
    grammar_seed: int = 0

    @cached_property
    def grammar(self) -> Grammar:
        return build_grammar(self.levels, seed=self.grammar_seed)

    @cached_property
    def collator(self) -> Any:
        return pcfg_collator(self.task, self.grammar, self.mlm_probability)

    def check(self) -> None:
        self.collator  # noqa: B018 - builds the grammar too

    def model_config(self, heads: int) -> Any:
        # not tied, so that a student can start from the teacher; the two matrices have a row for each of a few symbols
        fields = {"tie_word_embeddings": False}
        return pcfg_config(self.task, self.layers, heads, self.head_width, self.grammar, **fields)

    def sequences(self, seed: int, count: int) -> Any:
        return PcfgDataset(self.grammar, count, seed)

    def eval_data(self, seeds: Sequence[int], tuning: bool = False) -> Any:
        return self.sequences(EVAL_SEED + int(tuning), self.eval_samples)

    def teacher_identity(self) -> dict[str, Any]:
        return {**super().teacher_identity(), "levels": self.levels, "grammar_seed": self.grammar_seed}


class MaskedPcfg(PcfgRecipe):
    """BERT shape."""

    name = "pcfg-mlm"
    about = "a grammar's strings, masked prediction, BERT shape"
    task = "masked_lm"


class CausalPcfg(PcfgRecipe):
    """GPT-2 shape."""

    name = "pcfg-clm"
    about = "a grammar's strings, causal, GPT-2 shape"
    task = "causal_lm"


@dataclass(frozen=True)
class TextRecipe(LanguageRecipe):
    """Real text."""

    best = (
        parse_variant(f"extraction-final-state:method=extraction,warm_start=head,{_FINAL_STATE}"),
        parse_variant(f"joint-final-state:method=joint,{_FINAL_STATE}"),
    )

    texts: str = "austen+wikipedia"
    """The embedded novels with Wikipedia summaries (scripts/fetch_assets.py), or `austen` alone."""
    dataset: str | None = None  # Hub name, folder or file, in place of these texts
    eval_dataset: str | None = None  # held-out text; default: the end of each text
    max_length: int = 64  # tokens per sequence
    teacher_heads: int = 8
    head_width: int = 16
    budget_samples: int = 16_000
    eval_every: int = 800
    teacher_samples: int = 128_000

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "max_length")

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(DEFAULT_TEACHER)

    @cached_property
    def collator(self) -> Any:
        return get_task(self.task).collator(self.tokenizer, self.mlm_probability)

    def check(self) -> None:
        self._rows  # noqa: B018 - reads the texts

    @cached_property
    def _rows(self) -> tuple[Any, Any]:
        parts = []
        for source, held_out in self._sources():
            data = read_dataset(source)
            pair = split_dataset(data, 0.05) if held_out is None else (data, read_dataset(held_out))
            parts.append([tokenize(part, self.tokenizer, get_task(self.task), self.max_length) for part in pair])
        train, evaluation = (concatenate_datasets(list(side)) for side in zip(*parts, strict=True))
        return train, evaluation.shuffle(seed=0)

    def _sources(self) -> list[tuple[str, str | None]]:
        """Training and held-out texts: the user's, or the embedded one and the Wikipedia summaries."""
        if self.dataset is not None:
            return [(self.dataset, self.eval_dataset)]
        if self.texts not in _TEXTS:
            raise UserError(f"unknown texts {self.texts!r}: use one of {', '.join(_TEXTS)}, or give a dataset")
        sources: list[tuple[str, str | None]] = [(DEFAULT_TEXT, DEFAULT_EVAL_TEXT)]
        if self.texts != "austen":
            wikipedia = Path(os.environ.get("TUTELAGE_ASSETS") or ".assets") / "wikipedia"
            if not (wikipedia / "train.jsonl").is_file():
                found = f"the Wikipedia summaries of this recipe are not in {str(wikipedia)!r}"
                how = "fetch them by python scripts/fetch_assets.py, or use --texts austen, which is another data set"
                raise UserError(f"{found}: {how}")
            sources.append((str(wikipedia / "train.jsonl"), str(wikipedia / "heldout.jsonl")))
        return sources

    def identity(self) -> dict[str, Any]:
        # the texts, without where this machine keeps them
        return {"sources": ["/".join(Path(source).parts[-2:]) for source, _ in self._sources()]}

    def sequences(self, seed: int, count: int) -> Any:
        return self._rows[0].shuffle(seed=seed % 2**32)

    def eval_data(self, seeds: Sequence[int], tuning: bool = False) -> Any:
        rows = self._rows[1]  # every other one is for tuning
        return rows.select(range(int(tuning), min(2 * self.eval_samples, len(rows)), 2))

    def teacher_identity(self) -> dict[str, Any]:
        return {**super().teacher_identity(), "text": data_fingerprint(self._rows[0]), "length": self.max_length}

    def _shape(self, heads: int) -> dict[str, Any]:
        return {
            **{"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id},
            **{"hidden_size": heads * self.head_width, "max_position_embeddings": self.max_length},
            **{"num_hidden_layers": self.layers, "num_attention_heads": heads, "tie_word_embeddings": False},
        }


class MaskedText(TextRecipe):
    """ModernBERT shape: BERT's normalisation after each block, and its learnt positions, stay at unigrams for this budget."""

    name = "text-mlm"
    about = "real text, masked prediction, BERT shape"
    task = "masked_lm"

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = super().tokenizer
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
        return tokenizer

    def model_config(self, heads: int) -> Any:
        names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
        ends = dict.fromkeys(names, self.tokenizer.eos_token_id)
        layers = ["full_attention"] * self.layers
        width = 2 * heads * self.head_width
        return ModernBertConfig(**self._shape(heads), **ends, intermediate_size=width, layer_types=layers)


class CausalText(TextRecipe):
    """Llama shape."""

    name = "text-clm"
    about = "real text, causal, Llama shape"
    task = "causal_lm"

    def model_config(self, heads: int) -> Any:
        width = 4 * heads * self.head_width
        return LlamaConfig(**self._shape(heads), intermediate_size=width)
