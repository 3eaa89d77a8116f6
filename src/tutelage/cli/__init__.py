"""The `tutelage` command: parse, call, print.

Everything that a command does is in `tutelage.runs` and `tutelage.reproduction`."""

import errno
import sys
import traceback
from collections.abc import Sequence

from tutelage.core.errors import UserError, is_text
from tutelage.core.interrupts import Interrupted, interrupts

_COMMANDS = ("plan", "distill", "extract", "inspect", "evaluate", "compare", "report", "diagnose")
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR)
# what to do after an interruption
_CONTINUED = {
    "distill": "; --resume auto continues the run",
    "extract": "; the same command continues",
    "compare": "; the same command continues",
}
_HELP = """usage: tutelage COMMAND ...

  tutelage plan --teacher T --student S       blocks, stage map and predicted cost; trains nothing
  tutelage distill [--config run.yaml] [...]  train a student
  tutelage extract [...]                      run the teacher once and store its targets on disk
  tutelage inspect C                          what an extracted curriculum contains, and whether it is whole
  tutelage evaluate --model M --dataset D     loss, perplexity, accuracy; with --teacher: KL and agreement
  tutelage compare RECIPE[/SIZE] [...]        methods x seeds on a recipe or on your own run.yaml; --list shows recipes
  tutelage report FOLDER                      redraw the report of a comparison
  tutelage diagnose [parity-mlp] [...]        what a teacher's layers contain: Fourier weights, n-gram probes

Without options a command works on the teacher and text that come with tutelage.
`tutelage COMMAND --help` lists the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 2 for a user's mistake, which is one line on stderr; 1 for a bug of tutelage, with its traceback;
        130 when interrupted (Ctrl-C), 143 when terminated (SIGTERM)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if (wrong := next((word for word in arguments if not is_text(word)), None)) is not None:
        print(f"tutelage: {wrong!r} is not text that UTF-8 and file names can hold: correct it", file=sys.stderr)
        return 2
    command = arguments[0]
    if command == "--version":
        from tutelage import __version__

        print(f"tutelage {__version__}")
        return 0
    if command not in _COMMANDS:
        print(f"tutelage: there is no command {command!r}: use one of {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    # argparse drops such a value
    if (wrong := next((word for word in arguments if word.endswith("=--")), None)) is not None:
        print(f"tutelage {command}: {wrong!r} has no value: give one, or leave the option out", file=sys.stderr)
        return 2
    with interrupts.handled(f"tutelage {command}"):
        return _run(command, arguments[1:])


def _run(command: str, arguments: Sequence[str]) -> int:
    """Run a command that there is, and return its exit code."""
    try:
        with interrupts.importing():
            from tutelage.cli.commands import run_command  # heavy imports only once the command is known

        run_command(command, arguments)
    except UserError as error:
        print(f"tutelage {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        line = f"tutelage {command}: interrupted {stop}".rstrip()
        print(f"{line}{_CONTINUED.get(command, '')}", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Interrupted) else 130
    except Exception as error:
        if (found := _of_the_machine(error)) is not None:
            print(f"tutelage {command}: {found}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(f"tutelage {command}: this is a bug of tutelage; please report it with the lines above", file=sys.stderr)
        return 1
    return 0


def _of_the_machine(error: BaseException | None) -> str | None:
    """What an error says where the disk or a path is behind it, not tutelage; None for any other."""
    from tutelage.io.files import NO_SPACE  # not before it is needed: it imports safetensors

    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            where = f"could not write {error.filename or 'a temporary file'!r}"
            return f"{where}: {error.strerror}; free space there, or use a different disk"
        if isinstance(error, OSError) and error.errno in _PATH_ERRORS and error.filename is not None:
            return f"could not open {error.filename!r}: {error.strerror}; give a different path"
        error = error.__cause__ or error.__context__
    return None
