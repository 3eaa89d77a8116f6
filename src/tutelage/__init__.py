"""Knowledge distillation by curriculum extraction (arXiv:2503.17494) for PyTorch and Hugging Face transformers.

`distill`, `extract`, `evaluate`, `plan` and `compare` do what the commands of the same names do; `CurriculumTrainer` is a
`transformers.Trainer`. Every name is imported when it is first used, which keeps `import tutelage` fast."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.core.blocks import find_blocks
    from tutelage.core.curriculum import Curriculum, extraction, joint, one_shot, progressive, scratch
    from tutelage.core.errors import UserError
    from tutelage.core.forward import forward_to
    from tutelage.core.losses import OutputSettings, embedding_loss, hidden_loss, output_loss
    from tutelage.core.projection import RandomProjection
    from tutelage.core.stages import HiddenStage, JointStage, OutputStage
    from tutelage.core.standardize import Standardizer
    from tutelage.reproduction.compare import compare
    from tutelage.runs.distill import distill
    from tutelage.runs.evaluate import EvaluateOptions, evaluate
    from tutelage.runs.extraction.job import extract
    from tutelage.runs.extraction.options import ExtractOptions
    from tutelage.runs.inputs import RunOptions
    from tutelage.runs.plan import plan
    from tutelage.tasks.base import HeadTask, Task
    from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_STUDENT, DEFAULT_TEACHER, DEFAULT_TEXT
    from tutelage.tasks.loading import load_model, load_tokenizer
    from tutelage.tasks.registry import detect_task, get_task, register_task
    from tutelage.tasks.students import make_student, student_config
    from tutelage.tasks.text import read_dataset, split_dataset, tokenize
    from tutelage.training.config import CurriculumConfig
    from tutelage.training.trainer import CurriculumTrainer

__version__ = "0.1.0"

_MODULES = {
    "find_blocks": "core.blocks",
    "forward_to": "core.forward",
    "Curriculum": "core.curriculum",
    "HiddenStage": "core.stages",
    "JointStage": "core.stages",
    "OutputStage": "core.stages",
    "extraction": "core.curriculum",
    "joint": "core.curriculum",
    "one_shot": "core.curriculum",
    "progressive": "core.curriculum",
    "scratch": "core.curriculum",
    "UserError": "core.errors",
    "OutputSettings": "core.losses",
    "embedding_loss": "core.losses",
    "hidden_loss": "core.losses",
    "output_loss": "core.losses",
    "RandomProjection": "core.projection",
    "Standardizer": "core.standardize",
    "compare": "reproduction.compare",
    "distill": "runs.distill",
    "EvaluateOptions": "runs.evaluate",
    "evaluate": "runs.evaluate",
    "extract": "runs.extraction.job",
    "ExtractOptions": "runs.extraction.options",
    "RunOptions": "runs.inputs",
    "plan": "runs.plan",
    "HeadTask": "tasks.base",
    "Task": "tasks.base",
    "DEFAULT_EVAL_TEXT": "tasks.embedded",
    "DEFAULT_STUDENT": "tasks.embedded",
    "DEFAULT_TEACHER": "tasks.embedded",
    "DEFAULT_TEXT": "tasks.embedded",
    "load_model": "tasks.loading",
    "load_tokenizer": "tasks.loading",
    "detect_task": "tasks.registry",
    "get_task": "tasks.registry",
    "register_task": "tasks.registry",
    "make_student": "tasks.students",
    "student_config": "tasks.students",
    "read_dataset": "tasks.text",
    "split_dataset": "tasks.text",
    "tokenize": "tasks.text",
    "CurriculumConfig": "training.config",
    "CurriculumTrainer": "training.trainer",
}
"""Module below `tutelage` of each public name."""

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        globals()[name] = getattr(importlib.import_module(f"tutelage.{_MODULES[name]}"), name)
        return globals()[name]
    raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
