"""Run a network only up to a place (`tutelage.core.blocks`)."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tutelage.core import views
from tutelage.core.blocks import FINAL, Blocks, Place, find_blocks, head_module
from tutelage.core.errors import UserError


def forward_to(
    model: nn.Module,
    place: Place,
    *args: Any,
    blocks: Blocks | None = None,
    head: nn.Module | None = None,
    **inputs: Any,
) -> torch.Tensor:
    """Run `model` up to `place` and return the hidden state there; nothing deeper is executed.

    The result is the *raw* output of block b, (B batch, T positions, D width) for a transformer. Some models (Llama, GPT-2)
    apply their final norm to the last entry of `hidden_states`; `FINAL` is the place after that norm, or the
    `last_hidden_state` of a model without an output head. Gradients flow as in a full forward.

    Args:
        place: 0 (embedding output) to the number of blocks, or `FINAL`; UserError if the model has no such place.
        args, inputs: the arguments of the model's own forward.
        blocks: `find_blocks(model)`, if the caller has it already.
        head: the output head, where it is not the one that `head_module` finds."""
    if place == FINAL and head is None:
        head = head_module(model)
    if (view := views.view_of(model, place, head)) is not None:
        return _first(view(*args, **inputs))
    if place == FINAL:
        return _first(model(*args, **inputs)) if head is None else _run_until(model, head, True, args, inputs)
    if not isinstance(place, int):
        raise UserError(f"no place {place!r} in {type(model).__name__}: use a block number or {FINAL!r}")
    module = (blocks or find_blocks(model)).module(model, place or 1)
    return _run_until(model, module, place == 0, args, inputs)


@contextmanager
def watched(
    model: nn.Module, places: Iterable[Place], blocks: Blocks | None = None, head: nn.Module | None = None
) -> Iterator[dict[Place, torch.Tensor]]:
    """Gives a mapping that a forward inside, of the whole `model` or of `forward_to(model, FINAL)`, fills with the states at
    `places`; arguments and states as in `forward_to`. Gradients flow through them."""
    points: list[tuple[Place, nn.Module, bool]] = []
    for place in places:
        if place != FINAL:
            module = (blocks or find_blocks(model)).module(model, int(place) or 1)
            points.append((place, module, place == 0))
            continue
        end = head_module(model) if head is None else head
        if (view := views.view_of(model, FINAL, end)) is not None:
            points.append((place, view, False))
        points.append((place, *((model, False) if end is None else (end, True))))
    with _keeping(points) as states:
        yield states


@contextmanager
def _keeping(points: Iterable[tuple[Place, nn.Module, bool]]) -> Iterator[dict[Place, torch.Tensor]]:
    """Gives a mapping that the forwards inside fill with the states at places: each before or after a module."""
    states: dict[Place, torch.Tensor] = {}
    undo: list[Callable[[], Any]] = []

    def keep(place: Place, state: torch.Tensor) -> None:
        if place not in states:  # of its first run, where `forward_to` stops
            states[place] = state.clone()  # what runs later may write into it

    try:
        for place, module, before in points:
            undo.append(_watch(module, before, functools.partial(keep, place)))
        yield states
    finally:
        for remove in reversed(undo):
            remove()


@dataclass(frozen=True)
class Observed:
    """What a forward of a whole model showed."""

    states: Mapping[Place, torch.Tensor]  # at the places asked for
    output: Any
    order: views.Order


@torch.no_grad()
def observe(
    model: nn.Module,
    places: Iterable[Place],
    inputs: Mapping[str, Any],
    blocks: Blocks | None = None,
    head: nn.Module | None = None,
) -> Observed:
    """Run a whole model and keep its states at `places`; arguments as in `forward_to`."""
    blocks = blocks or find_blocks(model)
    modules = {place: head if place == FINAL else blocks.module(model, int(place) or 1) for place in places}
    points = [(place, module, place in (0, FINAL)) for place, module in modules.items() if module is not None]
    with _keeping(points) as states, views.recorded(model, blocks.module(model, len(blocks))) as order:
        output = model(**inputs)
    if head is None and FINAL in places:
        states[FINAL] = _first(output)
    return Observed(states, output, order[0])


@torch.no_grad()
def make_view(
    model: nn.Module,
    place: Place,
    inputs: Mapping[str, Any],
    blocks: Blocks | None = None,
    head: nn.Module | None = None,
) -> bool:
    """Let `forward_to` run a view of `model` from now on, if one gives on `inputs` the state of the whole model, to the bit.

    Compared in the mode that the model is in; a view found right in training mode is right in evaluation mode. Costs two
    forwards. False where the model does not allow it: `forward_to` then stops a whole forward by a hook."""
    if place == FINAL and head is None:
        return False  # the whole forward
    blocks = blocks or find_blocks(model)
    with probing(model):
        torch.manual_seed(0)
        seen = observe(model, [place], inputs, blocks, head)
        for view in _candidates(model, place, blocks, head, seen.order):
            try:
                torch.manual_seed(0)
                state = _first(view.network(**inputs))
            except Exception:
                continue
            if _same(state, seen.states[place]):
                views.keep(model, place, head, view)
                return True
    return False


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Leaves random state, buffers (of batch norms) and gradient checkpointing as they were."""
    device = next(model.parameters()).device
    recomputing: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for module in recomputing:
        module.gradient_checkpointing = False
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module in recomputing:
            module.gradient_checkpointing = True
        for buffer, value in buffers:
            buffer.copy_(value)


def _candidates(
    model: Any, place: Place, blocks: Blocks, head: nn.Module | None, order: views.Order
) -> Iterator[views.View]:
    """Views that may end at a place: of the network below the head, and of the whole model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
    below = getattr(inner, "base_model", inner)
    listed = model.get_submodule(blocks.names[0].rpartition(".")[0])
    for root in dict.fromkeys([below, inner]):
        names = {module: tuple(name.split(".")) if name else () for name, module in root.named_modules()}
        if place != FINAL and listed in names:
            view = views.cut(root, names[listed], int(place), order)
            if view is not None:
                yield view
        elif place == FINAL and root is not inner:
            yield views.View(root, ())
        elif place == FINAL and names.get(head):
            yield views.without(root, names[head])


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


class _Reached(Exception):  # carries the hidden state out of a forward that is stopped on purpose
    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


def _run_until(model: nn.Module, module: nn.Module, before: bool, args: Any, inputs: Any) -> torch.Tensor:
    """Run `model` and stop before or after `module`; the input or output of the module there."""

    def stop(state: torch.Tensor) -> None:
        raise _Reached(state)

    undo = _watch(module, before, stop)
    try:
        model(*args, **inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        undo()
    raise UserError(f"the forward of {type(model).__name__} never reached {type(module).__name__} with these inputs")


def _watch(module: nn.Module, before: bool, give: Callable[[torch.Tensor], None]) -> Callable[[], Any]:
    """Have the next forwards give the state before or after `module`; returns what undoes it."""

    def enters(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        give(_first(args if args else tuple(kwargs.values())))

    def leaves(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        give(_first(output))

    layer: Any = module
    recomputable = "GradientCheckpointingLayer" in (cls.__name__ for cls in type(module).__mro__)
    if before:
        return module.register_forward_pre_hook(enters, with_kwargs=True).remove
    if recomputable and layer.gradient_checkpointing and layer.training:
        # Before transformers 5.23 a block's hooks run inside the recomputed function, where states may have no gradient.
        recompute = layer._gradient_checkpointing_func

        def recomputing(*args: Any) -> Any:
            output = recompute(*args)
            give(_first(output))
            return output

        layer._gradient_checkpointing_func = recomputing
        return functools.partial(setattr, layer, "_gradient_checkpointing_func", recompute)
    return module.register_forward_hook(leaves).remove


def _first(output: Any) -> torch.Tensor:
    """The hidden state in a module's output: a tensor, the first entry of a tuple, or `last_hidden_state`."""
    if isinstance(output, torch.Tensor):
        return output
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
