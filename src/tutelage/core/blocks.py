"""Find the repeated blocks of a network, and run the network only up to one of them.

A *place* is an integer or `FINAL`. Place 0 is the input of the first block (the embedding output, `hidden_states[0]` in
transformers), place b is the output of block b, and `FINAL` is the input of the output head (after the final norm)."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tutelage.core.errors import UserError

FINAL = "final"
Place = int | str

# Usual names of a classifier's last linear map; models with output embeddings have a method that returns them.
_CLASSIFIER_NAMES = ("classifier.out_proj", "classifier", "score", "lm_head", "head")


@dataclass(frozen=True)
class Blocks:
    """The dotted names of a model's blocks, first to last; `names[b - 1]` is block b."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def module(self, model: nn.Module, block: int) -> nn.Module:
        """Block `block` (1-based) of `model`."""
        if not 1 <= block <= len(self):
            found = f"no block {block} in {type(model).__name__}: it has blocks 1 to {len(self)}"
            raise UserError(f"{found} ({self.names[0]} to {self.names[-1]}); list them with `tutelage plan`")
        return model.get_submodule(self.names[block - 1])


def find_blocks(model: nn.Module, container: str | None = None) -> Blocks:
    """Find the repeated blocks of a transformer, an `nn.Sequential`, or a module with one `nn.ModuleList` of blocks.

    `container` is the dotted name of the list of blocks, for a model where the search is ambiguous. Raises UserError: no
    list of blocks, several candidates (they are listed), or `container` is not one."""
    if hasattr(model, "_first_module") and isinstance(model, nn.Sequential):
        raise UserError(
            f"{type(model).__name__} is a pipeline of modules, not a network of blocks: pass its folder, or its transformer "
            "(model[0].auto_model)"
        )
    candidates = _block_lists(model)
    if container is not None:
        try:
            chosen = model.get_submodule(container)
        except AttributeError:
            chosen = None
        if not isinstance(chosen, nn.ModuleList | nn.Sequential) or len(chosen) == 0:
            found = f"{container!r} is not a list of blocks of {type(model).__name__}"
            raise UserError(f"{found}; candidates: {_describe(candidates) or 'none'}")
        return _names(container, chosen)
    if isinstance(model, nn.Sequential) and len(model) > 0:
        return _names("", model)
    if not candidates:
        found = f"found no blocks in {type(model).__name__}: it has no nn.ModuleList or nn.Sequential of equal modules"
        raise UserError(f"{found}; name the list of blocks with `blocks=`")
    depth = _depth(model)
    matching = {name: blocks for name, blocks in candidates.items() if len(blocks) == depth or len(candidates) == 1}
    if len(matching) != 1:
        found = f"{type(model).__name__} has several lists of blocks: {_describe(candidates)}"
        raise UserError(f"{found}; name one with `blocks=`, e.g. blocks={next(iter(candidates))!r}")
    ((name, blocks),) = matching.items()
    if depth is not None and len(blocks) < depth and depth % len(blocks) == 0:
        raise UserError(
            f"{type(model).__name__} runs its {len(blocks)} block(s) {name!r} {depth // len(blocks)} times over: blocks that "
            "share weights cannot be addressed individually; if this is a mistake, name a list with `blocks=`"
        )
    return _names(name, blocks)


def head_module(model: nn.Module) -> nn.Module | None:
    """The map from the last hidden state to the outputs; None if the model has no such map."""
    get = getattr(model, "get_output_embeddings", None)
    if get is not None and (head := get()) is not None:
        return head
    for name in _CLASSIFIER_NAMES:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(module, nn.Linear) or isinstance(getattr(module, "out_features", None), int):
            return module
    return None


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
    if place == FINAL:
        head = head_module(model) if head is None else head
        return _first(model(*args, **inputs)) if head is None else _run_until(model, head, True, args, inputs)
    if not isinstance(place, int):
        raise UserError(f"no place {place!r} in {type(model).__name__}: use a block number or {FINAL!r}")
    module = (blocks or find_blocks(model)).module(model, place or 1)
    return _run_until(model, module, place == 0, args, inputs)


class _Reached(Exception):  # carries the hidden state out of a forward that is stopped on purpose
    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


def _run_until(model: nn.Module, module: nn.Module, before: bool, args: Any, inputs: Any) -> torch.Tensor:
    """Run `model` and stop before or after `module`; the input or output of the module there."""

    def stop_before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(_first(args if args else tuple(kwargs.values())))

    def stop_after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        raise _Reached(_first(output))

    layer: Any = module
    recomputable = "GradientCheckpointingLayer" in (cls.__name__ for cls in type(module).__mro__)
    if before:
        undo = module.register_forward_pre_hook(stop_before, with_kwargs=True).remove
    elif recomputable and layer.gradient_checkpointing and layer.training:
        # Before transformers 5.23 a block's hooks run inside the recomputed function, where states may have no gradient.
        recompute = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *args: stop_after(module, args, recompute(*args))
        undo = functools.partial(setattr, layer, "_gradient_checkpointing_func", recompute)
    else:
        undo = module.register_forward_hook(stop_after).remove
    try:
        model(*args, **inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        undo()
    raise UserError(f"the forward of {type(model).__name__} never reached {type(module).__name__} with these inputs")


def _first(output: Any) -> torch.Tensor:
    """The hidden state in a module's output: a tensor, the first entry of a tuple, or `last_hidden_state`."""
    if isinstance(output, torch.Tensor):
        return output
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


def _depth(model: nn.Module) -> int | None:
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """Outermost lists of modules of one class, by dotted name (lists inside a block, such as experts, do not count).

    A list of several classes (a hybrid of attention and Mamba blocks) counts if `config.num_hidden_layers` is its length;
    otherwise neither it nor the lists inside it are candidates."""
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    mixed: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in (*found, *mixed))
        if not name or inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = list(module)
        if not children or not any(True for _ in children[0].parameters()):
            continue
        same_class = len({type(child) for child in children}) == 1
        if same_class or (isinstance(module, nn.ModuleList) and len(children) == _depth(model)):
            found[name] = module
        elif isinstance(module, nn.ModuleList):
            mixed.append(name)
    return found


def _names(container: str, blocks: nn.Module) -> Blocks:
    prefix = container + "." if container else ""
    return Blocks(tuple(prefix + name for name, _ in blocks.named_children()))


def _describe(candidates: dict[str, Any]) -> str:
    return ", ".join(f"{name} ({len(blocks)} x {type(blocks[0]).__name__})" for name, blocks in candidates.items())
