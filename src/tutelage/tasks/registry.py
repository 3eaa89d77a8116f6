"""The registered tasks, by name."""

from torch import nn
from transformers import PreTrainedConfig

from tutelage.core.errors import UserError
from tutelage.tasks.base import Clues, Task
from tutelage.tasks.classification import PlainClassification, SequenceClassification
from tutelage.tasks.embedding import SentenceEmbedding
from tutelage.tasks.language import CausalLM, MaskedLM
from tutelage.tasks.loading import find_file, load_config

_BUILT_IN: tuple[type[Task], ...] = (CausalLM, MaskedLM, SequenceClassification, SentenceEmbedding, PlainClassification)
TASKS: dict[str, Task] = {kind.name: kind() for kind in _BUILT_IN}


def register_task(task: Task) -> None:
    """Register a task under its name; a task that already has the name is replaced."""
    TASKS[task.name] = task


def get_task(name: str) -> Task:
    """The registered task of that name."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: use one of {', '.join(TASKS)}")
    return TASKS[name]


def detect_task(model_or_config: nn.Module | PreTrainedConfig | str, trust_remote_code: bool = False) -> Task:
    """The task of a model, detected from its class, the `architectures` of its config, or the `modules.json` of
    sentence-transformers; UserError if no task recognises it."""
    clues = _clues(model_or_config, trust_remote_code)
    for task in TASKS.values():
        if task.recognizes(clues):
            return task
    raise UserError(f"cannot tell the task of {clues.names[0] or 'this model'}: set task to one of {', '.join(TASKS)}")


def _clues(source: nn.Module | PreTrainedConfig | str, trust_remote_code: bool) -> Clues:
    if isinstance(source, nn.Module):
        names = tuple(cls.__name__ for cls in type(source).__mro__)
        return Clues(names, model=source, config=getattr(source, "config", None))
    if isinstance(source, PreTrainedConfig):
        return Clues(tuple(source.architectures or [""]), config=source)
    if find_file(source, "modules.json") is not None:
        return Clues(("SentenceTransformer",))
    return _clues(load_config(source, trust_remote_code=trust_remote_code), trust_remote_code)
