"""Find the repeated blocks of a network.

A *place* is an integer or `FINAL`. Place 0 is the input of the first block (the embedding output, `hidden_states[0]` in
transformers), place b is the output of block b, and `FINAL` is the input of the output head (after the final norm)."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from tutelage.core.errors import UserError
from tutelage.core.inputs import text_config

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


def _depth(model: nn.Module) -> int | None:
    depth = getattr(text_config(getattr(model, "config", None)), "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """Outermost lists of modules of one class, by dotted name (lists inside a block, such as experts, do not count; nor do
    those of an image or sound encoder beside a language model).

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
    kind = type(text_config(getattr(model, "config", None)))
    return {name: blocks for name, blocks in found.items() if type(_config_around(model, name)) is kind} or found


def _config_around(model: nn.Module, name: str) -> Any:
    """The configuration of the smallest network around a module."""
    while name:
        name = name.rpartition(".")[0]
        if (config := getattr(model.get_submodule(name), "config", None)) is not None:
            return text_config(config)
    return None


def _names(container: str, blocks: nn.Module) -> Blocks:
    prefix = container + "." if container else ""
    return Blocks(tuple(prefix + name for name, _ in blocks.named_children()))


def _describe(candidates: dict[str, Any]) -> str:
    return ", ".join(f"{name} ({len(blocks)} x {type(blocks[0]).__name__})" for name, blocks in candidates.items())
