"""Sparse parity with two-layer networks and with transformers (arXiv:2503.17494, arXiv:2410.05464).

Public names: `ParityMLPFields`, `ParityTransformerFields`, `parity_mlp`, `parity_transformer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, GPT2Config, GPT2ForSequenceClassification, default_data_collator

from tutelage.core.errors import UserError
from tutelage.reproduction.comparison_setting import EVAL_SEED, TEACHER_SEED, RecipeFields, System, Teacher
from tutelage.reproduction.teachers import TeacherRule, trained_teacher
from tutelage.tasks.base import get_task
from tutelage.tasks.loading import load_model
from tutelage.tasks.parity import ParityData, ParityMLP, ParityMLPConfig, check_parity, planted_teacher
from tutelage.training.evaluation import evaluate_batches

# A constant rate, no decay of weights, and the paper's unnormalised targets.
_PLAIN = {
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "per_device_eval_batch_size": 1024,
    "normalize": "none",
}
# Fields of the recipe, besides its width and support, that a trained teacher depends on.
_OF_TEACHER = (
    "d",
    "k",
    "teacher_seed",
    "layers",
    "head_width",
    "initializer_range",
    "eval_samples",
    "teacher_sparse_samples",
)


@dataclass(frozen=True)
class ParityFields(RecipeFields):
    """What the two parity recipes share."""

    d: int = 64
    """Input bits."""
    k: int = 5
    """Bits that the label is the parity of."""
    support: tuple[int, ...] | None = None
    """Their coordinates; unset takes the first k (two-layer networks) or draws k (transformers)."""
    target: float = 0.99
    """Held-out accuracy to reach."""
    teacher_path: str | None = None
    """Folder of a finished teacher, instead of training one."""
    teacher_seed: int = 0
    """Seed of the teacher."""
    teacher_learning_rate: float = 0.5
    """Its learning rate."""
    teacher_batch_size: int = 16
    """Its batch."""
    teacher_max_samples: int = 4_000_000
    """Examples within which it must converge."""
    teacher_factor: float = 2.5
    """It is trained on to so many times the examples after which it first reached 99.9%."""
    teacher_sparse_samples: int = 0
    """Examples over which the teacher's inputs go from half sparse to uniform (arXiv:2306.16921); 0 is uniform alone."""
    teacher_checkpoint_every: int = 16_000
    """Examples between the checkpoints kept for progressive distillation."""
    stage_samples: int = 16_000
    """Examples of each hidden stage."""
    stage_learning_rate: float = 3.0
    """Learning rate of hidden stages."""


@dataclass(frozen=True)
class ParityMLPFields(ParityFields):
    """Two-layer networks, plain SGD."""

    learning_rates: tuple[float, ...] = (3.0, 1.0, 0.3, 10.0)
    """The grid that every method gets. Plain SGD learns fastest just below the rate at which it diverges; the likeliest
    come first, since a run that can no longer win is stopped."""
    teacher: str = "trained"
    """`trained`, or `planted`: a network that computes the parity by construction."""
    teacher_width: int = 5000
    """Hidden width of the teacher."""
    student_width: int = 100
    """Hidden width of the student."""
    match_activation: str = "pre"
    """The student's side of the stage: `pre` or `post` activation."""
    planted_noise: float = 0.02
    """Planted teacher: deviation of the weights off the support."""


def parity_mlp(fields: ParityMLPFields, size: str) -> System:
    """Two-layer networks; all seeds train side by side as one replicated student."""
    support = check_parity(fields.d, fields.k, fields.support)
    if fields.teacher not in ("trained", "planted"):
        raise UserError(f"unknown teacher {fields.teacher!r}: use 'trained' or 'planted'")
    if fields.match_activation not in ("pre", "post"):
        raise UserError(f"unknown match_activation {fields.match_activation!r}: use 'pre' or 'post'")

    def student(seeds: Sequence[int]) -> nn.Module:
        return ParityMLP(ParityMLPConfig(fields.d, fields.student_width, replica_seeds=list(seeds)))

    def fresh_teacher() -> nn.Module:
        torch.manual_seed(fields.teacher_seed)
        return ParityMLP(ParityMLPConfig(fields.d, fields.teacher_width))

    def planted(_: Path) -> Teacher:
        model = planted_teacher(
            fields.d,
            fields.k,
            fields.teacher_width,
            support=support,
            noise=fields.planted_noise,
            seed=fields.teacher_seed,
        )
        return Teacher(model, {"description": "planted: computes the parity by construction, not trained"})

    plain = {**_PLAIN, "optim": "sgd", "max_grad_norm": 0.0}
    teacher: Callable[[Path], Teacher] = planted
    if fields.teacher == "trained" or fields.teacher_path:
        teacher = _teacher("parity-mlp", fields, support, fresh_teacher, _load_network, "classification", plain)
    methods = ("extraction", "one_shot", "scratch")
    return System(
        recipe="parity-mlp",
        size=size,
        fields=fields,
        task="classification",
        metric="accuracy",
        better="higher",
        target=fields.target,
        arguments=plain,
        methods={
            "extraction": {
                "layer_map": "1:2" if fields.match_activation == "pre" else "2:2",
                **_stages(fields),
            }
        },
        make_teacher=_checked(teacher, fields, support, "classification"),
        make_student=student,
        train_data=lambda seeds, count: ParityData(fields.d, fields.k, count, list(seeds), support),
        eval_data=lambda seeds: ParityData(
            fields.d, fields.k, fields.eval_samples, [seed + EVAL_SEED for seed in seeds], support
        ),
        collator=default_data_collator,
        replicated=True,
        stop_at_target=True,
        default_methods=methods if fields.teacher == "planted" else (*methods, "progressive"),
        sketch_teacher=None if fields.teacher_path else fresh_teacher,
    )


@dataclass(frozen=True)
class ParityTransformerFields(ParityFields):
    """GPT-2 shape, answer read at the last position."""

    layers: int = 2
    """Blocks of teacher and student."""
    teacher_heads: int = 16
    """Attention heads of the teacher."""
    student_heads: int = 4
    """Attention heads of the student."""
    head_width: int = 8
    """Width of a head."""
    initializer_range: float = 0.1
    """Deviation of the initial weights; GPT-2's 0.02 learns parities far more slowly at this width."""


def parity_transformer(fields: ParityTransformerFields, size: str) -> System:
    """Transformers with few heads from one with many."""
    # The first k positions would be no sparse parity: at position k a causal block sees the support and nothing else.
    support = check_parity(fields.d, fields.k, fields.support)
    if fields.support is None:
        drawn = np.random.RandomState(fields.teacher_seed).choice(fields.d, fields.k, replace=False)
        support = tuple(sorted(int(coordinate) for coordinate in drawn))
        fields = dataclasses.replace(fields, support=support)

    def build(heads: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=2,
            n_positions=fields.d,
            n_embd=heads * fields.head_width,
            n_layer=fields.layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=fields.initializer_range,
            bos_token_id=None,
            eos_token_id=None,
        )
        config.num_labels = 2
        return GPT2ForSequenceClassification(config)

    plain = {**_PLAIN, "optim": "adamw_torch", "max_grad_norm": 1.0, "warm_start": "none"}

    def load(folder: str) -> nn.Module:
        return load_model(folder, GPT2ForSequenceClassification)

    teacher = _teacher(
        "parity-transformer",
        fields,
        support,
        lambda: build(fields.teacher_heads, fields.teacher_seed),
        load,
        "sequence_classification",
        plain,
    )
    return System(
        recipe="parity-transformer",
        size=size,
        fields=fields,
        task="sequence_classification",
        metric="accuracy",
        better="higher",
        target=fields.target,
        arguments=plain,
        methods={"extraction": {"num_stages": fields.layers, **_stages(fields)}},
        make_teacher=_checked(teacher, fields, support, "sequence_classification"),
        make_student=lambda seeds: build(fields.student_heads, 31 + seeds[0]),
        train_data=lambda seeds, count: ParityData(fields.d, fields.k, count, seeds[0], support),
        eval_data=lambda seeds: ParityData(fields.d, fields.k, fields.eval_samples, seeds[0] + EVAL_SEED, support),
        collator=default_data_collator,
        stop_at_target=True,
        sketch_teacher=None if fields.teacher_path else lambda: build(fields.teacher_heads, fields.teacher_seed),
    )


def _load_network(folder: str) -> nn.Module:
    model = load_model(folder, AutoModel)
    if not isinstance(model, ParityMLP):
        raise UserError(f"teacher {folder!r} is a {type(model).__name__}, not a two-layer parity network")
    if model.config.replica_seeds is not None:
        raise UserError(f"teacher {folder!r} holds {len(model.config.replica_seeds)} replicas: give one network")
    return model


def _stages(fields: ParityFields) -> dict[str, Any]:
    steps = max(1, fields.stage_samples // fields.batch_size)
    return {"stage_steps": [steps], "stage_learning_rate": fields.stage_learning_rate}


def _teacher(
    name: str,
    fields: ParityFields,
    support: tuple[int, ...],
    build: Callable[[], nn.Module],
    load: Callable[[str], nn.Module],
    task: str,
    plain: dict[str, Any],
) -> Callable[[Path], Teacher]:
    """The trained teacher, or the one given by folder."""

    def make(_: Path) -> Teacher:
        if fields.teacher_path is not None:
            return Teacher(load(fields.teacher_path), {"description": f"given: {Path(fields.teacher_path).name}"})
        width = getattr(fields, "teacher_width", None) or getattr(fields, "teacher_heads", None)
        identity = {
            **{name: getattr(fields, name) for name in _OF_TEACHER if hasattr(fields, name)},
            "support": support,
            "width": width,
        }
        arguments = {
            **plain,
            "task": task,
            "learning_rate": fields.teacher_learning_rate,
            "per_device_train_batch_size": fields.teacher_batch_size,
            "seed": fields.teacher_seed,
            "train_sampling_strategy": "sequential",
        }
        rule = TeacherRule(
            "accuracy", 0.999, fields.teacher_factor, fields.teacher_max_samples, fields.teacher_checkpoint_every
        )

        def data(count: int) -> tuple[Any, Any]:
            seed = TEACHER_SEED + fields.teacher_seed
            train = ParityData(fields.d, fields.k, count, seed, support, fields.teacher_sparse_samples)
            return train, ParityData(fields.d, fields.k, fields.eval_samples, seed + EVAL_SEED, support)

        made = trained_teacher(name, identity, build, load, rule, arguments, data, default_data_collator)
        if not fields.teacher_sparse_samples:
            return made
        inputs = f"; inputs went from half sparse to uniform over its first {fields.teacher_sparse_samples:,} examples"
        described = {**made.metrics, "description": made.metrics["description"] + inputs}
        return dataclasses.replace(made, metrics=described)

    return make


def _checked(
    make: Callable[[Path], Teacher], fields: ParityFields, support: tuple[int, ...], task: str
) -> Callable[[Path], Teacher]:
    """Add the teacher's held-out accuracy, after checking that it is a teacher of this parity."""

    def checked(folder: Path) -> Teacher:
        teacher = make(folder)
        config: Any = teacher.model.config
        bits = getattr(config, "d", None) or getattr(config, "n_positions", None)
        if bits != fields.d:
            raise UserError(
                f"the teacher takes {bits} bits, the recipe has d={fields.d}: give the one or change the other"
            )
        data = ParityData(fields.d, fields.k, fields.eval_samples, EVAL_SEED + TEACHER_SEED + 1, support)
        batches = DataLoader(data, batch_size=512, collate_fn=default_data_collator)
        accuracy = evaluate_batches(teacher.model, batches, get_task(task))["accuracy"]
        if accuracy < 0.6:
            raise UserError(
                f"the teacher's accuracy on this parity (d={fields.d}, k={fields.k}, support {list(support)}) is "
                f"{accuracy:.3f}, which is chance: it was made for another one"
            )
        return dataclasses.replace(teacher, metrics={**teacher.metrics, "accuracy": accuracy})

    return checked
