"""`tutelage compare` and `tutelage report`: parse, call, print.

Public names: `compare_command`, `report_command`, `read_overrides`, `teacher_override`, `progress`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.cli.parsing import Parser
from tutelage.core.errors import UserError
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipes import RECIPES, resolve
from tutelage.reproduction.recipes.user_run import user_recipe
from tutelage.reproduction.report import write_report
from tutelage.reproduction.runner import MATCHES
from tutelage.reproduction.scaling import SCALING_SIZES, run_scaling


def compare_command(arguments: Sequence[str]) -> None:
    """Methods x seeds on a recipe, or on the user's own teacher, student and data."""
    parser = Parser(
        prog="tutelage compare",
        description="Any field of the recipe is an option too, e.g. --d 64 --k 5 --seeds 0 1 2 --learning_rates 0.1 0.3",
    )
    parser.add_argument("recipe", nargs="?", help="RECIPE, RECIPE/SIZE, or a .yaml file with your own run")
    parser.add_argument("--list", action="store_true", help="list the recipes, their sizes and fields")
    parser.add_argument(
        "--methods", nargs="+", help="e.g. extraction one_shot extraction:projection=logits,warm_start=head"
    )
    parser.add_argument("--match", choices=MATCHES, help="what every method gets as much of; samples if left out")
    parser.add_argument("--jobs", type=int, default=1, help="runs made side by side, each on its share of the cores")
    parser.add_argument("--output_dir", help="default: comparisons/RECIPE-SIZE")
    parser.add_argument("--teacher", help="folder of a finished teacher; parity-mlp also takes trained or planted")
    options, rest = parser.parse_known_args(arguments)
    if options.list:
        print(_listing())
        return
    if options.recipe is None:
        raise UserError("name a recipe, e.g. tutelage compare parity-mlp/smoke; tutelage compare --list shows them")
    overrides = read_overrides(rest)
    name = options.recipe
    is_file = name.endswith((".yaml", ".yml"))
    scaling = not is_file and name.partition("/")[0] == "scaling"
    if scaling and (options.methods or options.match or options.teacher):
        raise UserError(
            "scaling takes no --methods, --match or --teacher: its methods are fixed, its field is --teachers"
        )
    if options.teacher is not None:
        overrides |= {"teacher": options.teacher} if is_file else teacher_override(options.teacher)
    command = shlex.join(["tutelage", "compare", *arguments])
    folder = Path(
        options.output_dir or Path("comparisons") / _slug(Path(name).stem if is_file else name, overrides, options)
    )
    if scaling:
        experiment = run_scaling(name, overrides, folder, jobs=options.jobs, command=command, log=progress)
        print(experiment.verdict)
        print(
            f"\nmetrics: {folder / 'scaling.json'}\nplot:    {folder / 'scaling.png'}\ntable:   {folder / 'report.md'}"
        )
        return
    system = user_recipe(Path(name), overrides) if is_file else resolve(name, overrides)
    match = options.match or "samples"
    result = compare(system, folder, options.methods, match=match, jobs=options.jobs, command=command, log=progress)
    page = write_report(folder)
    print(result["verdict"])
    print(f"\nmetrics: {folder / 'comparison.json'}\nreport:  {page}")


def report_command(arguments: Sequence[str]) -> None:
    """Redraw a comparison's report from what is on disk."""
    parser = Parser(prog="tutelage report")
    parser.add_argument("folder", help="output_dir of tutelage compare, finished or still going")
    folder = Path(parser.parse_args(arguments).folder)
    if (folder / "scaling.json").exists():
        raise UserError(
            f"{str(folder)!r} holds a scaling experiment: its report.md and scaling.png are drawn after every comparison; to "
            "draw them again give its command again"
        )
    print(write_report(folder))


def progress(line: str) -> None:
    """Say what is being done, on stderr."""
    print(line, file=sys.stderr, flush=True)


def _slug(name: str, overrides: Mapping[str, Any], options: Any) -> str:
    """Folder of a comparison: its name, and a mark of what was changed, so that two commands do not share one."""
    changed = {**overrides, **({"match": options.match} if options.match else {})}
    mark = hashlib.sha256(json.dumps(changed, sort_keys=True, default=str).encode()).hexdigest()[:6]
    base = name.replace("/", "-") if "/" in name or options.recipe.endswith((".yaml", ".yml")) else f"{name}-laptop"
    return f"{base}-{mark}" if changed else base


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


def teacher_override(value: str) -> dict[str, str]:
    """The recipe field that `--teacher` sets."""
    if value in ("trained", "planted"):
        return {"teacher": value}
    if not Path(value).is_dir():
        raise UserError(f"no teacher folder {value!r}: give a folder (or, for parity-mlp, trained or planted)")
    return {"teacher": value}


def _listing() -> str:
    lines = ["recipes (tutelage compare RECIPE/SIZE; the size is laptop if left out):", ""]
    for name, sizes in RECIPES.items():
        lines.append(f"  {name:<20} {sizes['laptop'].about}")
        lines.append(f"  {'':<20} sizes: {', '.join(sizes)}")
        lines.append(f"  {'':<20} fields: {', '.join(sizes['laptop'].settings())}")
        lines.append("")
    lines.append(f"  {'scaling':<20} samples to solve a parity against its dimension; exponents with intervals")
    lines.append(f"  {'':<20} sizes: {', '.join(SCALING_SIZES)}")
    lines.append(f"  {'':<20} fields: {', '.join(vars(SCALING_SIZES['laptop']))}")
    return "\n".join(lines)
