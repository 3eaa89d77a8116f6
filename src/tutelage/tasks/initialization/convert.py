"""The weights of a student from those of its teacher, through one residual basis.
Shapes: N positions, D teacher width, R student width."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tutelage.core.blocks import FINAL, Place, head_module
from tutelage.core.errors import UserError
from tutelage.core.probe import evaluating
from tutelage.core.residual import check_basis, kept_variance, residual_basis
from tutelage.tasks.initialization.calibration import (
    NormFit,
    Uses,
    is_transposed,
    matrix_of,
    observe_modules,
    state_moments,
)
from tutelage.tasks.initialization.families import (
    EXPERTS,
    HEADS,
    NEURONS,
    POOLED,
    POSITIONS,
    QUERIES,
    SAME,
    STREAM,
    Linear,
    Norm,
    Tensor,
)
from tutelage.tasks.initialization.layout import Batches, Layout, Part, bias_of, shared_parameters
from tutelage.tasks.initialization.selection import WHAT, Kept, kept_entries, kept_heads

_IN_COMMON = (SAME, POSITIONS)  # spaces that are not converted
SMALL = 1e-2  # of the median gain of a norm: smaller ones are not divided by


@dataclass(frozen=True)
class BasisChoice:
    """How the residual basis is made."""

    kind: str  # one of `tutelage.core.residual.BASES`
    seed: int = 0
    gram_DD: torch.Tensor | None = None  # of the output head, for `logits`


@dataclass
class Initialized:
    """What a student was started with."""

    basis_DR: torch.Tensor  # Q
    final_DR: torch.Tensor  # the same for the state that enters the output head
    blocks: list[int]  # the teacher's block of each of the student's
    variance: float | None  # fraction of the states' mean square that Q keeps; None where it was not measured
    passes: tuple[int, ...] = ()  # the teacher's blocks that each pass over the calibration text ran
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)  # heads, groups, neurons: student's and teacher's

    def matrix(self, place: Place) -> torch.Tensor:
        """What maps the teacher's state at a place to the student's, (D, R)."""
        return self.final_DR if place == FINAL else self.basis_DR


def check_sizes(layout: Layout, basis: str) -> None:
    """UserError for a student that cannot be written from its teacher through a basis of this kind."""
    _Conversion(layout, BasisChoice(basis))


@torch.no_grad()
def initialize(layout: Layout, batches: Batches, choice: BasisChoice) -> Initialized:
    """Write the student's weights from the teacher's, which runs over calibration batches (model inputs) twice."""
    with evaluating(layout.teacher):
        return _Conversion(layout, choice).run(batches)


class _Conversion:
    basis: torch.Tensor  # Q, (D, R)

    def __init__(self, layout: Layout, choice: BasisChoice):
        self.layout, self.choice = layout, choice
        self.same = choice.kind == "identity"
        self.widths = int(layout.teacher_config.hidden_size), int(layout.student_config.hidden_size)
        self.kept: dict[int | None, Kept] = {}
        self.written: set[int] = set()  # of the student's parameters, by id
        # what readers are multiplied by before they are rotated, and the bias that they take over, by name
        self.gains: dict[str, torch.Tensor] = {}
        self.shifts: dict[str, torch.Tensor] = {}
        self.writer_gains: dict[str, torch.Tensor] = {}
        # the output head reads the teacher's state after Q, divided by this
        self.head_gain = torch.ones(self.widths[0], dtype=torch.float64)
        check_basis(choice.kind, *self.widths)
        self._check_tied()
        self._choose(None)  # of any use: whether there are as many as the student has
        for part in layout.parts:
            self._check_norm(part) if isinstance(part.rule, Norm) else self._check_shapes(part)

    def run(self, batches: Batches) -> Initialized:
        layout, choice = self.layout, self.choice
        moment = None
        if choice.kind in ("pca", "logits"):
            moments = state_moments(layout, batches, [0, *layout.pairs])
            if choice.gram_DD is not None:
                moments[-1] = _weighed(moments[-1], choice.gram_DD)
            moment = torch.stack(moments).sum(0)
        keeps_mean = not layout.family.rms
        self.basis = residual_basis(choice.kind, *self.widths, moment, keeps_mean=keeps_mean, seed=choice.seed)
        uses, fits = Uses(layout, self.basis), self._norm_fits()
        hooks = uses.hooks()
        for fit in fits.values():
            hooks.setdefault(fit.part.teacher, []).append(fit.hook)
        observe_modules(layout, batches, hooks)
        self._choose(uses)
        for part in layout.parts:
            if isinstance(part.rule, Norm):
                self._write_norm(part, fits.get(part.name))
        for part in layout.parts:
            if not isinstance(part.rule, Norm):
                self._write(part)
        left = [name for name, p in layout.student.named_parameters() if id(p) not in self.written]
        assert not left, f"{left[0]} was not written"
        variance = None if moment is None else kept_variance(moment, self.basis)
        whole = len(layout.teacher_blocks)
        passes = (whole,) if moment is None else (max(layout.pairs), whole)
        return Initialized(self.basis, self._final(), layout.pairs, variance, passes, self._counts())

    def _final(self) -> torch.Tensor:
        """What maps the state that enters the teacher's output head to the student's, (width, width)."""
        head = head_module(self.layout.student)
        maps = [part for part in self.layout.parts if part.student is head and isinstance(part.rule, Linear)]
        for part, reads in ((part, part.rule.reads) for part in maps if isinstance(part.rule, Linear)):
            if reads != STREAM:  # a hidden layer of the head's own
                identity = torch.eye(matrix_of(part.teacher).shape[1])
                return identity if reads == SAME else identity[:, self.kept[None].entries[reads]]
        return (self.basis.cpu().double() / self.head_gain[:, None]).float()

    # ---- Norms ----

    def _norm_fits(self) -> dict[str, NormFit]:
        """Of the norms that must be fitted, by their name in the student."""
        found = {}
        for part in self.layout.parts:
            if not isinstance(part.rule, Norm) or isinstance(part.teacher, nn.Identity):
                continue
            if not self.same or isinstance(part.student, nn.Identity):
                folded = part.rule.writer is not None or bool(self.layout.readers(part))
                found[part.name] = NormFit(part, self.layout, self.basis, folded)
        return found

    def _write_norm(self, part: Part, fit: NormFit | None) -> None:
        assert isinstance(part.rule, Norm)
        absent = isinstance(part.student, nn.Identity)
        if isinstance(part.teacher, nn.Identity):
            return
        if fit is None:  # equal widths: the teacher's own
            for name, parameter in part.student.named_parameters():
                self._set(parameter, self._theirs(part, name))
            return
        extra_R = None
        if fit.branch:
            self.writer_gains[self._beside(part, str(part.rule.writer))] = fit.teacher_gain
        elif fit.folded:
            extra_R = self._fold(part, fit, fit.scale() if absent else 1.0)
        if absent:
            return
        gain_R, bias_R = fit.fitted()
        if self.layout.feeds_tied(part):  # the head has the embeddings' factor
            gain_R, bias_R = gain_R / self._embedding_scale(), bias_R / self._embedding_scale()
            self.head_gain *= self._embedding_scale()
        self._set(part.student.weight, gain_R - self.layout.family.gain_offset)
        if bias_of(part.student) is not None:
            self._set(part.student.bias, bias_R if extra_R is None else bias_R + extra_R)

    def _fold(self, part: Part, fit: NormFit, scale: float) -> torch.Tensor | None:
        """Leave a norm's gain and bias to its readers; what its bias gets where one of them has none, (R,)."""
        readers, gain_D = self.layout.readers(part), fit.teacher_gain
        self.gains |= dict.fromkeys(readers, gain_D * scale)
        small_D = gain_D.abs() < SMALL * gain_D.abs().median()
        if part.block is None:
            self.head_gain = torch.where(small_D, torch.inf, gain_D)
        if (bias_D := bias_of(part.teacher)) is None:
            return None
        if part.block is not None and all(bias_of(self._module(name)) is not None for name in readers):
            self.shifts |= dict.fromkeys(readers, bias_D)
            return None
        mapped_R = self._encoded(torch.where(small_D, 0.0, bias_D / gain_D))
        return mapped_R + self._read_bias(part, gain_D, bias_D * small_D) if small_D.any() else mapped_R

    def _read_bias(self, part: Part, gain_D: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor:
        """The bias of the student's norm, (R,), from which its readers make what the teacher's make of `bias_D`: by least
        squares, since a division by a small gain would put large values into all of the student's dimensions."""
        names = self.layout.readers(part)
        weights = [matrix_of(each.teacher) for each in self.layout.parts if each.name in names]
        gram_DD = torch.stack([weight_OD.T @ weight_OD for weight_OD in weights]).sum(0)
        read_DR = gain_D[:, None] * self.basis.cpu().double()
        inverse_RR = torch.linalg.pinv(read_DR.T @ gram_DD @ read_DR, rtol=1e-10, hermitian=True)
        return inverse_RR @ read_DR.T @ gram_DD @ bias_D

    def _beside(self, part: Part, name: str) -> str:
        assert part.block is not None
        return f"{self.layout.student_blocks.names[part.block - 1]}.{name}"

    def _module(self, name: str) -> nn.Module:
        try:
            return self.layout.student.get_submodule(name)
        except AttributeError:  # a parameter of its own
            return nn.Identity()

    # ---- Choice of heads, neurons, experts ----

    def _choose(self, uses: Uses | None) -> None:
        layout = self.layout
        sizes = layout.teacher_heads, layout.student_heads
        numbers = range(1, len(layout.student_blocks) + 1)
        heads = {block: [1.0] * sizes[0].heads for block in numbers}  # lists: a plan's tensors have no values
        if uses is not None:
            heads |= {block: use.tolist() for block in numbers if (use := uses.of(QUERIES, block)) is not None}
        if layout.family.same_heads:
            total = [sum(use) for use in zip(*heads.values(), strict=True)]
            heads = dict.fromkeys(numbers, total)
        for block in numbers:
            kept = self.kept[block] = Kept(sizes[0])
            kept.set_heads(*kept_heads(heads[block], *sizes))
            for space in (NEURONS, EXPERTS):
                self._choose_entries(kept, space, block, uses)
        outside = self.kept[None] = Kept(sizes[0])
        if layout.family.same_heads:
            outside.entries[HEADS] = self.kept[1].entries[HEADS]
        self._choose_entries(outside, POOLED, None, uses)

    def _choose_entries(self, kept: Kept, space: str, block: int | None, uses: Uses | None) -> None:
        sizes = self._sizes(space, block)
        if sizes is not None:
            use = None if uses is None else uses.of(space, block)
            kept.entries[space] = kept_entries(use, *sizes, WHAT[space])

    def _sizes(self, space: str, block: int | None) -> tuple[int, int] | None:
        """Entries of a space in the student and in the teacher, from the shapes of the weights that have it."""
        for part in self.layout.parts:
            if part.block != block or isinstance(part.rule, Norm):
                continue
            for name, dimensions in self._dimensions(part).items():
                for dimension, spaces in enumerate(dimensions):
                    if space in (names := spaces.split("+")):
                        shapes = [getattr(module, name).shape[dimension] for module in (part.student, part.teacher)]
                        return shapes[0] // len(names), shapes[1] // len(names)
        return None

    def _counts(self) -> dict[str, tuple[int, int]]:
        mine, theirs = self.layout.student_heads, self.layout.teacher_heads
        found = {"heads": (mine.heads, theirs.heads), "key-value heads": (mine.groups, theirs.groups)}
        for space, name in ((NEURONS, "neurons"), (EXPERTS, "experts")):
            if (sizes := self._sizes(space, 1)) is not None:
                found[name] = sizes
        return found

    # ---- Weights ----

    @staticmethod
    def _dimensions(part: Part) -> dict[str, tuple[str, ...]]:
        """The spaces of the dimensions of a part's parameters."""
        rule = part.rule
        if isinstance(rule, Linear):
            spaces = (rule.reads, rule.writes) if is_transposed(part.student) else (rule.writes, rule.reads)
            rest = part.student.weight.dim() - 2  # type: ignore[operator]
            return {"weight": (*spaces, *[SAME] * rest), "bias": (rule.writes,)}
        assert isinstance(rule, Tensor)
        names = [name for name, _ in part.student.named_parameters(recurse=False)]
        return {name: rule.dimensions.get(name, rule.dimensions.get("", ())) for name in names}

    def _check_norm(self, part: Part) -> None:
        if isinstance(part.student, nn.Identity):
            return
        if isinstance(part.teacher, nn.Identity):
            found = f"the student has a norm {part.name}, the teacher none"
            raise UserError(f"student_init='teacher': {found}: change the layer map")
        if self.same:
            for name, _ in part.student.named_parameters():
                self._counterpart(part, name)

    def _check_shapes(self, part: Part) -> None:
        for name, dimensions in self._dimensions(part).items():
            if (mine := getattr(part.student, name, None)) is None:
                continue
            shape, kept = list(self._counterpart(part, name).shape), self.kept[part.block]
            for dimension, space in enumerate(dimensions):
                if space == STREAM:
                    shape[dimension] = self.widths[1]
                elif space not in _IN_COMMON:
                    shape[dimension] = len(kept.index(space, shape[dimension]))
            differ = [number for number, (a, b) in enumerate(zip(mine.shape, shape, strict=True)) if a != b]
            rows = differ == [0] and part.block is None and dimensions[0] in _IN_COMMON
            if differ and not (rows and (mine.dim() > 1 or name == "bias")):
                whole = part.name if isinstance(part.rule, Linear) else f"{part.name}.{name}"
                found = f"{whole} is {tuple(mine.shape)} in the student, but would be {tuple(shape)} from the teacher"
                raise UserError(f"student_init='teacher': {found}: change the student's sizes")

    def _write(self, part: Part) -> None:
        for name, dimensions in self._dimensions(part).items():
            mine = getattr(part.student, name, None)
            if mine is None or id(mine) in self.written:  # tied
                continue
            whole = part.name if isinstance(part.rule, Linear) else f"{part.name}.{name}"
            value = self._theirs(part, name)
            if name == "bias" and part.name in self.shifts:
                value = value + matrix_of(part.teacher) @ self.shifts[part.name]
            value = self._converted(part, whole, value, dimensions)
            if tuple(value.shape) != tuple(mine.shape):
                if dimensions[0] == POSITIONS and (theirs := len(value)) < len(mine):
                    found = f"the student has {len(mine)} positions, the teacher {theirs}: the rest stay random"
                    how = f"set max_position_embeddings={theirs}, or train on texts of more than {theirs} tokens"
                    warnings.warn(f"{found}; {how}", UserWarning, stacklevel=2)
                value = self._fitting(value, mine)
            embeds = part.block is None and isinstance(part.student, nn.Embedding)
            self._set(mine, value * self._embedding_scale() if embeds else value)

    @staticmethod
    def _counterpart(part: Part, name: str) -> torch.Tensor:
        """A parameter of the teacher."""
        value: torch.Tensor | None = getattr(part.teacher, name, None)
        if value is None:
            found = f"the student has a {name} in {part.name}, the teacher none"
            raise UserError(f"student_init='teacher': {found}: use a student with the configuration of its teacher")
        return value

    def _theirs(self, part: Part, name: str) -> torch.Tensor:
        """The same, float64 on the CPU."""
        return self._counterpart(part, name).detach().cpu().double()

    def _converted(self, part: Part, name: str, value: torch.Tensor, dimensions: Sequence[str]) -> torch.Tensor:
        """A parameter of the teacher in the student's coordinates."""
        for dimension, space in enumerate(dimensions):
            if space == STREAM:
                reading = not isinstance(part.rule, Linear) or part.rule.reads == STREAM
                gain = self.gains.get(name) if reading else self.writer_gains.get(name)
                if gain is not None:
                    shape = [1] * value.dim()
                    shape[dimension] = -1
                    value = value * gain.view(shape)
                value = self._encoded(value.movedim(dimension, -1)).movedim(-1, dimension)
            elif space not in _IN_COMMON:
                value = value.index_select(dimension, self.kept[part.block].index(space, value.shape[dimension]))
        return value

    def _encoded(self, values: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., R)."""
        return values if self.same else values @ self.basis.cpu().double()

    @staticmethod
    def _fitting(value: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        """The first rows of a table that is longer in one of the models (positions, a padded vocabulary)."""
        result = mine.detach().cpu().double().clone()
        rows = tuple(slice(0, min(a, b)) for a, b in zip(mine.shape, value.shape, strict=True))
        result[rows] = value[rows]
        return result

    def _embedding_scale(self) -> float:
        """What undoes the difference of the factors by which both models multiply their embeddings."""
        theirs, mine = self.widths
        return (theirs / mine) ** 0.5 if self.layout.family.scaled_embeddings else 1.0

    def _check_tied(self) -> None:
        """UserError where one parameter of the student would have to stand for two of the teacher's, or in two spaces."""
        spaces: dict[int, tuple[str, ...]] = {}
        shared = [shared_parameters(model) for model in (self.layout.student, self.layout.teacher)]
        for part in self.layout.parts:
            if isinstance(part.rule, Norm):
                continue
            for name, dimensions in self._dimensions(part).items():
                mine, theirs = id(getattr(part.student, name, None)), id(getattr(part.teacher, name, None))
                if mine not in shared[0]:
                    continue
                whole = f"student_init='teacher': {part.name}.{name} of the student is tied to another module"
                how = "set tie_word_embeddings=false for the student"
                if theirs not in shared[1]:
                    raise UserError(f"{whole}, the teacher's is not: {how}")
                if not self.same and spaces.setdefault(mine, dimensions) != dimensions:
                    found = (
                        "the embeddings are in the coordinates of the residual basis, what the output head reads is not"
                    )
                    raise UserError(f"{whole}, but {found}: {how}")

    def _set(self, parameter: Any, value: torch.Tensor) -> None:
        parameter.copy_(value.to(parameter))
        self.written.add(id(parameter))


def _weighed(moment_DD: torch.Tensor, gram_DD: torch.Tensor) -> torch.Tensor:
    """M^{1/2} C M^{1/2} for the second moment C and the Gram matrix M of what reads the state, with the trace of C."""
    values, vectors = torch.linalg.eigh(gram_DD.cpu().double())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    found = root @ moment_DD @ root
    return found * (moment_DD.trace() / found.trace())
