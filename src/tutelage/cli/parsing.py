"""Parsers whose errors are one line.

Public names: `OneLineErrors`, `Parser`.
"""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineErrors:
    """Mistakes in flags are one line, without the usage of two hundred options above it."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ValueError(message)


class Parser(OneLineErrors, argparse.ArgumentParser):
    """`argparse` with one-line errors."""
