"""Targets from a live, frozen teacher.
Shapes: B batch, T positions, D teacher width, E embedding width, V outputs."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from tutelage.core.blocks import FINAL, Place, find_blocks
from tutelage.core.curriculum import RESIDUAL, Curriculum
from tutelage.core.errors import UserError
from tutelage.core.forward import watched
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import batch_positions, model_inputs, position_mask, text_config
from tutelage.core.learned import LearnedMap
from tutelage.core.processes import Group
from tutelage.core.projection import LEARNED, check_widening
from tutelage.core.stages import HiddenStage, JointStage, LayerMap, OutputStage, choose_blocks, parse_layer_map
from tutelage.core.standardize import Standardizer
from tutelage.targets.checkpoints import check_checkpoint, load_checkpoint
from tutelage.targets.identity import model_hash
from tutelage.targets.maps import (
    Calibration,
    TargetMap,
    Widths,
    calibrate,
    learned_map,
    load_target_maps,
    random_projection,
    save_target_maps,
    width_at,
)
from tutelage.targets.memory import OUTPUT, StateMemory
from tutelage.targets.source import STREAMED, Batches, Device, HiddenTarget, StatisticsFile, TargetSource
from tutelage.tasks.base import Batch, OutputTarget, Task
from tutelage.tasks.initialization.families import usual_blocks
from tutelage.tasks.initialization.student import Initialized, check_start, start_student
from tutelage.tasks.loading import count_parameters
from tutelage.tasks.registry import detect_task


@final
class LiveTargets(TargetSource):
    """A teacher in memory; its parameters are frozen and it is put into evaluation mode.

    `task` None finds it from the model's class; `container` names the list of blocks where `find_blocks` finds several. With a
    `memory`, states of batches that were seen before are read from it; FLOPs are counted as if they were not."""

    can_start = True

    def __init__(
        self,
        model: nn.Module,
        task: Task | None = None,
        container: str | None = None,
        memory: StateMemory | None = None,
    ):
        super().__init__(task or detect_task(model))
        self.memory = memory
        self.model = model.eval().requires_grad_(False)
        self.backbone, self.container = self.task.backbone(model), container
        self.block_names = find_blocks(self.backbone, container)
        self.start_blocks = usual_blocks(getattr(text_config(getattr(self.backbone, "config", None)), "model_type", ""))
        self.blocks = len(self.block_names)
        self.parameters, self.models = count_parameters(model), (model,)
        self._student: nn.Module | None = None
        self._checkpoint: str | None = None
        # on the CPU, while a checkpoint is in the place of the finished weights
        self._finished: dict[str, torch.Tensor] | None = None

    def states(self, place: Place, batch: Mapping[str, Any]) -> torch.Tensor:
        """Hidden state at `place`, (B, T, D) or pooled (B, D); nothing deeper is run."""
        return self._run(str(place), batch, lambda: self.task.state_at(self.model, place, batch, self.block_names))

    def whole_output(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The whole model's output: an embedding model's pooled embedding, (B, E), or logits, (..., V)."""
        return self._run(OUTPUT, batch, lambda: self.task.whole_output(self.model, batch))

    @contextmanager
    def computing(self) -> Iterator[None]:
        memory, self.memory = self.memory, None
        try:
            yield
        finally:
            self.memory = memory

    def _run(self, name: str, batch: Mapping[str, Any], run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What a forward of the teacher gives, without gradients; from the memory where it has that."""
        with _without_gradients():
            if self.memory is None or not self.memory.keeps(name):
                return _beside(batch, run())
            checkpoint = "finished" if self._checkpoint is None else Path(self._checkpoint).name
            return _beside(batch, self.memory.recall(f"{checkpoint}/{name}", batch, run))

    def attach(self, curriculum: Curriculum, student: nn.Module, outputs: int | None = None) -> None:
        for stage in curriculum.stages:
            if isinstance(stage, OutputStage) and stage.teacher_checkpoint is not None:
                check_checkpoint(self.model, stage.teacher_checkpoint)
        check_widths(curriculum, self.task.widths(student, curriculum.places("student")), self.widths(curriculum))
        if curriculum.student_init == "teacher":
            check_start(student, self.model, self.task, curriculum, self.container)
        super().attach(curriculum, student, outputs)
        self._student = student

    def widths(self, curriculum: Curriculum) -> Widths:
        """The teacher's widths at the places of a curriculum."""
        return self.task.widths(self.model, curriculum.places("teacher"))

    @property
    def output_count(self) -> int | None:
        return self.task.output_count(self.model)

    @property
    def output_names(self) -> tuple[str, ...] | None:
        return self.task.output_names(getattr(self.backbone, "config", None))

    def identity(self) -> dict[str, str]:
        return {"teacher": model_hash(self.model, values_per_tensor=16)[:16]}

    def stage_states(self, stage: HiddenStage, batch: Mapping[str, Any]) -> torch.Tensor:
        """The teacher's states that a hidden stage is made from."""
        return self.task.stage_state(stage, self.states(stage.teacher_place, batch), dict(batch))

    def hidden(self, index: int, batch: Batch) -> HiddenTarget:
        stage = self.stage(index)
        assert isinstance(stage, HiddenStage)
        with _without_gradients():
            hidden = self.stage_states(stage, batch)
        return self._target(self.pair_numbers[index][0], hidden, batch)

    def joint(self, index: int, batch: Batch) -> tuple[list[HiddenTarget], OutputTarget]:
        """All from one forward of the teacher."""
        pairs = self.stage(index).pairs
        places = [pair.teacher_place for pair in pairs]
        if self.memory is not None and all(map(self.memory.keeps, map(str, places))):
            states, output = {place: self.states(place, batch) for place in places}, self.output(batch)
        else:
            with self.computing(), self.task.watched(self.model, places, self.block_names) as states:
                output = self.output(batch)
        targets = []
        for number, pair in zip(self.pair_numbers[index], pairs, strict=True):
            with _without_gradients():
                hidden = self.task.stage_state(pair, _beside(batch, states[pair.teacher_place]), batch)
            targets.append(self._target(number, hidden, batch))
        return targets, output

    def _target(self, number: int, hidden: torch.Tensor, batch: Batch) -> HiddenTarget:
        assert number < len(self.maps), "prepare the target maps first"
        target_map = self.maps[number]
        with _without_gradients():
            target = target_map(hidden)
            keep = position_mask(batch, hidden) & target_map.standardizer.keep(hidden)
        # autograd saves the mask, which it refuses for a tensor made in inference mode; the target it need not save
        return target, keep.clone()

    def output(self, batch: Batch) -> OutputTarget:
        if self.task.splits_head:
            state = self._run(OUTPUT, batch, lambda: self.task.output_state(self.model, batch))
            return OutputTarget(state=state, head=self.output_head())
        return OutputTarget(whole=self.whole_output(batch).clone())

    def output_head(self) -> OutputHead | None:
        return self.task.output_head(self.model, self.outputs)

    def embedding(self) -> torch.Tensor:
        weight: torch.Tensor = self.backbone.get_input_embeddings().weight  # type: ignore[operator]
        return weight

    def check_start(
        self,
        student: nn.Module,
        basis: str | None = None,
        layer_map: LayerMap | str | None = None,
        start_blocks: str | None = None,
    ) -> None:
        pairs = parse_layer_map(layer_map) if isinstance(layer_map, str) else layer_map
        stage = JointStage(1, tuple(pairs)) if pairs else OutputStage(1)
        chosen = None
        if start_blocks is not None:
            blocks = find_blocks(self.task.backbone(student), self.container)
            chosen = choose_blocks(start_blocks, len(blocks), len(self.block_names))
        start = Curriculum("start", (stage,), residual_basis=basis, start_blocks=chosen)
        check_start(student, self.model, self.task, start, self.container)

    def start(self, student: nn.Module, batches: Batches) -> Initialized | None:
        curriculum = self.curriculum
        assert curriculum is not None
        if curriculum.student_init == "teacher":
            self.started = start_student(student, self.model, self.task, batches(), curriculum, self.container)
        return self.started

    def prepare(self, file: StatisticsFile, batches: Batches, device: Device, width: int | None = None) -> None:
        curriculum, student = self.curriculum, self._student
        assert curriculum is not None and student is not None and self.blocks is not None
        if not curriculum.calibrated_pairs:
            return
        widths = self.task.widths(student, curriculum.places("student")) if width is None else width
        replicas, blocks, self.calibrated = self.task.replica_seeds(student), self.blocks, {}
        group = Group.of_all(device) if file.shared else Group()
        if (found := group.first(file.found)) is not None:
            maps = group.first(lambda: load_target_maps(found, curriculum, widths, blocks, replicas))
        else:
            if file.read and curriculum.projection == RESIDUAL and self.started is None:
                self._restart(student, file, batches)
            transplants = curriculum.transplants
            centers = not transplants or self.task.head_has_bias(student)
            head = self.output_head() if self.task.splits_head else None
            self.calibrated = dict.fromkeys(range(len(curriculum.calibrated_pairs)), 0)
            calibration = Calibration(widths, replicas, centers, transplants, head, self.started, self._all_states)
            maps = calibrate(self._counted_states, curriculum, batches(), blocks, calibration, group)
            self.calibrated = {index: sum(group.gather(count)) for index, count in self.calibrated.items()}
        if file.write and found != file.path:
            save_target_maps(maps, file.path, file.run)
        self.maps = [target_map.to(device) for target_map in maps]

    def _restart(self, student: nn.Module, file: StatisticsFile, batches: Batches) -> None:
        """The residual basis of a run that is resumed without its statistics: the one that the start gave, which depends on
        the teacher and the calibration text alone. The student keeps what it has learnt."""
        places = " or ".join(repr(str(path.parent)) for path in file.places)
        lost = f"{file.path.name} of this run is not in {places}"
        if file.run.get("data") == STREAMED:
            found = f"{lost}, and its residual basis cannot be computed again from a stream, whose rows may differ"
            raise UserError(f"{found}: put the file there, or start a new run")
        how = "residual basis and statistics are computed again from the calibration text"
        warnings.warn(f"{lost}: {how}", stacklevel=2)
        self.start(copy.deepcopy(student), batches)

    def _all_states(self, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        """The states of all hidden stages, from one forward up to the deepest place."""
        assert self.curriculum is not None
        stages = self.curriculum.hidden_stages
        self.calibrated[len(stages) - 1] += batch_positions(batch)
        places = {stage.teacher_place for stage in stages}
        *shallow, deepest = sorted(places, key=lambda place: math.inf if place == FINAL else place)
        with self.computing(), watched(self.backbone, shallow, self.block_names) as states:
            last = self.states(deepest, batch)
        states[deepest] = last
        return [
            self.task.stage_state(stage, _beside(batch, states[stage.teacher_place]), dict(batch)) for stage in stages
        ]

    def _counted_states(self, stage: HiddenStage, batch: Mapping[str, Any]) -> torch.Tensor:
        assert self.curriculum is not None
        self.calibrated[self.curriculum.calibrated_pairs.index(stage)] += batch_positions(batch)
        return self.stage_states(stage, batch)

    def draw_maps(self) -> None:
        """Maps of the right shapes without a calibration pass, to count operations with."""
        assert self.curriculum is not None and self.blocks is not None and self._student is not None
        self.maps = []
        for stage in self.curriculum.hidden_stages:
            mine = self.task.width(self.model, stage.teacher_place)
            widths = (mine, self.task.width(self._student, stage.student_place))
            learns = self.curriculum.projection == LEARNED
            projection = None if learns else random_projection(self.curriculum, stage, widths, self.blocks)
            self.maps.append(TargetMap(Standardizer.identity(mine), projection))

    def learned_maps(self) -> list[LearnedMap]:
        curriculum, student = self.curriculum, self._student
        if curriculum is None or student is None or curriculum.projection != LEARNED:
            return []
        task, replicas, blocks = self.task, self.task.replica_seeds(student), len(self.block_names)
        return [
            learned_map(curriculum, pair, (mine, theirs), blocks, replicas)
            for pair in curriculum.hidden_stages
            for mine, theirs in [(task.width(student, pair.student_place), task.width(self.model, pair.teacher_place))]
        ]

    def make_view(self, index: int, batch: Batch) -> None:
        stage = self.stage(index)
        if stage.needs_teacher:
            place = stage.teacher_place if isinstance(stage, HiddenStage) else FINAL
            self.task.make_view(self.model, place, batch, self.block_names)

    def use_checkpoint(self, folder: str | None) -> None:
        if folder == self._checkpoint:
            return
        if folder is None:
            self._load_finished()
            self._finished = None
        else:
            if self._finished is None:
                self._finished = _copies(self.model)
            load_checkpoint(self.model, folder)
        self._checkpoint = folder

    def _load_finished(self) -> None:
        assert self._finished is not None
        self.model.load_state_dict(self._finished)

    @contextmanager
    def finished(self) -> Iterator[None]:
        if self._checkpoint is None:
            yield
            return
        self._load_finished()
        try:
            yield
        finally:
            load_checkpoint(self.model, self._checkpoint)

    def to(self, device: torch.device | str) -> None:
        if not hasattr(self.model, "hf_device_map"):
            self.model.to(device)

    @property
    def columns(self) -> tuple[str, ...]:
        taken = model_inputs(self.model, dict.fromkeys(["token_type_ids", "attention_mask"]))
        return tuple(name for name in taken if name != "use_cache")


def _without_gradients() -> Any:
    """Inference mode, which the compiler cannot trace, or its nearest relative that it can."""
    return torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode()


def _beside(batch: Mapping[str, Any], output: torch.Tensor) -> torch.Tensor:
    """An output on the device of its batch: a teacher may span devices."""
    return output.to(batch["input_ids"].device) if "input_ids" in batch else output


def _copies(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's state on the CPU; entries that share their storage share the copy."""
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    for tensor in (state := model.state_dict()).values():
        if (key := _place(tensor)) not in copies:
            copies[key] = tensor.to("cpu", copy=True)
    return {name: copies[_place(tensor)] for name, tensor in state.items()}


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def check_widths(curriculum: Curriculum, student: Widths, teacher: Widths) -> None:
    """Refuse a projection that cannot map the teacher's width to the student's."""
    for stage in curriculum.calibrated_pairs:
        widths = width_at(teacher, stage.teacher_place), width_at(student, stage.student_place)
        check_widening(curriculum.projection, *widths)
