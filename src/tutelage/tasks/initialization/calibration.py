"""What a teacher does on the calibration text: its states, its busiest heads and neurons, and what its norms make of them.
Shapes: N positions, D teacher width, R student width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tutelage.core.blocks import Place
from tutelage.core.forward import observe
from tutelage.core.inputs import model_inputs, position_mask
from tutelage.core.linalg import whole_float32
from tutelage.core.moments import Moments, check_count
from tutelage.core.standardize import sink_threshold, state_norms
from tutelage.tasks.initialization.families import EXPERTS, NEURONS, POOLED, QUERIES, Linear, Norm, Tensor
from tutelage.tasks.initialization.layout import Batches, Layout, Part, bias_of, gain_of, normalized

Hook = Callable[[torch.Tensor, torch.Tensor], None]  # of a module's input and output, (N, ...)


class Sums:
    """Sums over positions, float64."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, count: int, **parts: torch.Tensor) -> None:
        self.count += count
        for name, part in parts.items():
            part = part.cpu().double()
            self.values[name] = part + self.values[name] if name in self.values else part

    def mean(self, name: str) -> torch.Tensor:
        """The mean of what was added under a name."""
        return self.values[name] / self.count


def state_moments(layout: Layout, batches: Batches, places: Sequence[Place]) -> list[torch.Tensor]:
    """The second moment of the teacher's states at each place, (D, D): each position scaled to a mean square of one, as the
    norm that reads it does; padding and attention sinks left out, which are found from this batch and those before it.

    Warns of too few positions."""
    moments = [Moments(full=True) for _ in places]
    norms_seen: dict[Place, torch.Tensor] = {place: torch.empty(0) for place in places}
    for batch in batches:
        inputs = model_inputs(layout.teacher, batch)
        states = observe(layout.teacher, places, inputs, layout.teacher_blocks).states
        for place, total in zip(places, moments, strict=True):
            hidden_ND = states[place][position_mask(batch, states[place])].float()
            norms = state_norms(hidden_ND)
            norms_seen[place] = torch.cat([norms_seen[place], norms.cpu()])
            keep = (norms <= sink_threshold(norms_seen[place])) & (norms > 0)
            total.add(hidden_ND[keep] * (hidden_ND.shape[-1] ** 0.5 / norms[keep, None]))
    count = sum(total.count for total in moments)  # one basis for all places
    check_count(count, len(moments[0].mean), "the residual basis (all places together)")
    return [total.about(torch.zeros_like(total.mean)) for total in moments]


def observe_modules(layout: Layout, batches: Batches, hooks: dict[nn.Module, list[Hook]]) -> None:
    """Run the teacher over all batches and show each module's input and output to its hooks, at non-padding positions.

    The hooks compute in whole float32, also where the teacher runs under autocast."""
    model = layout.teacher
    # below the output head of a language model: it is wide, and nothing here reads its logits
    pooled = any(isinstance(part.rule, Linear) and part.rule.reads == POOLED for part in layout.parts)
    network: Any = model if pooled else getattr(model, "base_model", model)
    mask: torch.Tensor | None = None

    def flat(values: torch.Tensor) -> torch.Tensor:
        if mask is not None and values.dim() > mask.dim() and values.shape[: mask.dim()] == mask.shape:
            return values[mask.to(values.device)]
        if mask is not None and len(values) == mask.numel():  # a router's, which sees positions one after the other
            return values[mask.flatten().to(values.device)]
        return values.flatten(0, -2)

    def show(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        made = output if isinstance(output, torch.Tensor) else output[0]
        with whole_float32(made.device):
            for hook in hooks[module]:
                hook(flat(given).to(made.device), flat(made))  # what is given may come from the device before

    with _hooked(list(hooks), show), torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            mask = None if mask is None else mask.bool()
            network(**model_inputs(network, batch))


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Uses:
    """How much the teacher uses each attention head, neuron and expert."""

    def __init__(self, layout: Layout, basis_DR: torch.Tensor):
        self.layout, self.basis_DR = layout, basis_DR.cpu().double()
        self.sums: dict[str, Sums] = {}
        self.watched = [part for part in layout.parts if isinstance(part.rule, Linear) and self._kind(part) is not None]

    @staticmethod
    def _kind(part: Part) -> str | None:
        assert isinstance(part.rule, Linear)
        if part.rule.reads in (QUERIES, NEURONS, POOLED):
            return part.rule.reads
        return EXPERTS if part.rule.writes == EXPERTS else None

    def hooks(self) -> dict[nn.Module, list[Hook]]:
        found: dict[nn.Module, list[Hook]] = {}
        for part in self.watched:
            self.sums[part.name] = sums = Sums()
            kind, size = self._kind(part), self.layout.teacher_heads.size

            def hook(
                given: torch.Tensor, made: torch.Tensor, sums: Sums = sums, kind: Any = kind, size: int = size
            ) -> None:
                if kind == EXPERTS:
                    chosen = made.topk(self.layout.teacher_config.num_experts_per_tok).indices
                    sums.add(len(made), load=chosen.flatten().bincount(minlength=made.shape[-1]))
                elif kind == QUERIES:
                    heads_NHS = given.float().unflatten(-1, (-1, size))
                    sums.add(len(given), gram=torch.einsum("nhs,nht->hst", heads_NHS, heads_NHS))
                else:
                    sums.add(len(given), squares=given.float().square().sum(0))

            found.setdefault(part.teacher, []).append(hook)
        return found

    def of(self, space: str, block: int | None) -> torch.Tensor | None:
        """The use of each entry of a space in a student's block (heads: one value each); None where nothing reads it."""
        parts = [part for part in self.watched if part.block == block and self._kind(part) == space]
        totals = [self._use(part) for part in parts if self.sums[part.name].count]
        if not parts:  # of experts: by the norm of the output columns alone
            tables = [part for part in self.layout.parts if part.block == block and isinstance(part.rule, Tensor)]
            totals = [size for part in tables if (size := _column_sizes(part, space)) is not None]
        return torch.stack(totals).sum(0) if totals else None

    def _use(self, part: Part) -> torch.Tensor:
        sums, kind = self.sums[part.name], self._kind(part)
        if kind == EXPERTS:
            return sums.mean("load")
        weight_OI = matrix_of(part.teacher)
        if kind != POOLED and len(weight_OI) == len(self.basis_DR):
            weight_OI = self.basis_DR.T @ weight_OI  # what arrives in the student's stream
        if kind == QUERIES:
            weight_OHS = weight_OI.unflatten(-1, (-1, self.layout.teacher_heads.size))
            return torch.einsum("ohs,hst,oht->h", weight_OHS, sums.mean("gram"), weight_OHS)
        return sums.mean("squares") * weight_OI.square().sum(0)


def _column_sizes(part: Part, space: str) -> torch.Tensor | None:
    """Sum of squares of a teacher's parameter for each entry of a space; None where no dimension is that space."""
    assert isinstance(part.rule, Tensor)
    for name, dimensions in part.rule.dimensions.items():
        if space in dimensions:
            weight = part.teacher.get_parameter(name).detach().cpu().double()
            return weight.square().movedim(dimensions.index(space), -1).flatten(0, -2).sum(0)
    return None


def matrix_of(module: nn.Module) -> torch.Tensor:
    """A linear map's weight as (out, in), float64 on the CPU, whichever way round it is stored."""
    weight: Any = module.weight
    weight = weight.detach().cpu().double()
    return weight.T if is_transposed(module) else weight


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear map, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


class NormFit:
    """What a norm of the student gets, and what its readers are multiplied by.

    With z = Q^T h the student's norm makes a = normalised z, which is to give b: Q^T of the teacher's normalised state (its
    gain is folded into the readers), or Q^T of the norm's output where it cannot be folded. Least squares over the calibration
    text: one gain for RMSNorm, gain and bias per dimension for LayerNorm."""

    def __init__(self, part: Part, layout: Layout, basis_DR: torch.Tensor, folded: bool):
        assert isinstance(part.rule, Norm)
        self.part, self.family, self.folded = part, layout.family, folded
        self.basis_DR, self.sums = basis_DR, Sums()
        self.absent = isinstance(part.student, nn.Identity)  # a norm that only the teacher has
        self.teacher_gain = gain_of(part.teacher, self.family)
        self.branch = part.rule.writer is not None

    def hook(self, given_ND: torch.Tensor, made_ND: torch.Tensor) -> None:
        """Count positions of the teacher's norm."""
        basis, gain = self.basis_DR.to(given_ND.device), self.teacher_gain.float().to(given_ND.device)
        given_ND = given_ND.float()
        unit_ND = normalized(given_ND, self.part.teacher, self.family)
        if self.branch:
            given_ND, unit_ND = given_ND * gain, unit_ND * gain
        mine, target = given_ND @ basis, (unit_ND if self.folded else made_ND.float()) @ basis
        if not self.absent:
            mine = normalized(mine, self.part.student, self.family)
        sums = {"a": mine, "b": target, "ab": mine * target, "aa": mine.square()}
        self.sums.add(len(mine), **{name: value.cpu().double().sum(0) for name, value in sums.items()})

    def scale(self) -> float:
        """The one number that carries the student's state to the target."""
        return float(self.sums.mean("ab").sum() / self.sums.mean("aa").sum())

    def fitted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gain and bias, (R,)."""
        a, b, ab, aa = (self.sums.mean(name) for name in ("a", "b", "ab", "aa"))
        if self.family.rms:
            gain = torch.full_like(a, self.scale()) if self.folded else ab / aa.clamp_min(1e-12)
            return gain, torch.zeros_like(a)
        if bias_of(self.part.student) is None:
            return ab / aa.clamp_min(1e-12), torch.zeros_like(a)
        variance = (aa - a * a).clamp_min(0)
        gain = torch.where(variance > 1e-8 * aa, (ab - a * b) / variance.clamp_min(1e-12), 1.0)
        return gain, b - gain * a
