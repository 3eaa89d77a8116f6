"""Which attention heads, neurons and experts of the teacher a narrower student keeps: those that the teacher uses most."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tutelage.core.errors import UserError
from tutelage.tasks.initialization.families import EXPERTS, HEADS, KEYS, NEURONS, POOLED, QUERIES
from tutelage.tasks.initialization.layout import HeadCounts


def kept_heads(use: Sequence[float], teacher: HeadCounts, student: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention heads that a student keeps, by the `use` of each, and the teacher's key-value group for each of its own.

    The heads of a student's group come from one group of the teacher, so that they find the keys that they know. The groups
    with the greatest use are kept, in the teacher's order. Raises UserError for groups that are larger than the teacher's."""
    size, theirs = student.heads // student.groups, teacher.heads // teacher.groups
    if size > theirs or student.heads > teacher.heads:
        raise UserError(
            f"student_init='teacher': the student has {student.heads} heads in {student.groups} key-value groups, the teacher "
            f"{teacher.heads} in {teacher.groups}: a group may have at most {theirs} heads; set num_attention_heads and "
            "num_key_value_heads"
        )
    parts: list[tuple[float, int, list[int]]] = []  # use, group, heads
    for group in range(teacher.groups):
        heads = list(range(group * theirs, (group + 1) * theirs))
        busiest = sorted(heads, key=lambda head: -use[head])
        pieces = [sorted(busiest[i : i + size]) for i in range(0, theirs - size + 1, size)]
        parts += [(sum(use[head] for head in piece), group, piece) for piece in pieces]
    if len(parts) < student.groups:
        raise UserError(
            f"student_init='teacher': groups of {size} heads can be taken {len(parts)} times from the teacher's "
            f"{teacher.groups} groups of {theirs}, but the student has {student.groups}: lower num_key_value_heads"
        )
    chosen = sorted(sorted(parts, key=lambda part: -part[0])[: student.groups], key=lambda part: (part[1], part[2]))
    heads = [head for _, _, piece in chosen for head in piece]
    return torch.tensor(heads), torch.tensor([group for _, group, _ in chosen])


def kept_entries(use: torch.Tensor | None, count: int, total: int, what: str) -> torch.Tensor:
    """The `count` entries of `total` with the greatest use, in order; the first ones where their use is unknown."""
    if count > total:
        raise UserError(f"student_init='teacher': the student has {count} {what}, the teacher only {total}: lower them")
    if use is None or count == total:
        return torch.arange(count)
    return use.topk(count).indices.sort().values


class Kept:
    """The entries of the teacher's spaces that one block of the student keeps."""

    def __init__(self, teacher: HeadCounts):
        self.teacher = teacher
        self.entries: dict[str, torch.Tensor] = {}

    def set_heads(self, heads: torch.Tensor, groups: torch.Tensor) -> None:
        size = torch.arange(self.teacher.size)
        self.entries[HEADS] = heads
        self.entries[QUERIES] = (heads[:, None] * len(size) + size).flatten()
        self.entries[KEYS] = (groups[:, None] * len(size) + size).flatten()

    def index(self, space: str, total: int) -> torch.Tensor:
        """Indices of the kept entries in a dimension of `total` entries, which may be several spaces."""
        if "|" in space:  # head by head
            parts = len(space.split("|"))
            heads, size = self.entries[HEADS], self.teacher.size * parts
            return (heads[:, None] * size + torch.arange(size)).flatten()
        found, start = [], 0
        names = space.split("+")
        widths = [self._width(name) for name in names]
        unknown = [index for index, width in enumerate(widths) if width is None]
        if unknown:  # neurons, as many each
            rest = total - sum(width or 0 for width in widths)
            widths = [rest // len(unknown) if width is None else width for width in widths]
        for name, width in zip(names, widths, strict=True):
            assert width is not None
            found.append(start + self.entries[name])
            start += width
        return torch.cat(found)

    def _width(self, name: str) -> int | None:
        if name in (QUERIES, HEADS):
            return self.teacher.heads * (self.teacher.size if name == QUERIES else 1)
        return self.teacher.groups * self.teacher.size if name == KEYS else None


WHAT = {NEURONS: "feed-forward neurons", POOLED: "neurons in its output head", EXPERTS: "experts"}
