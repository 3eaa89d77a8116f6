"""`tutelage diagnose`: parse, call, print."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelage.cli.compare import read_overrides
from tutelage.cli.help import Parser, check_words, progress
from tutelage.core.errors import UserError
from tutelage.reproduction.diagnose_language import NgramProbe, diagnose_language
from tutelage.reproduction.diagnose_parity import diagnose_parity
from tutelage.reproduction.recipes import resolve
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_TEACHER, DEFAULT_TEXT


def diagnose_command(arguments: Sequence[str]) -> None:
    """Fourier weights of a parity recipe, or n-gram probes of a language model's layers."""
    parser = Parser(
        "tutelage diagnose",
        "With parity-mlp[/SIZE]: Fourier weights of teacher and student. Without a recipe: how much of each layer of a "
        "language model the last tokens explain.",
        "--teacher gpt2 --dataset corpus.txt --length 3",
    )
    parser.add_argument("recipe", nargs="?", help="parity-mlp or parity-mlp/SIZE; its fields are options too")
    parser.add_argument("--teacher", help="folder or Hub name; default: the embedded one")
    parser.add_argument("--output_dir", default="diagnosis", help="folder of the results; default: diagnosis")
    probe = parser.add_argument_group("language models", argument_default=argparse.SUPPRESS)
    probe.add_argument("--dataset", help="text; default: the embedded one")
    probe.add_argument("--eval_dataset", help="held-out text; default: the end of the dataset")
    probe.add_argument("--length", type=int, help="longest context, in tokens; default: 3")
    probe.add_argument("--max_samples", type=int, help="sequences to fit on, and to hold out; default: 256")
    probe.add_argument("--max_length", type=int, help="maximum tokens per sequence; default: 128")
    probe.add_argument("--text_column", help="column that contains the text; default: text")
    probe.add_argument("--blocks", help="dotted name of the list of blocks, where several are found")
    options, rest = parser.parse_known_args(arguments)
    given = vars(options)
    check_words(given)
    recipe, teacher, folder = (given.pop(name) for name in ("recipe", "teacher", "output_dir"))
    if recipe is None:
        if rest:
            raise UserError(f"unknown option {rest[0]!r}: see tutelage diagnose --help")
        _language(teacher or DEFAULT_TEACHER, given, Path(folder))
        return
    if given:
        raise UserError(f"--{next(iter(given))} is for language models: leave it out, or leave {recipe} out")
    overrides = read_overrides(rest) | ({} if teacher is None else {"teacher": teacher})
    found = diagnose_parity(resolve(recipe, overrides), Path(folder), progress)
    for part, weights in (("output", found.output), ("projected hidden layer", found.hidden)):
        print(f"{part}: " + ", ".join(f"degree {degree} {w:.3f}" for degree, w in weights.support.items()))
    print(f"\ntable: {Path(folder) / 'fourier.md'}\nplot:  {Path(folder) / 'fourier.png'}")


def _language(teacher: str, given: dict[str, Any], folder: Path) -> None:
    if teacher == DEFAULT_TEACHER:
        given.setdefault("dataset", DEFAULT_TEXT)
    if "dataset" not in given:
        raise UserError("there is no text to probe on: name a text, e.g. --dataset corpus.txt")
    if given["dataset"] == DEFAULT_TEXT:
        given.setdefault("eval_dataset", DEFAULT_EVAL_TEXT)
    probe = NgramProbe(teacher, **given)
    found = diagnose_language(probe, folder)
    print("place  " + "  ".join(f"{n + 1}-gram" for n in range(probe.length)))
    for place, scores in found.layers.items():
        print(f"{place:>5}  " + "  ".join(f"{score:6.3f}" for score in scores))
    print(f"\nplot: {folder / 'ngrams.png'}")
