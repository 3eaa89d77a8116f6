"""The check, before a run, that teacher and student compute what the stages take them to compute.

One forward of at most 16 tokens of each whole model is watched: what enters the output head must give the model's own logits,
the states at the places of the layer map must be those that the model calls its hidden states, and they must have one vector
of the expected width per position. Shapes: B batch, T positions, D width."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tutelage.core import heads
from tutelage.core.blocks import FINAL, Blocks, Place, find_blocks
from tutelage.core.errors import UserError, as_user_error
from tutelage.core.forward import observe
from tutelage.core.inputs import accepts, model_inputs
from tutelage.core.probe import evaluating, has_no_values, probe_ids
from tutelage.tasks.base import Task

_TRAINED = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Watched:
    """What one forward of a whole model showed."""

    name: str  # of the model, for messages
    task: Task
    model: nn.Module
    blocks: Blocks
    shape: tuple[int, ...]  # (B, T)
    states: Mapping[Place, torch.Tensor]
    hidden_states: tuple[torch.Tensor, ...] | None  # the model's own; entry b is after block b

    def check(self, places: Iterable[Place]) -> None:
        """Raise UserError where the state at one of these places is not what a hidden stage compares."""
        for place in places:
            where = f"{self.name}: the state at {place if place == FINAL else f'block {place}'}"
            how = "name other places with layer_map, or use method one_shot"
            if (state := self.states.get(place)) is None:
                raise UserError(f"{where} was never computed: {how}")
            width, pooled = self.task.width(self.model, place), place == FINAL and state.dim() == 2
            expected = (self.shape[0], width) if pooled else (*self.shape, width)
            if tuple(state.shape) != expected:
                raise UserError(f"{where} has the shape {tuple(state.shape)}, but {expected} was expected: {how}")
            if not isinstance(place, int) or place == len(self.blocks) or self.hidden_states is None:
                continue  # many models apply their final norm to the last entry
            own = self.hidden_states[place]
            if own.shape == state.shape and not _nearly_equal(state, own):
                raise UserError(f"{where} is not the model's own hidden_states[{place}]: {how}")


@torch.no_grad()
def run_probe(name: str, model: nn.Module, task: Task, container: str | None = None) -> Watched | None:
    """Run `model` (called `name` in messages) once and check its logits; None for one that reads no tokens or has no values.

    Raises UserError where the model cannot run 16 tokens, or where its logits are not those of its output head."""
    network = task.backbone(model)
    if not task.tokenized or has_no_values(model) or not accepts(network, "input_ids"):
        return None
    if task.splits_head and heads.is_language_model(model):
        heads.assume_settings(model)  # so that the head is not measured by a forward of its own
    name, blocks = f"the {name} {type(model).__name__}", find_blocks(network, container)
    head = task.output_head(model) if task.splits_head else None
    ids = probe_ids(network)
    inputs = model_inputs(network, {**task.example(ids.shape[1]), "input_ids": ids})
    if accepts(network, "output_hidden_states"):
        inputs["output_hidden_states"] = True
    seen: list[Any] = []

    def run() -> torch.Tensor | None:
        places: list[Place] = [*range(1, len(blocks) + 1), FINAL]
        seen.append(observe(network, places, inputs, blocks, None if head is None else head.linear))
        logits = getattr(seen[0].output, "logits", None)
        return logits if isinstance(logits, torch.Tensor) else None

    mixed = torch.autocast(ids.device.type, torch.bfloat16, enabled=_is_mixed(model))
    with as_user_error(f"{name} cannot run {ids.shape[1]} tokens"), evaluating(model), mixed:
        if head is None:
            run()
        else:
            heads.measure(name, model, head.linear, run)
    states, own = seen[0].states, getattr(seen[0].output, "hidden_states", None)
    if not isinstance(own, tuple) or len(own) != len(blocks) + 1:  # some models give more, or only some
        own = None
    elif 1 in states and torch.equal(states[1].to(own[0]), own[0]):  # Mamba and RWKV begin with the state after block 1
        own = (own[0], *own)
    return Watched(name, task, model, blocks, tuple(ids.shape), states, own)


def check_precision(student: nn.Module, stored: bool) -> None:
    """Refuse a student that would train in low precision without having been asked to (`stored`)."""
    dtypes = {parameter.dtype for parameter in student.parameters() if parameter.requires_grad}
    if not stored and (low := [dtype for dtype in dtypes if dtype not in _TRAINED]):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in low))
        raise UserError(
            f"the student has parameters that train in {names}: train in float32, or set student_dtype='stored'"
        )


def _is_mixed(model: nn.Module) -> bool:
    """Whether weights that train are in float32 beside frozen ones in half precision, which only runs under autocast."""
    halves = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())
    return halves and any(parameter.requires_grad and parameter.dtype in _TRAINED for parameter in model.parameters())


def _nearly_equal(state: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether two states of one forward differ by rounding only; in many models single entries are a thousand times as large
    as the others, so these must not set the tolerance of all."""
    tolerance = max(1e-5, 4 * torch.finfo(state.dtype).eps)
    usual = float(state.float().abs().nanmedian())
    return torch.allclose(state, own.to(state), rtol=tolerance, atol=tolerance * usual, equal_nan=True)
