"""Sparse parity with two-layer networks and with transformers (arXiv:2503.17494, arXiv:2410.05464)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, GPT2Config, GPT2ForSequenceClassification, default_data_collator

from tutelage.core.errors import UserError, check_positive, check_range
from tutelage.reproduction.recipe import EVAL_SEED, TEACHER_SEED, TRAINED, PaperRecipe, at_least_one
from tutelage.reproduction.search import Axis
from tutelage.reproduction.statistics import rounded
from tutelage.reproduction.teachers import Teacher, TeacherRule
from tutelage.reproduction.variants import Variant, parse_variant, plain_variant
from tutelage.tasks.loading import MOST_BLOCKS, load_model
from tutelage.tasks.parity import ParityData, ParityMLP, ParityMLPConfig, check_parity, planted_teacher

PLANTED = "planted"
_MOST_BITS, _MOST_NEURONS = 10_000, 1_000_000
_ABOVE_CHANCE = 0.6  # below this held-out accuracy a teacher was made for a different parity


_FURTHER = (
    "joint-equal:method=joint,hidden_weight=1",
    "joint-learned:method=joint,projection=learned",
    "one_shot-labels:method=one_shot,label_weight=0.5",
    "one_shot-t2:method=one_shot,temperature=2",
    "one_shot-t4:method=one_shot,temperature=4",
    "one_shot-mse:method=one_shot,output_loss=mse",
    "extraction-mse:method=extraction,output_loss=mse",
    "scratch-flops:method=scratch,match=flops",
)


@dataclass(frozen=True)
class ParityRecipe(PaperRecipe):
    """What the two parity recipes have in common."""

    stop_at_target = True
    metric = "accuracy"
    better = "higher"

    tuning_seeds: tuple[int, ...] = (1000, 1001, 1002)
    trials: int | None = 12
    fine_eval_every: int | None = 400
    d: int = 64  # input bits
    k: int = 5  # bits that the label is the parity of
    support: tuple[int, ...] | None = None
    """Their coordinates; default: k drawn at random from the seed of the teacher."""
    target: float = 0.99  # held-out accuracy to reach
    teacher_learning_rate: float = 0.5
    teacher_batch_size: int = 16
    teacher_max_samples: int = 4_000_000  # examples within which the teacher must converge
    teacher_factor: float = 2.5
    """The teacher is trained for this many times the examples after which it first reached 99.9%."""
    teacher_sparse_samples: int = 0
    """Examples over which the teacher's inputs go from half sparse to uniform (arXiv:2306.16921); 0: uniform from the start."""
    teacher_checkpoint_every: int = 16_000  # examples between the checkpoints kept for progressive distillation
    stage_samples: int = 16_000  # examples of each hidden stage
    stage_learning_rate: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "stage_samples", "teacher_batch_size", "teacher_max_samples", "teacher_checkpoint_every")
        if self.teacher_sparse_samples < 0:
            raise UserError(f"teacher_sparse_samples must not be negative, got {self.teacher_sparse_samples}")
        if not 1 <= self.teacher_factor < float("inf"):
            raise UserError(f"teacher_factor must be at least 1 (past convergence), got {self.teacher_factor}")
        if self.stage_samples >= self.budget_samples:
            found = f"budget too small for the stages: stage_samples {self.stage_samples} of budget_samples"
            raise UserError(f"{found} {self.budget_samples}")
        check_parity(self.d, self.k, self.support)
        check_range("d", self.d, 1, _MOST_BITS)
        check_positive("target", self.target)

    @cached_property
    def coordinates(self) -> tuple[int, ...]:
        """The k coordinates that the label is the parity of."""
        return self._drawn(self.teacher_seed)

    def _drawn(self, seed: int) -> tuple[int, ...]:
        # The first k positions would be no sparse parity: at position k a causal block sees the support and nothing else.
        if self.support is not None:
            return check_parity(self.d, self.k, self.support)
        drawn = np.random.RandomState(seed).choice(self.d, self.k, replace=False)
        return tuple(sorted(drawn.tolist()))

    def identity(self) -> dict[str, Any]:
        supports = [list(self._drawn(seed)) for seed in self.teacher_seeds]
        return {"support": supports[0]} if len(supports) == 1 else {"supports": supports}

    @property
    def default_methods(self) -> tuple[Variant, ...]:
        return tuple(map(plain_variant, ("extraction", "joint", "one_shot", "progressive", "scratch")))

    @property
    def further_methods(self) -> tuple[Variant, ...]:
        return tuple(map(parse_variant, _FURTHER))

    @property
    def collator(self) -> Any:
        return default_data_collator

    def arguments(self) -> dict[str, Any]:
        constant_rate = {"lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
        return {**constant_rate, "per_device_eval_batch_size": 1024, "preset": "paper"}

    def stage_arguments(self) -> dict[str, Any]:
        steps = max(1, self.stage_samples // self.batch_size)
        return {"stage_steps": [steps], "stage_learning_rate": self.stage_learning_rate}

    def stage_axes(self) -> dict[str, Axis]:
        steps, rate = self.stage_arguments().values()
        lengths = tuple(max(1, times * steps[0] // 2) for times in (1, 2, 4))
        return {
            "stage_steps": Axis(lengths, start=lengths[1], grows=True),
            "stage_learning_rate": Axis((rounded(rate / 3, 2), rate, rounded(3 * rate, 2)), start=rate, grows=True),
        }

    @property
    def first_phase(self) -> int:
        return min(2 * self.stage_samples, self.budget_samples // 2)

    def teacher_rule(self) -> TeacherRule:
        every = self.teacher_checkpoint_every
        return TeacherRule("accuracy", 0.999, self.teacher_factor, self.teacher_max_samples, every)

    def _data(self, count: int, seed: Any, sparse: int = 0) -> ParityData:
        return ParityData(self.d, self.k, count, seed, self.coordinates, sparse)

    def _streams(self, seeds: list[int]) -> Any:
        """Seed of the data: a list where the student has replicas."""
        return seeds[0]

    def train_data(self, seeds: Sequence[int], count: int) -> Any:
        return self._data(count, self._streams(list(seeds)))

    def eval_data(self, seeds: Sequence[int], tuning: bool = False) -> Any:  # tuning seeds have data of their own
        return self._data(self.eval_samples, self._streams([seed + EVAL_SEED for seed in seeds]))

    def teacher_data(self, count: int) -> tuple[Any, Any]:
        seed = TEACHER_SEED + self.teacher_seed
        held_out = self._data(self.eval_samples, seed + EVAL_SEED)
        return self._data(count, seed, self.teacher_sparse_samples), held_out

    def teacher_identity(self) -> dict[str, Any]:
        names = ("d", "k", "eval_samples", "teacher_sparse_samples")
        return {
            **{name: getattr(self, name) for name in names},
            "teacher_seed": self.teacher_seed,
            "support": self.coordinates,
        }

    def checked_teacher(self, teacher: Teacher) -> Teacher:
        config: Any = teacher.model.config
        bits = getattr(config, "d", None) or getattr(config, "n_positions", None)
        if bits != self.d:
            raise UserError(f"the teacher takes {bits} bits, the recipe has d={self.d}: change one of the two")
        data = self._data(self.eval_samples, EVAL_SEED + TEACHER_SEED + 1)
        accuracy = self.evaluate(teacher.model, data, batch_size=512)["accuracy"]
        if accuracy < _ABOVE_CHANCE:
            raise UserError(
                f"the teacher's accuracy on this parity (d={self.d}, k={self.k}, support {list(self.coordinates)}) is "
                f"{accuracy:.3f}, which is chance: it was made for a different parity; give its d, k and support"
            )
        description = teacher.description
        if self.teacher == TRAINED and self.teacher_sparse_samples:
            description += (
                f"; inputs went from half sparse to uniform over its first {self.teacher_sparse_samples:,} examples"
            )
        return dataclasses.replace(teacher, description=description, metrics={**teacher.metrics, "accuracy": accuracy})


@dataclass(frozen=True)
class ParityMLPRecipe(ParityRecipe):
    """Two-layer networks, plain SGD; all seeds train side by side as one replicated student."""

    name = "parity-mlp"
    about = "sparse parity, two-layer networks"
    task = "classification"
    replicated = True
    teachers: ClassVar[tuple[str, ...]] = (TRAINED, PLANTED)

    learning_rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    teacher: str = TRAINED
    """`trained`, `planted` (a network that computes the parity by construction), or the folder of a finished teacher."""
    teacher_width: int = 5000
    student_width: int = 100
    match_activation: str = "pre"  # the student's side of the stage: `pre` or `post` activation
    planted_noise: float = 0.02  # planted teacher: standard deviation of the weights off the support

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "teacher_width", "student_width", most=_MOST_NEURONS)
        check_range("planted_noise", self.planted_noise, 0)
        if self.match_activation not in ("pre", "post"):
            raise UserError(f"unknown match_activation {self.match_activation!r}: use 'pre' or 'post'")

    @property
    def default_methods(self) -> tuple[Variant, ...]:
        return tuple(
            method for method in super().default_methods if self.teacher != PLANTED or method.method != "progressive"
        )

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "optim": "sgd", "max_grad_norm": 0.0}

    @property
    def places(self) -> dict[str, Any]:
        return {"layer_map": "1:2" if self.match_activation == "pre" else "2:2"}

    def make_teacher(self, folder: Path) -> Teacher:
        if self.teacher != PLANTED:
            return super().make_teacher(folder)
        settings: dict[str, Any] = {"noise": self.planted_noise, "seed": self.teacher_seed}
        model = planted_teacher(self.d, self.k, self.teacher_width, support=self.coordinates, **settings)
        return self.checked_teacher(Teacher(model, "planted: computes the parity by construction, not trained"))

    def new_teacher(self) -> nn.Module:
        torch.manual_seed(self.teacher_seed)
        return ParityMLP(ParityMLPConfig(self.d, self.teacher_width))

    def load_teacher(self, folder: str) -> nn.Module:
        model = load_model(folder, AutoModel)
        if not isinstance(model, ParityMLP):
            raise UserError(f"teacher {folder!r} is a {type(model).__name__}, not a two-layer parity network")
        if model.config.replica_seeds is not None:
            raise UserError(f"teacher {folder!r} contains {len(model.config.replica_seeds)} replicas: give one network")
        return model

    def teacher_identity(self) -> dict[str, Any]:
        return {**super().teacher_identity(), "width": self.teacher_width}

    def _streams(self, seeds: list[int]) -> Any:
        return seeds

    def make_student(self, seeds: Sequence[int]) -> nn.Module:
        return ParityMLP(ParityMLPConfig(self.d, self.student_width, replica_seeds=list(seeds)))


@dataclass(frozen=True)
class ParityTransformerRecipe(ParityRecipe):
    """GPT-2 shape: a student with few heads, a teacher with many; the answer is read at the last position."""

    name = "parity-transformer"
    about = "sparse parity, GPT-2 shape"
    task = "sequence_classification"

    layers: int = 2  # blocks of teacher and student
    teacher_heads: int = 16
    student_heads: int = 4
    head_width: int = 8
    initializer_range: float = 0.1
    """Standard deviation of the initial weights; GPT-2's 0.02 learns parities far more slowly at this width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "layers", "teacher_heads", "student_heads", "head_width", most=MOST_BLOCKS)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "optim": "adamw_torch", "max_grad_norm": 1.0}

    @property
    def places(self) -> dict[str, Any]:
        return {"num_stages": self.layers}

    @property
    def first_phase(self) -> int:  # half of what the teacher itself needs to get through its transition
        return min(4 * self.stage_samples, self.budget_samples // 2)

    def _build(self, heads: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "num_labels": 2,
            **{"n_positions": self.d, "n_embd": heads * self.head_width, "n_layer": self.layers, "n_head": heads},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
            **{"initializer_range": self.initializer_range, "bos_token_id": None, "eos_token_id": None},
        }
        return GPT2ForSequenceClassification(GPT2Config(vocab_size=2, **settings))

    def new_teacher(self) -> nn.Module:
        return self._build(self.teacher_heads, self.teacher_seed)

    def teacher_identity(self) -> dict[str, Any]:
        shape = {"layers": self.layers, "width": self.teacher_heads, "head_width": self.head_width}
        return {**super().teacher_identity(), **shape, "initializer_range": self.initializer_range}

    def make_student(self, seeds: Sequence[int]) -> nn.Module:
        return self._build(self.student_heads, 31 + seeds[0])
