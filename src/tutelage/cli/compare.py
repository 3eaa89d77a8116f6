"""`tutelage compare` and `tutelage report`: parse, call, print."""

import argparse
import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.cli.help import Parser, check_words, progress
from tutelage.core.errors import UserError
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.recipes import RECIPES, resolve
from tutelage.reproduction.recipes.user_run import user_recipe
from tutelage.reproduction.report import write_report
from tutelage.reproduction.results import COSTS
from tutelage.reproduction.scaling import SCALING_SIZES, run_scaling
from tutelage.reproduction.variants import Variant, parse_variant

_DATA_OPTIONS = {
    "teacher": "folder or Hub name; recipes also take `trained`, and parity-mlp `planted`",
    "student": "folder, config.json or preset over the teacher, e.g. layers=2,hidden_size=64",
    "dataset": "Hub name, `datasets` folder, or .txt/.jsonl/.parquet file",
    "eval_dataset": "held-out text; default: a part of the dataset",
    "max_length": "maximum tokens per sequence",
    "max_samples": "evaluate on the first N sequences; default of your own comparison: 256, or the recipe's",
    "mlm_probability": "fraction of tokens that are masked (masked language models)",
}


def compare_command(arguments: Sequence[str]) -> None:
    """Methods x seeds on a recipe, or on the user's own teacher, student and data."""
    parser = _parser()
    mine, fields = _split(parser, arguments)
    options, rest = parser.parse_known_args(mine)
    check_words(vars(options))
    if options.recipe and options.config:
        raise UserError(f"--config and {options.recipe} were given: give one of the two")
    options.recipe = options.recipe or options.config
    if options.list:
        print(_listing())
        return
    data = {name: value for name in _DATA_OPTIONS if (value := getattr(options, name)) is not None}
    overrides, name = {**read_overrides([*rest, *fields]), **data}, options.recipe
    command = shlex.join(["tutelage", "compare", *arguments])
    folder = Path(options.output_dir or Path("comparisons") / _slug(options, overrides))
    if name is not None and name.partition("/")[0] == "scaling" and not _is_file(name):
        _scaling(options, overrides, folder, command)
        return
    if name is None or _is_file(name):
        recipe: Recipe = user_recipe(None if name is None else Path(name), overrides)
    else:
        renamed = {"max_samples": "eval_samples"}
        recipe = resolve(name, {renamed.get(key, key): value for key, value in overrides.items()})
    methods = _methods(options, recipe)
    match = options.match or "samples"
    result = compare(recipe, folder, methods, match=match, jobs=options.jobs, command=command, log=progress)
    print(f"{result.verdict}\n\nmetrics: {folder / 'comparison.json'}\nreport:  {write_report(folder)}")


def _split(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of the parser's options, and those of other options, which are fields of the recipe."""
    mine: list[str] = []
    fields: list[str] = []
    current = mine
    for word in arguments:
        if word.startswith("-") and not _is_number(word):
            current = mine if word.partition("=")[0] in parser._option_string_actions else fields
        current.append(word)
    return mine, fields


def _parser() -> argparse.ArgumentParser:
    about = (
        "Compares methods on a recipe of the paper, or on your own teacher, student and text, and writes a report. Any "
    )
    about += "field of a recipe is an option: parity-mlp/smoke --d 12 --seeds 0 1 2."
    parser = Parser("tutelage compare", about, "--teacher T --student layers=3,hidden_size=192 --dataset corpus.txt")
    recipe = "RECIPE, RECIPE/SIZE, or a .yaml file; default: what the options describe"
    parser.add_argument("recipe", nargs="?", help=recipe)
    parser.add_argument("--config", help="the same as a .yaml file in place of a RECIPE")
    parser.add_argument("--list", action="store_true", help="list the recipes, their sizes and fields")
    parser.add_argument("--methods", nargs="+", help="names of methods or variants (see --list), or all")
    variant = (
        "a method with settings, in addition to the methods, e.g. mine:layer_map=final:final,warm_start=head; repeatable. "
        "Keys are method (default: extraction), budget (in units of the comparison's), match (a cost that is equal to "
        "one-shot's) and fields of CurriculumConfig; of values such as 0.3|1|3 the best is searched"
    )
    parser.add_argument("--variant", action="append", metavar="NAME:KEY=VALUE,...", help=variant)
    parser.add_argument("--match", choices=COSTS, help="the cost that is equal for all methods; default: samples")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at the same time; default: 1")
    parser.add_argument("--output_dir", help="default: comparisons/NAME")
    for name, text in _DATA_OPTIONS.items():
        parser.add_argument(f"--{name}", help=text)
    return parser


def _methods(options: argparse.Namespace, recipe: Recipe) -> list[Variant] | None:
    """The methods that were asked for, or those of the recipe and the variants; None where none were asked for."""
    variants = [parse_variant(text) for text in options.variant or []]
    if options.methods == ["all"]:
        options.methods = [variant.name for variant in (*recipe.default_methods, *recipe.further_methods)]
    if options.methods is not None:
        return [*map(recipe.named, options.methods), *variants]
    if not variants:
        return None
    names = {variant.name for variant in variants}
    return [*(method for method in recipe.default_methods if method.name not in names), *variants]


def _scaling(options: argparse.Namespace, overrides: Mapping[str, Any], folder: Path, command: str) -> None:
    if options.methods or options.variant or options.match or options.teacher:
        raise UserError(
            "scaling takes no --methods, --variant, --match or --teacher: its methods are fixed, and its teachers are given "
            "by --teachers"
        )
    result = run_scaling(options.recipe, overrides, folder, jobs=options.jobs, command=command, log=progress)
    files = f"metrics: {folder / 'scaling.json'}\nplot:    {folder / 'scaling.png'}\ntable:   {folder / 'report.md'}"
    print(f"{result.verdict}\n\n{files}")


def report_command(arguments: Sequence[str]) -> None:
    """Redraw a comparison's report from what is on disk."""
    parser = Parser("tutelage report", "Redraws the report of a comparison, finished or not.", "comparisons/own")
    text = "output_dir of tutelage compare; default: the newest one below comparisons"
    parser.add_argument("folder", nargs="?", help=text)
    given = parser.parse_args(arguments).folder
    check_words({"the folder": given})
    written = sorted(Path("comparisons").glob("*/comparison.json"), key=lambda file: file.stat().st_mtime)
    if given is None and not written:
        raise UserError("there is no comparison below ./comparisons: make one with tutelage compare, or give a folder")
    folder = written[-1].parent if given is None else Path(given)
    if (folder / "scaling.json").exists():
        raise UserError(
            f"{str(folder)!r} contains a scaling experiment, whose report.md and scaling.png are written after every "
            "comparison: to write them again, repeat its command"
        )
    print(write_report(folder))


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _slug(options: argparse.Namespace, overrides: Mapping[str, Any]) -> str:
    """Folder of a comparison: its name, and a mark of what was changed, so that two commands do not use the same one."""
    name = options.recipe or "own"
    if _is_file(name):
        name = Path(name).stem
    elif options.recipe is not None and "/" not in name:
        name += "-laptop"
    changed = {**overrides, **({"match": options.match} if options.match else {})}
    mark = hashlib.sha256(json.dumps(changed, sort_keys=True, default=str).encode()).hexdigest()[:6]
    return name.replace("/", "-") + (f"-{mark}" if changed else "")


def read_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`--field value value ...` as a mapping; one value stays text, several become a list."""
    found: dict[str, Any] = {}
    current: str | None = None
    for word in words:
        if word.startswith("--") and not _is_number(word):
            current, equals, value = word[2:].partition("=")
            found[current] = [value] if equals else []
        elif current is None:
            raise UserError(f"unexpected argument {word!r}: fields are given as --field value")
        else:
            found[current].append(word)
    for key, values in found.items():
        if not values:
            raise UserError(f"--{key} needs a value")
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _listing() -> str:
    lines = ["recipes (tutelage compare RECIPE/SIZE; the default size is laptop):", ""]
    for name, sizes in RECIPES.items():
        usual = sizes["laptop"]
        lines += _described(name, usual.about, sizes, usual.settings())
        for title, variants in (("methods", usual.default_methods), ("on request", usual.further_methods)):
            lines.append(f"  {'':<20} {title}: {', '.join(variant.name for variant in variants)}")
        lines.append("")
    about = "samples to solve a parity against its dimension; exponents with intervals"
    return "\n".join([*lines, *_described("scaling", about, SCALING_SIZES, vars(SCALING_SIZES["laptop"]))])


def _described(name: str, about: str, sizes: Iterable[str], fields: Iterable[str]) -> list[str]:
    rows = ((name, about), ("", f"sizes: {', '.join(sizes)}"), ("", f"fields: {', '.join(fields)}"))
    return [f"  {first:<20} {second}" for first, second in rows]
