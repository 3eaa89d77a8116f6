"""Knowledge distillation by curriculum extraction (arXiv:2503.17494) for PyTorch and Hugging Face transformers."""

from typing import TYPE_CHECKING, Any

from tutelage.core.blocks import find_blocks, forward_to
from tutelage.core.curriculum import Curriculum, HiddenStage, OutputStage, extraction, one_shot, progressive, scratch
from tutelage.core.losses import embedding_loss, hidden_loss, output_loss
from tutelage.core.projection import RandomProjection
from tutelage.core.standardize import Standardizer

if TYPE_CHECKING:
    from tutelage.training.config import CurriculumConfig
    from tutelage.training.trainer import CurriculumTrainer

__version__ = "0.1.0"

__all__ = [
    "Curriculum",
    "CurriculumConfig",
    "CurriculumTrainer",
    "HiddenStage",
    "OutputStage",
    "RandomProjection",
    "Standardizer",
    "UserError",
    "embedding_loss",
    "extraction",
    "find_blocks",
    "forward_to",
    "hidden_loss",
    "one_shot",
    "output_loss",
    "progressive",
    "scratch",
]


def __getattr__(name: str) -> Any:
    """Load the trainer only when asked for: it pulls in transformers, which takes seconds."""
    if name == "CurriculumConfig":
        from tutelage.training.config import CurriculumConfig

        return CurriculumConfig
    if name == "CurriculumTrainer":
        from tutelage.training.trainer import CurriculumTrainer

        return CurriculumTrainer
    raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
