"""The `tutelage` command.

Public names: `main`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_COMMANDS = ("plan", "distill", "extract", "inspect", "evaluate", "compare", "report", "diagnose")
_HELP = """usage: tutelage COMMAND ...

  tutelage plan --teacher T --student S       blocks, stage map and predicted cost; trains nothing
  tutelage distill [--config run.yaml] [...]  train a student; with no arguments, the embedded example
  tutelage extract --output_dir C [...]       run the teacher once: its curriculum, on disk
  tutelage inspect C                          what a curriculum on disk holds, and whether it is whole
  tutelage evaluate --model M --dataset D     loss, perplexity, accuracy; with --teacher: KL and agreement
  tutelage compare RECIPE[/SIZE] [...]        methods x seeds on a recipe or your own run.yaml; --list shows recipes
  tutelage report FOLDER                      redraw a comparison's report
  tutelage diagnose [parity-mlp] [...]        what is in a teacher's layers: Fourier weights, n-gram probes

`tutelage COMMAND --help` lists a command's options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if arguments[0] == "--version":
        from tutelage import __version__

        print(f"tutelage {__version__}")
        return 0
    if arguments[0] not in _COMMANDS:
        print(f"tutelage: no command {arguments[0]!r}: use one of {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    from tutelage.cli.commands import COMMANDS  # heavy imports only once the command is known
    from tutelage.training.trainer import TrainingDiverged

    try:
        COMMANDS[arguments[0]](arguments[1:])
    except (ValueError, OSError, ImportError, TrainingDiverged) as error:
        print(f"tutelage {arguments[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tutelage {arguments[0]}: interrupted", file=sys.stderr)
        return 130
    return 0
