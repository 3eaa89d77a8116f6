"""What commands share: help (one screen with what people use, then the rest in groups), parser, progress."""

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import TrainingArguments

from tutelage.core.errors import UserError, check_text

_WIDTH = 100
_TRANSFORMERS = {field.name for field in dataclasses.fields(TrainingArguments)}


@dataclass(frozen=True)
class CommandHelp:
    """A command, and what the first screen of its help shows."""

    run: Callable[..., None]  # takes the dataclasses of the options
    kinds: tuple[Any, ...]  # dataclasses of the options
    summary: str  # what the command does, in a sentence or two
    example: str  # options to start from
    main: str  # the options that people use
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of options whose dataclass has another one


def render_help(parser: argparse.ArgumentParser, summary: str, example: str, main: Sequence[str]) -> str:
    """The whole help text: the options people use, named by `main`, then the rest under groups."""
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # of --x and --no_x, the first
    rest = [action for dest, action in actions.items() if dest not in main and dest != "help"]
    own = [action for action in rest if action.dest not in _TRANSFORMERS]
    theirs = [action for action in rest if action.dest in _TRANSFORMERS]
    places = "".join(f" [{_flag(action)}]" for action in parser._actions if not action.option_strings)
    lines = [f"usage: {parser.prog}{places} [options]", "", *textwrap.wrap(summary, _WIDTH), "", f"  {example}", ""]
    lines += [line for dest in main for line in _describe(actions[dest])]
    if own:
        lines += ["", "More options:", *(line for action in own for line in _describe(action))]
    if theirs:
        names = ", ".join(_flag(action) for action in theirs)
        lines += ["", "Options of transformers.TrainingArguments, with the meaning that they have there:"]
        lines += textwrap.wrap(names, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _flag(action: argparse.Action) -> str:
    """The name by which an option is shown: its shortest one."""
    return min(action.option_strings, key=len) if action.option_strings else action.dest.upper()


def _describe(action: argparse.Action) -> list[str]:
    text = " ".join(str(action.help or "").split()).replace("%(default)s", str(action.default))
    return textwrap.wrap(f"{_flag(action):<24}{text}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 26)


class Parser(argparse.ArgumentParser):
    """`argparse` with the help of all commands, mistakes as one-line `UserError`s, and no abbreviations."""

    def __init__(self, prog: str, summary: str, example: str):
        super().__init__(prog, description=summary, epilog=f"{prog} {example}", allow_abbrev=False)

    def format_help(self) -> str:
        """Every option on the first screen."""
        main = [action.dest for action in self._actions if action.dest != "help"]
        return render_help(self, str(self.description), str(self.epilog), main)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(f"{message}: see {self.prog} --help")


def check_words(given: Mapping[str, Any]) -> None:
    """Raise UserError for an option of a parser that is empty text."""
    for name, value in given.items():
        check_text(name, value)


def progress(line: str) -> None:
    """Say what is being done, on stderr."""
    print(line, file=sys.stderr, flush=True)
