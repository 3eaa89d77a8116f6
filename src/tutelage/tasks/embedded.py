"""The teacher and the text that are part of the package, so that every command works offline."""

from pathlib import Path

_DATA = Path(__file__).resolve().parent.parent / "data"

DEFAULT_TEACHER = str(_DATA / "teacher")
DEFAULT_STUDENT = "layers=2,hidden_size=64"
DEFAULT_TEXT = str(_DATA / "austen" / "train.txt")
DEFAULT_EVAL_TEXT = str(_DATA / "austen" / "heldout.txt")
