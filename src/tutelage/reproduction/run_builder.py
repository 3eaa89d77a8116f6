"""Settings, curricula and trainers of the runs of a comparison."""

import copy
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, TrainerCallback

from tutelage.core.blocks import find_blocks
from tutelage.core.curriculum import Curriculum
from tutelage.core.stages import OutputStage
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.schedules import build_curriculum
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.variants import PROGRESSIVE, Candidate, Variant
from tutelage.targets.live import LiveTargets
from tutelage.targets.memory import OUTPUT, StateMemory
from tutelage.tasks.registry import get_task
from tutelage.training import warm_start
from tutelage.training.config import CurriculumConfig
from tutelage.training.objective import StageObjective
from tutelage.training.preparation import decide_start, with_basis
from tutelage.training.trainer import CurriculumTrainer


@dataclass(frozen=True)
class RunBuilder:
    """Builds what a run needs from a variant and a candidate; the rest is equal for all."""

    recipe: Recipe
    teacher: Teacher
    root: Path  # folder of the comparison
    timed: bool = True  # whether the seconds of its runs are compared

    @property
    def memory(self) -> Path:
        """Folder of the teacher's states: most runs of a seed have the same batches."""
        return self.root / "states"

    def keeps_states(self, tuning: bool) -> bool:
        """Whether a run reads the teacher's states where an earlier one computed them: where seconds are compared, only runs
        for tuning do."""
        return tuning or not self.timed

    def folder(self, variant: Variant, candidate: Candidate, seeds: Sequence[int], what: str = "runs") -> Path:
        """Folder of a run; variants of one name and different settings have different folders."""
        settings = [variant.name, variant.method, dict(variant.overrides), variant.budget_fraction, variant.match]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
        name = re.sub(r"[^a-z0-9_.=-]+", "-", variant.name.lower())[:60]
        seed = "-".join(map(str, seeds))
        return self.root / what / f"{name}-{digest}" / f"{candidate.label.replace(' ', '-')}-seed-{seed}"

    def arguments(self, variant: Variant, candidate: Candidate, folder: Path, seed: int) -> CurriculumConfig:
        """Settings of a run."""
        recipe = self.recipe
        every = max(1, recipe.eval_every // recipe.batch_size)
        fields = {
            **{"output_dir": str(folder), "method": variant.method, "task": recipe.task},
            **{"learning_rate": candidate.learning_rate, "seed": seed, "data_seed": seed},
            **{"per_device_train_batch_size": recipe.batch_size, "train_sampling_strategy": "sequential"},
            **{"eval_strategy": "steps", "eval_steps": every, "eval_on_start": True},
            **{"save_strategy": "steps", "save_steps": 20 * every, "save_total_limit": 1},
            **{"logging_steps": every, "disable_tqdm": True, "report_to": "none"},
            **recipe.arguments(),
            **recipe.method_arguments(variant.method),
        }
        own = {**variant.overrides, **candidate.settings}
        if "layer_map" in own:  # it takes the place of the recipe's uniform one
            fields.pop("num_stages", None)
        if "num_stages" in own:
            fields.pop("layer_map", None)
        fields |= {key: value for key, value in own.items() if key not in PROGRESSIVE}
        return CurriculumConfig(**fields)

    def check(self, variant: Variant, candidate: Candidate) -> None:
        """Raise UserError where a candidate of a variant has no curriculum on this recipe, before anything is run."""
        student, source = self._models
        source.attach(self.curriculum(variant, candidate, self.steps(variant.budget_fraction)), student)
        warm_start.check(StageObjective(student, source))

    def steps(self, fraction: float = 1.0) -> int:
        """Optimiser steps of `fraction` times the budget."""
        return max(1, int(self.recipe.budget_samples * fraction) // self.recipe.batch_size)

    def curriculum(self, variant: Variant, candidate: Candidate, steps: int) -> Curriculum:
        """Curriculum of a run of `steps` optimiser steps."""
        args = decide_start(self.arguments(variant, candidate, self.root, 0), *self._models)
        size, (student, source) = self.recipe.batch_size, self._models
        settings = {**variant.overrides, **candidate.settings}
        curriculum = build_curriculum(args, settings, self._blocks, self.teacher, steps, size)
        return with_basis(curriculum, source.task, [student, source.model])

    @functools.cached_property
    def students_have_seeds(self) -> bool:
        """Whether the random matrices of a student are drawn from its own seed, as those of students side by side are."""
        student, source = self._models
        return source.task.replica_seeds(student) is not None

    @functools.cached_property
    def _blocks(self) -> tuple[int, int]:
        """Numbers of blocks of student and teacher."""
        student, source = self._models
        return len(find_blocks(source.task.backbone(student))), len(source.block_names)

    @functools.cached_property
    def _models(self) -> tuple[nn.Module, LiveTargets]:
        """A student, and its teacher."""
        return self.recipe.make_student(self.recipe.seeds[:1]), LiveTargets(
            self.teacher.model, get_task(self.recipe.task)
        )

    def trainer(
        self,
        args: CurriculumConfig,
        seeds: Sequence[int],
        curriculum: Curriculum,
        callbacks: Sequence[TrainerCallback] = (),
        tuning: bool = False,
    ) -> CurriculumTrainer:
        """The trainer of a run; one for `tuning` is evaluated on other held-out data."""
        recipe, teacher = self.recipe, self.teacher.model
        # progressive distillation changes the teacher's weights; a run that ends early must not leave them changed
        if any(isinstance(stage, OutputStage) and stage.teacher_checkpoint for stage in curriculum.stages):
            teacher = copy.deepcopy(teacher)
        needs_teacher = any(stage.needs_teacher for stage in curriculum.stages)
        source: Any = teacher if needs_teacher else None
        if needs_teacher and self.keeps_states(tuning):
            # the hidden states of many replicas of a shallow network are larger than what computing them costs
            memory = StateMemory(self.memory, (OUTPUT,) if recipe.replicated else None)
            source = LiveTargets(teacher, get_task(recipe.task), memory=memory)
        trainer = CurriculumTrainer(
            model=recipe.make_student(seeds),
            teacher_model=source,
            args=args,
            train_dataset=recipe.train_data(seeds, curriculum.total_steps * recipe.batch_size),
            eval_dataset=recipe.eval_data(seeds, tuning),
            processing_class=recipe.tokenizer,
            data_collator=recipe.collator,
            curriculum=curriculum,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer
