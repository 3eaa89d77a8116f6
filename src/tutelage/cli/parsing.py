"""A parser whose errors are one line.

Public names: `Parser`.
"""

from __future__ import annotations

import argparse

from tutelage.runs.options import OneLineErrors


class Parser(OneLineErrors, argparse.ArgumentParser):
    """`argparse` with one-line errors."""
