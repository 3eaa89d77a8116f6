"""Names that a user chose, such as those of folders, in documents and plots: shown as they are."""

import re

_START = re.compile(r"^(#+(?= )|>|[+-](?= )|\d+(?=[.)] ))")  # of a heading, a quotation or a list


def as_markdown(text: str, line_break: str = " ") -> str:
    """Text that Markdown shows as it is, also at the start of a paragraph; its line breaks become `line_break`."""
    lines = (_START.sub(lambda found: "".join(f"&#{ord(sign)};" for sign in found[0]), line) for line in _lines(text))
    return line_break.join(lines)


def as_cell(text: str) -> str:
    """Text that a cell of a Markdown table shows as it is, with its line breaks."""
    return "<br>".join(_lines(text))


def _lines(text: str) -> list[str]:
    """Lines without what means something to Markdown within one; GitHub typesets what is between two dollar signs."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("$", "&#36;")
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)  # inside a word an underscore stands for itself
    return text.splitlines()


def as_code(text: str) -> str:
    """Text as code in Markdown, between more backticks than it has in a row."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{' '.join(text.splitlines())}{space}{fence}"


def as_label(text: str) -> str:
    """Text that matplotlib shows as it is: no formula between dollar signs, and no line break; a name that begins with an
    underscore would be left out of the legend."""
    shown = " ".join(text.splitlines()).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
