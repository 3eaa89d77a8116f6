"""The paper's recipes at three sizes: `laptop` is the default, `smoke` runs in seconds, `paper` has the published numbers."""

from collections.abc import Mapping
from typing import Any

from tutelage.core.errors import UserError
from tutelage.reproduction.recipe import Recipe, change_fields
from tutelage.reproduction.recipes.language import CausalPcfg, CausalText, MaskedPcfg, MaskedText
from tutelage.reproduction.recipes.parity import ParityMLPRecipe, ParityTransformerRecipe

SIZES = ("smoke", "laptop", "paper")

# The fields in which a size differs from `laptop`, and `laptop` from the defaults of the recipe.
_PARITY_PAPER: dict[str, Any] = {"d": 100, "k": 6, "seeds": (0, 1, 2)}
_MLP: dict[str, dict[str, Any]] = {
    "smoke": {
        **{"d": 16, "k": 3, "teacher_width": 500, "student_width": 50, "seeds": (0, 1), "learning_rates": (0.1,)},
        **{"trials": 1, "fine_eval_every": None},
        **{"budget_samples": 96_000, "eval_every": 3_200, "eval_samples": 1024, "stage_samples": 6_400},
        **{"teacher_max_samples": 400_000, "teacher_checkpoint_every": 3_200},
    },
    "paper": {
        **_PARITY_PAPER,
        **{"teacher_width": 50_000, "student_width": 1000, "budget_samples": 20_000_000, "eval_every": 64_000},
        **{"teacher_max_samples": 100_000_000, "teacher_checkpoint_every": 1_000_000},
    },
}
_TRANSFORMER: dict[str, dict[str, Any]] = {
    "laptop": {
        **{"d": 20, "k": 4, "learning_rates": (3e-4, 1e-3, 3e-3), "budget_samples": 128_000},
        **{"eval_every": 3_200, "eval_samples": 2048, "stage_samples": 3_200, "stage_learning_rate": 3e-3},
        **{"teacher_learning_rate": 3e-4, "teacher_batch_size": 64, "teacher_max_samples": 1_000_000},
        **{"teacher_checkpoint_every": 3_200},
    },
    "smoke": {
        **{"d": 8, "k": 2, "teacher_heads": 4, "student_heads": 2, "seeds": (0,)},
        **{"learning_rates": (1e-3,), "stage_learning_rate": 1e-3, "teacher_learning_rate": 1e-3},
        **{"trials": 1, "fine_eval_every": None},
        **{"budget_samples": 12_800, "eval_every": 1_280, "eval_samples": 512, "stage_samples": 2_560},
        **{"teacher_max_samples": 100_000, "teacher_checkpoint_every": 1_280},
    },
    "paper": {
        **_PARITY_PAPER,
        **{"teacher_heads": 32, "batch_size": 32, "teacher_batch_size": 32},
        **{"budget_samples": 8_000_000, "eval_every": 32_000, "eval_samples": 4096, "stage_samples": 320_000},
        **{"stage_learning_rate": 1e-3, "teacher_max_samples": 32_000_000, "teacher_checkpoint_every": 320_000},
    },
}
# A few steps of tiny models; and arXiv:2410.05464: teacher 32 heads x 8, student 8 heads x 8, batch 512.
_LANGUAGE: dict[str, dict[str, Any]] = {
    "smoke": {
        **{"seeds": (0,), "learning_rates": (3e-3,), "trials": 1},
        **{"budget_samples": 320, "eval_every": 160, "eval_samples": 32},
        **{"batch_size": 16, "layers": 2, "teacher_heads": 4, "student_heads": 2, "num_stages": 2},
        **{"stage_fraction": 0.4, "teacher_samples": 640, "teacher_checkpoints": 5},
        **{"teacher_plateau": 1e9},
    },
    "paper": {
        **{"teacher_heads": 32, "student_heads": 8, "batch_size": 512, "budget_samples": 512 * 8_000},
        **{"eval_every": 512 * 200, "eval_samples": 4096, "teacher_samples": 512 * 16_000},
        **{"teacher_checkpoints": 30, "num_stages": None},
    },
}
_PCFG = {"smoke": {**_LANGUAGE["smoke"], "levels": 4}, "paper": {**_LANGUAGE["paper"], "levels": 7}}
_TEXT = {
    "smoke": {**_LANGUAGE["smoke"], "max_length": 32, "texts": "austen"},
    "paper": {**_LANGUAGE["paper"], "head_width": 8, "max_length": 512},
}


_KINDS: dict[Any, dict[str, dict[str, Any]]] = {
    **{ParityMLPRecipe: _MLP, ParityTransformerRecipe: _TRANSFORMER},
    **{MaskedPcfg: _PCFG, CausalPcfg: _PCFG, MaskedText: _TEXT, CausalText: _TEXT},
}
RECIPES: dict[str, dict[str, Recipe]] = {
    kind.name: {size: kind(size=size, **{**changes.get("laptop", {}), **changes.get(size, {})}) for size in SIZES}
    for kind, changes in _KINDS.items()
}


def resolve(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of `RECIPE` or `RECIPE/SIZE` (default: laptop), with some of its fields changed.

    Text values of `overrides` are read as the field's type.

    Raises UserError: unknown recipe, size or field, a value that cannot be read, or data that cannot be used."""
    recipe_name, _, size = name.partition("/")
    if recipe_name not in RECIPES:
        raise UserError(
            f"unknown recipe {recipe_name!r}: there are {', '.join(RECIPES)} and scaling (see tutelage compare --list)"
        )
    sizes, size = RECIPES[recipe_name], size or "laptop"
    if size not in sizes:
        raise UserError(f"unknown size {size!r} of {recipe_name}: there are {', '.join(sizes)}")
    recipe = change_fields(sizes[size], overrides or {}, recipe_name)
    recipe.check()
    return recipe
