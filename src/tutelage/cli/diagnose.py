"""`tutelage diagnose`: parse, call, print.

Public names: `diagnose_command`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tutelage.cli.compare import progress, read_overrides
from tutelage.cli.parsing import Parser
from tutelage.core.errors import UserError
from tutelage.reproduction.diagnose import diagnose_language, diagnose_parity
from tutelage.reproduction.recipes import resolve
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_TEACHER, DEFAULT_TEXT


def diagnose_command(arguments: Sequence[str]) -> None:
    """Fourier weights of a parity recipe, or n-gram probes of a language model's layers."""
    parser = Parser(
        prog="tutelage diagnose",
        description="With parity-mlp[/SIZE]: Fourier weights; without: n-gram probes of a language model.",
    )
    parser.add_argument("recipe", nargs="?", help="parity-mlp or parity-mlp/SIZE; its fields are options too")
    parser.add_argument("--teacher", help="folder or Hub name; default: the embedded one")
    parser.add_argument("--dataset", help="text; default: the embedded one")
    parser.add_argument("--eval_dataset", help="held-out text; default: the end of the dataset")
    parser.add_argument("--length", type=int, default=3, help="longest context, in tokens")
    parser.add_argument("--max_samples", type=int, default=256, help="sequences on each side")
    parser.add_argument("--max_length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--blocks", help="dotted name of the list of blocks, where several are found")
    parser.add_argument("--output_dir", default="diagnosis")
    options, rest = parser.parse_known_args(arguments)
    folder = Path(options.output_dir)
    if options.recipe is not None:
        overrides = read_overrides(rest)
        if options.teacher is not None:
            overrides["teacher"] = options.teacher
        result = diagnose_parity(resolve(options.recipe, overrides), folder, progress)
        for name, weights in result["teacher"].items():
            print(f"{name}: " + ", ".join(f"degree {degree} {w:.3f}" for degree, w in weights["support"].items()))
        print(f"\ntable: {folder / 'fourier.md'}\nplot:  {folder / 'fourier.png'}")
        return
    if rest:
        raise UserError(f"unknown option {rest[0]!r}: see tutelage diagnose --help")
    teacher = options.teacher or DEFAULT_TEACHER
    dataset = options.dataset or (DEFAULT_TEXT if teacher == DEFAULT_TEACHER else None)
    if dataset is None:
        raise UserError("name a text, e.g. --dataset corpus.txt")
    held_out = options.eval_dataset or (DEFAULT_EVAL_TEXT if dataset == DEFAULT_TEXT else None)
    found = diagnose_language(
        teacher,
        dataset,
        folder,
        eval_dataset=held_out,
        length=options.length,
        max_samples=options.max_samples,
        max_length=options.max_length,
        text_column=options.text_column,
        blocks=options.blocks,
    )
    print("place  " + "  ".join(f"{n + 1}-gram" for n in range(options.length)))
    for name, scores in found["layers"].items():
        print(f"{name:>5}  " + "  ".join(f"{score:6.3f}" for score in scores))
    print(f"\nplot: {folder / 'ngrams.png'}")
