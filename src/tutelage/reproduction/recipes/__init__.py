"""Recipes: every system that the paper compares, each one function at three sizes.

Public names: `RECIPES`, `Recipe`, `resolve`, `SIZES`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.core.errors import UserError
from tutelage.reproduction.comparison_setting import RecipeFields, System
from tutelage.reproduction.recipes.fields import read_fields
from tutelage.reproduction.recipes.language import PcfgFields, TextFields, pcfg, sizes, text
from tutelage.reproduction.recipes.parity import (
    ParityMLPFields,
    ParityTransformerFields,
    parity_mlp,
    parity_transformer,
)

SIZES = ("smoke", "laptop", "paper")


@dataclass(frozen=True)
class Recipe:
    """A system at three sizes."""

    about: str
    """One line."""
    make: Callable[[Any, str], System]
    """From fields and the name of the size."""
    sizes: dict[str, RecipeFields]
    """The numbers."""


RECIPES: dict[str, Recipe] = {
    "parity-mlp": Recipe(
        "sparse parity, two-layer networks",
        parity_mlp,
        {
            "smoke": ParityMLPFields(
                d=16,
                k=3,
                teacher_width=500,
                student_width=50,
                seeds=(0, 1),
                learning_rates=(0.1,),
                budget_samples=96_000,
                eval_every=3_200,
                eval_samples=1024,
                stage_samples=6_400,
                teacher_max_samples=400_000,
                teacher_checkpoint_every=3_200,
            ),
            "laptop": ParityMLPFields(),
            "paper": ParityMLPFields(
                d=100,
                k=6,
                teacher_width=50_000,
                student_width=1000,
                seeds=(0, 1, 2),
                teacher_max_samples=100_000_000,
                teacher_checkpoint_every=1_000_000,
                budget_samples=20_000_000,
                eval_every=64_000,
            ),
        },
    ),
    "parity-transformer": Recipe(
        "sparse parity, GPT-2 shape",
        parity_transformer,
        {
            "smoke": ParityTransformerFields(
                d=8,
                k=2,
                teacher_heads=4,
                student_heads=2,
                seeds=(0,),
                learning_rates=(1e-3,),
                budget_samples=12_800,
                eval_every=1_280,
                eval_samples=512,
                stage_samples=2_560,
                stage_learning_rate=1e-3,
                teacher_learning_rate=1e-3,
                teacher_batch_size=64,
                teacher_max_samples=100_000,
                teacher_checkpoint_every=1_280,
            ),
            "laptop": ParityTransformerFields(
                d=20,
                k=4,
                learning_rates=(3e-4, 1e-3, 3e-3),
                budget_samples=128_000,
                eval_every=3_200,
                eval_samples=2048,
                stage_samples=3_200,
                stage_learning_rate=3e-3,
                teacher_learning_rate=3e-4,
                teacher_batch_size=64,
                teacher_max_samples=1_000_000,
                teacher_checkpoint_every=3_200,
                tuning_seeds=(1000,),
            ),
            "paper": ParityTransformerFields(
                d=100,
                k=6,
                teacher_heads=32,
                seeds=(0, 1, 2),
                learning_rates=(3e-4, 1e-3, 3e-3),
                batch_size=32,
                budget_samples=8_000_000,
                eval_every=32_000,
                stage_samples=320_000,
                stage_learning_rate=1e-3,
                teacher_learning_rate=3e-4,
                teacher_batch_size=32,
                teacher_max_samples=32_000_000,
                teacher_checkpoint_every=320_000,
            ),
        },
    ),
    "pcfg-mlm": Recipe(
        "a grammar's strings, masked prediction, BERT shape",
        functools.partial(pcfg, task="masked_lm"),
        sizes(PcfgFields),
    ),
    "pcfg-clm": Recipe(
        "a grammar's strings, causal, GPT-2 shape", functools.partial(pcfg, task="causal_lm"), sizes(PcfgFields)
    ),
    "text-mlm": Recipe(
        "real text, masked prediction, BERT shape",
        functools.partial(text, task="masked_lm"),
        sizes(TextFields, teacher_heads=8),
    ),
    "text-clm": Recipe(
        "real text, causal, Llama shape",
        functools.partial(text, task="causal_lm"),
        sizes(TextFields, teacher_heads=8),
    ),
}


def resolve(name: str, overrides: Mapping[str, Any] | None = None) -> System:
    """The system of `RECIPE` or `RECIPE/SIZE` (default: laptop), with some of its fields changed.

    Args:
        name: e.g. `parity-mlp/smoke`.
        overrides: fields of the recipe; text values are read as the field's type.

    Raises:
        UserError: unknown recipe, size or field, or a value that cannot be read.
    """
    recipe_name, _, size = name.partition("/")
    size = size or "laptop"
    if recipe_name not in RECIPES:
        raise UserError(
            f"unknown recipe {recipe_name!r}: there are {', '.join(RECIPES)} and scaling (see tutelage compare --list)"
        )
    recipe = RECIPES[recipe_name]
    if size not in recipe.sizes:
        raise UserError(f"unknown size {size!r} of {recipe_name}: there are {', '.join(recipe.sizes)}")
    made = recipe.make(read_fields(recipe.sizes[size], overrides or {}, recipe_name), size)
    return dataclasses.replace(made, again=functools.partial(resolve, name, dict(overrides or {})))
