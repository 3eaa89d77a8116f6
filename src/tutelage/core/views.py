"""Views: networks that share a model's parameters and end at a place.

A view is made of shallow copies of the few modules around the list of blocks: the list is cut, and what runs after its last
block (norm, pooler, output head) is left out. Its forward is an ordinary one, so `torch.compile` sees one graph, and hooks of
FSDP see a whole forward. A view is used only where it was seen to give the same state, to the last bit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Path = tuple[str, ...]


class LeftOut(nn.Module):
    """Stands in for a module after the place: gives back the state that it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


@dataclass(frozen=True)
class View:
    """A network that ends at a place of a model."""

    network: nn.Module
    copies: tuple[tuple[nn.Module, nn.Module], ...]  # modules of the model, and the copies that stand for them
    children: tuple[tuple[nn.Module | None, ...], ...] = field(init=False)  # those of the modules when this was made

    def __post_init__(self) -> None:
        object.__setattr__(self, "children", self._children())

    def _children(self) -> tuple[tuple[nn.Module | None, ...], ...]:
        return tuple(tuple(module._modules.values()) for module, _ in self.copies)

    def is_current(self) -> bool:
        """Whether the model still has the modules that this was made of; brings modes, flags and hooks up to date."""
        if self.children != self._children():
            return False
        for module, copy in self.copies:
            _follow(copy, module)
        return True


@dataclass(frozen=True)
class Order:
    """Which modules ran, in a forward of a whole model, before and after the last block had ended."""

    before: frozenset[nn.Module]
    after: frozenset[nn.Module]


@contextmanager
def recorded(model: nn.Module, last_block: nn.Module) -> Iterator[list[Order]]:
    """Gives a list that has the `Order` of the forward that is run inside."""
    found: list[Order] = []
    parts: list[set[nn.Module]] = [set()]
    undo = [m.register_forward_pre_hook(lambda module, _: parts[-1].add(module)) for m in model.modules()]
    undo.append(last_block.register_forward_hook(lambda *_: parts.append(set())))
    try:
        yield found
    finally:
        for handle in undo:
            handle.remove()
    found.append(Order(frozenset(parts[0]), frozenset().union(*parts[1:])))


def cut(root: nn.Module, blocks: Path, kept: int, order: Order) -> View | None:
    """A view of `root` with the first `kept` blocks of the list at `blocks`, and nothing of what ran after the last one.

    None where a module ran both before and after the end of the last block."""
    path = _path(root, blocks)
    copies = {module: _shallow(module) for module in path}
    for module, below in zip(path, (*path[1:], None), strict=True):
        for name, child in module._modules.items():
            if child in order.after and child is not below:
                if child in order.before:
                    return None
                copies[module]._modules[name] = LeftOut()
    listed = copies[path[-1]]._modules
    for name in list(listed)[kept:]:
        del listed[name]
    return _linked(path, blocks, copies)


def without(root: nn.Module, name: Path) -> View:
    """A view of `root` that leaves one module out, e.g. the output head."""
    path = _path(root, name[:-1])
    copies = {module: _shallow(module) for module in path}
    copies[path[-1]]._modules[name[-1]] = LeftOut()
    return _linked(path, name[:-1], copies)


def _path(root: nn.Module, names: Path) -> list[nn.Module]:
    path = [root]
    for name in names:
        path.append(path[-1].get_submodule(name))
    return path


def _linked(path: list[nn.Module], names: Path, copies: Mapping[nn.Module, nn.Module]) -> View:
    for above, name, below in zip(path[:-1], names, path[1:], strict=True):
        copies[above]._modules[name] = copies[below]
    return View(copies[path[0]], tuple(copies.items()))


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares parameters, buffers, hooks and children."""
    copy = object.__new__(type(module))
    copy.__dict__["_modules"] = dict(module._modules)
    _follow(copy, module)
    return copy


def _follow(copy: nn.Module, module: nn.Module) -> None:
    copy.__class__ = module.__class__  # FSDP gives a module a class of its own
    copy.__dict__.update((name, value) for name, value in module.__dict__.items() if name != "_modules")


class _Views(dict[Any, tuple[nn.Module | None, View]]):
    """The views of a model that were found to be right, by place, with the output head that a view ends before.

    It is kept in the model, where `torch.compile` finds it, but goes into no copy and no file."""

    def __deepcopy__(self, memo: Any) -> "_Views":
        return _Views()

    def __reduce__(self) -> Any:
        return (_Views, ())


def keep(model: nn.Module, place: Any, head: nn.Module | None, view: View) -> None:
    """Have `view_of` find a view."""
    model.__dict__.setdefault("_tutelage_views", _Views())[place] = (head, view)


def view_of(model: nn.Module, place: Any, head: nn.Module | None) -> nn.Module | None:
    """The network that ends at `place`; None where there is none, or where the model has changed since."""
    found = model.__dict__.get("_tutelage_views", {}).get(place)
    if found is None or found[0] is not head:
        return None
    if torch.compiler.is_compiling() or found[1].is_current():  # a compiled step changes no module
        return found[1].network
    del model.__dict__["_tutelage_views"][place]
    return None


def follow(model: nn.Module) -> None:
    """Bring the views of a model up to date, for a compiled step."""
    for _, view in model.__dict__.get("_tutelage_views", {}).values():
        view.is_current()
