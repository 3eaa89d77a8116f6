"""What we override, set or call of other libraries without their promise to keep it: it exists, as we expect it.

`CONTRACT` lists every such name. To add an entry, write `Relied(owner, name, file, parameters)`:

- owner: dotted name of the class (or of the function, for an attribute that a function sets) it belongs to
- name: the method or attribute
- file: the file under src/tutelage that relies on it
- parameters: names of a method's parameters without self, in order; `...` at the end allows more; None for an attribute

The tests of completeness say which entry is missing.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import accelerate
import pytest
import transformers
from packaging.version import Version

import tutelage
from tutelage.runs.options import OptionParser
from tutelage.training.config import CurriculumConfig
from tutelage.training.trainer import CurriculumTrainer

SOURCE = Path(tutelage.__file__).parent
TRAINER = "transformers.Trainer"
ARGUMENTS = "transformers.TrainingArguments"
CHECKPOINTS = "training/checkpointing.py"


@dataclass(frozen=True)
class Relied:
    """A name of another library that one of our files relies on."""

    owner: str
    name: str
    file: str = "training/trainer.py"
    parameters: str | None = None

    @property
    def key(self) -> str:
        """The name with its owner."""
        return f"{self.owner}.{self.name}"


CONTRACT = (
    # methods of Trainer that we override
    Relied(TRAINER, "train", parameters="resume_from_checkpoint trial ignore_keys_for_eval"),
    Relied(TRAINER, "_prepare_for_training", parameters="max_steps train_dataloader resume_from_checkpoint"),
    Relied(TRAINER, "get_batch_samples", parameters="epoch_iterator num_batches device"),
    Relied(TRAINER, "_get_num_items_in_batch", parameters="batch_samples device"),
    Relied(TRAINER, "create_optimizer", parameters="model"),
    Relied(TRAINER, "create_scheduler", parameters="num_training_steps optimizer"),
    Relied(TRAINER, "_load_optimizer_and_scheduler", parameters="checkpoint"),
    Relied(TRAINER, "compute_loss", parameters="model inputs return_outputs num_items_in_batch"),
    Relied(TRAINER, "training_step", parameters="model inputs num_items_in_batch"),
    Relied(TRAINER, "floating_point_ops", parameters="inputs"),
    Relied(TRAINER, "_get_train_sampler", parameters="train_dataset"),
    Relied(TRAINER, "_get_collator_with_removed_columns", parameters="data_collator ..."),
    Relied(TRAINER, "_set_signature_columns_if_needed", parameters=""),
    Relied(TRAINER, "log", parameters="logs start_time"),
    Relied(TRAINER, "_save_checkpoint", CHECKPOINTS, "model trial"),
    Relied(TRAINER, "_save", CHECKPOINTS, "output_dir state_dict"),
    Relied(TRAINER, "create_model_card", CHECKPOINTS, "..."),
    Relied(TRAINER, "_load_from_checkpoint", CHECKPOINTS, "resume_from_checkpoint model"),
    Relied(TRAINER, "_load_best_model", CHECKPOINTS, ""),
    Relied(TRAINER, "evaluate", parameters="..."),
    Relied(
        TRAINER,
        "evaluation_loop",
        parameters="dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    ),
    # private methods of Trainer that we call
    Relied(TRAINER, "_prepare_inputs", parameters="inputs"),
    Relied(TRAINER, "_get_output_dir", CHECKPOINTS, "trial"),
    # attributes of Trainer that we set, and private ones that we read
    Relied(TRAINER, "model_accepts_loss_kwargs"),
    Relied(TRAINER, "model"),
    Relied(TRAINER, "model_wrapped"),
    Relied(TRAINER, "data_collator"),
    Relied(TRAINER, "optimizer"),
    Relied(TRAINER, "lr_scheduler"),
    Relied(TRAINER, "state"),
    Relied(TRAINER, "control"),
    Relied(TRAINER, "_signature_columns"),
    Relied(TRAINER, "_tr_loss", CHECKPOINTS),
    Relied(TRAINER, "_total_loss_scalar", CHECKPOINTS),
    Relied(TRAINER, "_globalstep_last_logged", CHECKPOINTS),
    # fields of TrainingArguments that we redefine or set
    Relied(ARGUMENTS, "_n_gpu", "training/resolution.py"),
    Relied(ARGUMENTS, "train_sampling_strategy", "runs/extraction/options.py"),
    *(
        Relied(ARGUMENTS, name, "training/config.py")
        for name in (
            "output_dir",
            "learning_rate",
            "lr_scheduler_type",
            "warmup_steps",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "logging_steps",
            "num_train_epochs",
            "max_steps",
            "save_total_limit",
            "resume_from_checkpoint",
            "dataloader_pin_memory",
            "logging_nan_inf_filter",
            "fsdp",
        )
    ),
    Relied(ARGUMENTS, "__post_init__", "training/config.py", ""),
    # other classes
    Relied("accelerate.Accelerator", "_optimizers"),
    Relied("accelerate.big_modeling.dispatch_model", "hf_device_map", "targets/live.py"),
    Relied("accelerate.hooks.add_hook_to_module", "_hf_hook", "core/heads.py"),
    Relied("argparse.ArgumentParser", "_actions", "cli/help.py"),
    Relied("argparse.ArgumentParser", "_option_string_actions", "cli/compare.py"),
    Relied("argparse.ArgumentParser", "error", "runs/options.py", "message"),
    Relied("datasets.Dataset", "_fingerprint", "reproduction/recipes/language.py"),
    Relied("torch._subclasses.fake_tensor", "FakeTensor", "core/inputs.py"),
    Relied("torch._subclasses.fake_tensor", "FakeTensorMode", "runs/plan.py"),
    Relied("torch.nn.Module", "_forward_hooks", "core/probe.py"),
    Relied("torch.utils._python_dispatch", "TorchDispatchMode", "training/costs.py"),
    Relied("torch.nn.Module", "_modules", "core/views.py"),
    Relied("torch", "_dynamo", "training/compilation.py"),
    Relied("transformers.modeling_layers.GradientCheckpointingLayer", "gradient_checkpointing", "core/forward.py"),
    Relied(
        "transformers.modeling_layers.GradientCheckpointingLayer", "_gradient_checkpointing_func", "core/forward.py"
    ),
    Relied("transformers.AutoModelForCausalLM", "_model_mapping", "tasks/loading.py"),
    Relied("transformers.PreTrainedConfig", "_attn_implementation", "training/preparation.py"),
    Relied("transformers.PreTrainedModel", "_keys_to_ignore_on_load_unexpected", "targets/checkpoints.py"),
    Relied(
        "transformers.PreTrainedModel", "set_attn_implementation", "training/preparation.py", "attn_implementation ..."
    ),
)

# Not in the contract, for the reason given.
EXEMPT = {
    "objective": "Trainer has one too, which hyperparameter_search alone sets",
    "_exit": "a documented function of os",
    "_first_module": "tests/tasks/test_embedding.py asks a real SentenceTransformer",
}
LISTED = {relied.name for relied in CONTRACT} | set(EXEMPT)
OURS = (CurriculumTrainer, CurriculumConfig, OptionParser)
BY_NAME = ("getattr", "hasattr", "setattr", "delattr")


@pytest.mark.parametrize("relied", CONTRACT, ids=lambda relied: relied.key)
def test_it_exists_with_the_parameters_we_expect(relied: Relied) -> None:
    problem = difference(relied)
    assert problem is None, f"tutelage/{relied.file} relies on {relied.key}: {problem} in {versions()}"


@pytest.mark.parametrize(
    ("relied", "expected"),
    [
        (Relied(TRAINER, "_prepare_for_schooling", parameters="max_steps"), "no such name"),
        (Relied(TRAINER, "_signature_rows"), "no such name"),
        (Relied("accelerate.Accelerator", "_optimisers"), "no such name"),
        (Relied("accelerate.hooks.add_hook_to_module", "_hf_hooks"), "no such name"),
        (Relied("transformers.Coach", "train", parameters=""), "no such owner"),
        (
            Relied(TRAINER, "_save", CHECKPOINTS, "folder"),
            "expected parameters (folder), found (output_dir, state_dict)",
        ),
        (Relied(TRAINER, "_save", CHECKPOINTS, "state_dict ..."), "found (output_dir, state_dict)"),
    ],
)
def test_a_difference_is_found(relied: Relied, expected: str) -> None:
    assert expected in str(difference(relied))


@pytest.mark.parametrize("ours", OURS, ids=lambda ours: ours.__name__)
def test_every_override_is_listed(ours: type) -> None:
    missing = required(ours) - LISTED
    assert not missing, f"{ours.__name__} overrides, sets or uses {sorted(missing)}: add them to CONTRACT"


def test_every_private_name_of_another_library_is_listed() -> None:
    missing = {
        f"{path.relative_to(SOURCE).as_posix()}: {name}"
        for path in SOURCE.rglob("*.py")
        for name in foreign_private_names(ast.parse(path.read_text(encoding="utf-8")))
        if name not in LISTED
    }
    assert not missing, f"private names of other libraries, add them to CONTRACT: {sorted(missing)}"


def test_every_entry_is_used_by_the_file_it_names() -> None:
    stale = [relied.key for relied in CONTRACT if relied.name not in (SOURCE / relied.file).read_text(encoding="utf-8")]
    assert not stale, f"no longer used by the file that CONTRACT names, correct or remove: {stale}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("trainer._save(folder)", {"_save"}),
        ("self.accelerator._models.clear()", {"_models"}),
        ("from torch._inductor import config", {"config"}),
        ("import torch._dynamo", {"_dynamo"}),
        ("hasattr(module, '_old_forward')", {"_old_forward"}),
        ("self._mine, cls._mine, super()._save, module.__name__, hasattr(self, '_kept')", set()),
    ],
)
def test_a_private_name_is_found(source: str, expected: set[str]) -> None:
    assert set(foreign_private_names(ast.parse(source))) == expected


def test_what_is_overridden_or_set_is_found() -> None:
    class Subclass(CurriculumTrainer):
        label_names: Any = None

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            self.hp_space = self.mine = self.args  # type: ignore[assignment]
            return super()._wrap_model(self._tokenize, self.get_decay_parameter_names)

    found = required(Subclass) - required(CurriculumTrainer)
    assert found == {"label_names", "_get_eval_sampler", "hp_space", "_wrap_model"}


def test_trainer_reads_what_we_override_or_set() -> None:
    """An override that `Trainer` no longer calls would do nothing, without any error."""
    read = {node.attr for node in attributes(transformers.Trainer) if isinstance(node.ctx, ast.Load)}
    entry_points = {"train"}
    dead = {relied.name for relied in CONTRACT if relied.owner == TRAINER} - read - entry_points
    assert not dead, f"Trainer never uses {sorted(dead)} in {versions()}"


def test_overrides_take_what_trainer_gives_them() -> None:
    for name in required(CurriculumTrainer):
        method, base = getattr(CurriculumTrainer, name, None), getattr(transformers.Trainer, name, None)
        if isinstance(method, FunctionType) and method is not base:
            assert isinstance(base, FunctionType)
            taken = inspect.signature(method).parameters
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
                assert list(taken) == list(inspect.signature(base).parameters), f"{name} in {versions()}"


def test_the_lowest_environment_has_the_versions_that_pyproject_allows() -> None:
    root = Path(__file__).resolve().parents[2]
    floors = re.findall(r'"(accelerate|transformers)>=([\d.]+)', (root / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)", (root / "constraints-lowest.txt").read_text(encoding="utf-8"), re.M))
    assert len(floors) == 2
    for name, floor in floors:
        assert Version(pinned[name]) == Version(floor), f"{name}: constraints-lowest.txt differs from pyproject.toml"


def versions() -> str:
    """The versions that were looked at, for messages."""
    return f"transformers {transformers.__version__}, accelerate {accelerate.__version__}"


def difference(relied: Relied) -> str | None:
    """How a name differs from what we expect, in words; None if it does not."""
    owner = resolve(relied.owner)
    if owner is None:
        return "no such owner"
    if relied.name not in names_of(owner):
        return "no such name"
    if relied.parameters is None:
        return None
    found = list(inspect.signature(getattr(owner, relied.name)).parameters)[1:]
    expected = relied.parameters.split()
    more = expected[-1:] == ["..."]
    if more:
        expected = expected[:-1]
    same = found[: len(expected)] == expected if more else found == expected
    return None if same else f"expected parameters ({', '.join(expected)}), found ({', '.join(found)})"


def resolve(dotted: str) -> Any:
    """The module, class or function of a dotted name; None if there is none."""
    try:
        return import_module(dotted)
    except ImportError:
        module, _, name = dotted.rpartition(".")
        return getattr(import_module(module), name, None)


@cache
def names_of(owner: Any) -> frozenset[str]:
    """Attributes of a module, a class (those its methods set or read included), or those that a function sets."""
    if inspect.ismodule(owner):
        return frozenset(dir(owner))
    if inspect.isfunction(owner):
        return frozenset(node.attr for node in attributes(owner) if isinstance(node.ctx, ast.Store))
    names = set(dir(owner)) | set(getattr(owner, "__dataclass_fields__", ()))
    for cls in bases(owner, ours=False):
        names |= {node.attr for node in attributes(cls) if isinstance(node.value, ast.Name) and node.value.id == "self"}
    return frozenset(names)


def bases(cls: type, *, ours: bool) -> list[type]:
    """The classes that `cls` is made of: ours (the tests' included), or those of other libraries."""
    return [
        base
        for base in cls.__mro__
        if base.__module__ != "builtins" and base.__module__.startswith(("tutelage", "tests")) == ours
    ]


@cache
def tree(item: Any) -> ast.AST:
    """The syntax tree of a class or function."""
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(item))))


def attributes(item: Any) -> Iterator[ast.Attribute]:
    """Every attribute access in a class or function."""
    return (node for node in ast.walk(tree(item)) if isinstance(node, ast.Attribute))


def required(ours: type) -> set[str]:
    """Names of other libraries' classes that our subclass overrides or sets, or uses though they are private."""
    theirs: set[str] = set().union(*(names_of(base) for base in bases(ours, ours=False)))
    found: set[str] = set()
    for cls in bases(ours, ours=True):
        definition = tree(cls).body[0]  # type: ignore[attr-defined]
        for node in definition.body:
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign):
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
                found.add(node.target.id)
        for access in attributes(cls):
            if is_own(access.value) and (access.attr.startswith("_") or isinstance(access.ctx, ast.Store)):
                found.add(access.attr)
    return (found & theirs) - {"__init__", "__doc__"}


def foreign_private_names(source: ast.AST) -> Iterator[str]:
    """Private names used of anything but `self`, `cls` and `super()`, and what is imported from private modules."""
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute):
            if is_private(node.attr) and not is_own(node.value):
                yield node.attr
        elif isinstance(node, ast.ImportFrom):
            private = any(is_private(part) for part in (node.module or "").split("."))
            yield from (alias.name for alias in node.names if not node.level and private)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value) and not is_own(node.args[0]):
                yield name.value


def is_own(node: ast.expr) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name: Any) -> bool:
    """Whether a name begins with an underscore and is no special name such as `__len__`."""
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")
