"""Names that a user chose, such as those of folders, in documents and plots: shown as they are."""

import re


def as_markdown(text: str, line_break: str = " ") -> str:
    """Text that Markdown shows as it is; its line breaks become `line_break`."""
    escaped = re.sub(r"([\\`*\[\]|$~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
    return line_break.join(escaped.replace("&", "&amp;").replace("<", "&lt;").splitlines())


def as_code(text: str) -> str:
    """Text as code in Markdown, also inside a table."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return fence + space + " ".join(text.splitlines()).replace("|", r"\|") + space + fence


def as_label(text: str) -> str:
    """Text that matplotlib draws as it is, not as a formula."""
    return " ".join(text.splitlines()).replace("$", r"\$")
