"""From settings as given to one frozen run: curriculum, batch size and budget."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import METHODS, RESIDUAL, Curriculum, extraction, joint, one_shot, progressive, scratch
from tutelage.core.errors import LARGEST, UserError, check_range
from tutelage.core.projection import LEARNED
from tutelage.core.stages import LayerMap, choose_blocks, parse_layer_map, uniform_layer_map
from tutelage.targets.folder import OF_THE_START
from tutelage.targets.source import FixedSettings, Reading
from tutelage.training.config import AFTER_START, PRESETS, CurriculumConfig

_SHARED = (
    *("projection_seed", "normalize", "residual_basis", "start_blocks"),
    *("output_loss", "output_positions", "temperature", "top_k"),
)
# settings that are not of a method
_OF_THE_RUN = ("learning_rate", "per_device_train_batch_size", "num_train_epochs", "teacher_checkpoints")
_WITH_TEACHER = ("extraction", "joint", "one_shot", "progressive")
# settings that only some methods read; one that the method does not read is refused
_READERS = {
    **dict.fromkeys(["stage_fraction", "stage_steps", "stage_learning_rate", "stage_trains"], ("extraction",)),
    **dict.fromkeys(["layer_map", "num_stages"], ("extraction", "joint")),
    **dict.fromkeys(["projection", "projection_seed", "normalize"], ("extraction", "joint")),
    "hidden_weight": ("joint",),
    "teacher_checkpoints": ("progressive",),
    **dict.fromkeys(["warm_start", "label_weight"], _WITH_TEACHER),
    **dict.fromkeys(["output_loss", "output_positions", "temperature", "top_k"], _WITH_TEACHER),
}


@dataclass(frozen=True)
class ResolvedRun:
    """What a run does, with nothing left open."""

    curriculum: Curriculum
    reading: Reading  # batch size, devices and data order
    calibration_samples: int

    def arguments(self, args: CurriculumConfig) -> CurriculumConfig:
        """A copy of `args` with what was resolved filled in, for the trainer; `args` stays as it is."""
        filled = copy.copy(args)
        filled._n_gpu = min(1, args.n_gpu)
        filled.per_device_train_batch_size = self.reading.batch_size
        filled.max_steps = self.curriculum.total_steps
        for name in ("num_train_epochs", "learning_rate", "warmup_steps"):
            setattr(filled, name, args.value(name))
        filled.calibration_samples = self.calibration_samples
        return filled


def resolve(
    args: CurriculumConfig,
    blocks: tuple[int, int | None],
    fixed: FixedSettings,
    rows: int | None,
    warm_start: str,
    curriculum: Curriculum | None = None,
    devices: int | None = None,
) -> ResolvedRun:
    """Decide everything that was left open.

    Args:
        args: the settings as given.
        blocks: L_S and L_T; None without a teacher.
        fixed: what the target source decides.
        rows: training examples; None where the number is unknown.
        warm_start: `Task.warm_start`.
        curriculum: stages of the user's own, instead of those of `args`.
        devices: that the student trains on; None is those of this run.

    Raises:
        UserError: a setting that contradicts the source (also where it is the default), or no curriculum can be built."""
    if fixed.values.get("projection") == RESIDUAL and args.value("method") not in _READERS["projection"]:
        values = {name: value for name, value in fixed.values.items() if name not in OF_THE_START}
        fixed = dataclasses.replace(fixed, values=values)
    check_made(fixed.where, fixed.values, args)
    reading = _reading(args, fixed, devices or args.world_size)
    if curriculum is None:
        steps = _budget(args, fixed, reading, rows)
        curriculum = build_curriculum(args, blocks, steps, warm_start, fixed)
    samples = fixed.values.get("calibration_samples", args.value("calibration_samples"))
    return ResolvedRun(curriculum, reading, samples)


def default_method(args: CurriculumConfig, usual: str) -> str:
    """The method of a student with trained weights, where none is given: `usual`, or the one that an option asks for which
    `usual` does not read, unless the option says what holds without stages too."""
    without = {"warm_start": "none", "stage_trains": "up_to", "normalize": "standardize", "projection_seed": 0}
    readers = {**_READERS, "warm_start": ("extraction",)}
    asked = (
        methods[0]
        for name, methods in readers.items()
        if usual not in methods and getattr(args, name) not in (None, without.get(name))
    )
    return next(asked, usual)


def check_made(where: str, made: Mapping[str, Any], settings: object) -> None:
    """Raise UserError where one of `settings` is given and is not what an extracted curriculum was made with."""
    for name, value in made.items():
        given = getattr(settings, name)
        if given is not None and given != value:
            what = f"{where} was made with {name}={value}, but {name}={given} was given"
            raise UserError(f"{what}: leave {name} out, or extract again")


def deviations(args: CurriculumConfig, curriculum: Curriculum) -> dict[str, Any]:
    """Settings of the method in which a run differs from its preset: given, or decided by teacher or extracted curriculum."""
    preset, found = PRESETS[args.preset], {}
    if curriculum.student_init == "teacher" == preset["student_init"]:
        preset = {**preset, **AFTER_START, "warm_start": "none"}
    for name in dict.fromkeys([*preset, *_READERS, *_SHARED, "embedding_loss", "disable_dropout"]):
        value = getattr(args, name)
        # a preset leaves the basis to the widths, the blocks to the family, and it may leave the warm start to the layer map
        if name in preset or name not in ("warm_start", "residual_basis", "start_blocks"):
            value = getattr(curriculum, name, value)
        expected = preset.get(name, getattr(CurriculumConfig, name))
        read = name != "normalize" or curriculum.projection != RESIDUAL
        if read and name not in _OF_THE_RUN and value not in (None, expected):
            found[name] = value
    return found


def _reading(args: CurriculumConfig, fixed: FixedSettings, devices: int) -> Reading:
    """Batch size, devices and data order."""
    micro_batches = args.gradient_accumulation_steps * devices
    size = args.value("per_device_train_batch_size")
    if args.per_device_train_batch_size is None and fixed.step_examples is not None:
        fitting, rest = divmod(fixed.step_examples, micro_batches)
        size = size if rest else fitting  # as many examples per step as were counted when the data was divided
    return Reading(size * micro_batches, size, devices, args.order_seed)


def _budget(args: CurriculumConfig, fixed: FixedSettings, reading: Reading, rows: int | None) -> int:
    """Optimiser steps of the whole curriculum."""
    if args.max_steps <= 0 and args.num_train_epochs is None and fixed.output_steps is not None:
        pairs = _fixed_layer_map(args, fixed)
        places = [theirs for _, theirs in pairs] if pairs else list(fixed.hidden_steps)
        return fixed.output_steps + sum(fixed.hidden_steps.get(place, 0) for place in places)
    if args.max_steps > 0:
        return args.max_steps
    rows = rows if fixed.rows is None else fixed.rows
    if rows is None:
        raise UserError("the budget is unknown: set max_steps, or num_train_epochs with a sized train_dataset")
    size = reading.batch_size * reading.devices
    batches = rows // size if args.dataloader_drop_last else math.ceil(rows / size)
    # as transformers counts: an epoch's last step may have fewer micro-batches
    steps_per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = math.ceil(args.value("num_train_epochs") * steps_per_epoch)
    check_range("the number of optimiser steps of num_train_epochs", steps, 1, LARGEST)
    return steps


def _fixed_layer_map(args: CurriculumConfig, fixed: FixedSettings) -> LayerMap | None:
    """The source's layer map, where the run leaves the choice to it."""
    stages = bool(fixed.hidden_steps)  # whether the pairs of places are stages, or parts of a joint one
    fits = args.value("method") == ("extraction" if stages else "joint")
    open_choice = fits and args.layer_map is None and args.num_stages is None
    return fixed.layer_map if open_choice else None


def build_curriculum(
    args: CurriculumConfig,
    blocks: tuple[int, int | None],
    steps: int,
    default_warm_start: str = "head",
    fixed: FixedSettings = FixedSettings(),  # noqa: B008 (frozen)
) -> Curriculum:
    """The curriculum that settings describe, of `steps` optimiser steps; arguments and errors as in `resolve`.

    `default_warm_start` is that of extraction where neither blocks nor `warm_start` are given."""
    method, (student_blocks, teacher_blocks) = args.value("method"), blocks
    settings = shared_settings(args, blocks, fixed)
    starts_there = settings["student_init"] == "teacher"
    default_warm_start = "none" if starts_there or settings["projection"] == LEARNED else default_warm_start
    if method == "scratch" and starts_there:
        found = "student_init='teacher' needs a teacher, but method 'scratch' has none"
        raise UserError(f"{found}: use student_init='random', or another method")
    if method == "scratch":
        return scratch(steps, **settings)
    if teacher_blocks is None:
        raise UserError(f"method {method!r} needs a teacher: pass teacher_model (or use method='scratch')")
    if method == "one_shot":
        return one_shot(steps, label_weight=args.label_weight, **settings)
    if method == "progressive":
        return progressive(steps, args.teacher_checkpoints or [], label_weight=args.label_weight, **settings)
    chosen = _fixed_layer_map(args, fixed)
    layer_map = _layer_map(args, (student_blocks, teacher_blocks), chosen, settings["start_blocks"])
    if method == "joint":
        weights = {"hidden_weight": args.value("hidden_weight"), "label_weight": args.label_weight}
        return joint(student_blocks, teacher_blocks, steps, layer_map=layer_map, **weights, **settings)
    pairs = None if isinstance(layer_map, int) else layer_map
    warm_start = _warm_start(args, pairs, default_warm_start, fixed)
    if pairs is None and "head" in warm_start:
        # a transplanted head needs the stage that teaches its input; uniform stages come before it if asked for
        before = [] if args.num_stages is None else uniform_layer_map(student_blocks, teacher_blocks, args.num_stages)
        layer_map = [*before, (FINAL, FINAL)]
    return extraction(
        student_blocks,
        teacher_blocks,
        steps,
        layer_map=layer_map,
        stage_steps=_stage_steps(args, fixed, chosen),
        stage_learning_rate=args.stage_learning_rate,
        label_weight=args.label_weight,
        stage_trains=args.stage_trains or fixed.stage_trains or args.value("stage_trains"),
        **{**settings, "warm_start": warm_start},
    )


def shared_settings(
    args: CurriculumConfig,
    blocks: tuple[int, int | None],
    fixed: FixedSettings = FixedSettings(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """The fields of a curriculum that do not depend on the method; `warm_start` is that of methods without hidden stages."""
    settings = {name: fixed.values.get(name, args.value(name)) for name in _SHARED}
    settings["student_init"] = fixed.values.get("student_init", args.student_init or "random")
    if (choice := settings["start_blocks"]) is not None:
        student_blocks, teacher_blocks = blocks
        chosen = settings["student_init"] == "teacher"
        settings["start_blocks"] = choose_blocks(choice, student_blocks, teacher_blocks or 0) if chosen else None
    presets = AFTER_START if settings["student_init"] == "teacher" else PRESETS[args.preset]
    settings["projection"] = fixed.values.get("projection", args.projection or presets["projection"])
    settings["warm_start"] = args.value("warm_start") or "none"
    _check_read(args, settings)
    return settings


def _layer_map(
    args: CurriculumConfig, blocks: tuple[int, int], chosen: LayerMap | None, start_blocks: Sequence[int] | None
) -> LayerMap | int | None:
    """The layer map that is given or `chosen` by the source; without one, the blocks that the student starts from; else the
    number of stages of the uniform map, if given."""
    layer_map = parse_layer_map(args.layer_map) if isinstance(args.layer_map, str) else args.layer_map or chosen
    if layer_map is not None and args.num_stages is not None:
        raise UserError("layer_map and num_stages both say which hidden stages there are: give one of them")
    if layer_map is None and start_blocks is not None:
        return [(mine, start_blocks[int(mine) - 1]) for mine, _ in uniform_layer_map(*blocks, args.num_stages)]
    return args.num_stages if layer_map is None else layer_map


def _check_read(args: CurriculumConfig, settings: Mapping[str, Any]) -> None:
    """Raise UserError for settings that are given, and that neither the method nor the student's start reads."""
    method, preset, neutral = args.value("method"), PRESETS[args.preset], {"label_weight": 0.0, "warm_start": "none"}
    read = _read_by_start(settings)
    unread = [
        name
        for name, methods in _READERS.items()
        if method not in methods and name not in read
        if getattr(args, name) not in (None, preset.get(name), neutral.get(name))
    ]
    if unread:
        common = [each for each in METHODS if all(each in _READERS[name] for name in unread)]
        other = f", or use method {' or '.join(common)}" if common else ""
        how = f"leave {'it' if len(unread) == 1 else 'them'} out{other}"
        raise UserError(f"method {method!r} does not read {' and '.join(unread)}: {how}")
    residual = method in _READERS["projection"] and settings["projection"] == RESIDUAL
    if residual and args.normalize not in (None, preset["normalize"]):
        what = "projection='residual' does not read normalize: its targets keep the scale of the student's own states"
        raise UserError(f"{what}; leave normalize out, or use another projection")
    unread = [name for name in ("residual_basis", "start_blocks") if getattr(args, name) is not None]
    if unread and settings["student_init"] != "teacher":
        what = f"a student that starts from random weights does not read {' and '.join(unread)}"
        raise UserError(f"{what}: leave {'it' if len(unread) == 1 else 'them'} out, or use student_init='teacher'")


def _read_by_start(settings: Mapping[str, Any]) -> set[str]:
    """What the first weights of a student are made with, whatever the method."""
    read = {"projection", "normalize"} if "head" in settings["warm_start"] else set()  # a transplant has a target map
    seeded = settings["warm_start"] != "none" or settings["residual_basis"] == "random"
    return read | {"projection_seed"} if seeded else read


def _warm_start(
    args: CurriculumConfig, layer_map: LayerMap | None, default_warm_start: str, fixed: FixedSettings
) -> str:
    if args.warm_start is not None:
        return args.warm_start
    if fixed.warm_start is not None:
        ends_at_final = bool(layer_map) and tuple(layer_map[-1]) == (FINAL, FINAL)  # type: ignore[index]
        return fixed.warm_start if ends_at_final else "none"
    if (chosen := args.value("warm_start")) is not None:
        return chosen
    chosen_blocks = args.num_stages is not None or (layer_map is not None and (FINAL, FINAL) not in layer_map)
    return "none" if chosen_blocks else default_warm_start


def _stage_steps(args: CurriculumConfig, fixed: FixedSettings, chosen: LayerMap | None) -> float | int | Sequence[int]:
    """Steps of the hidden stages: as given; those of the source where its stages and budget are taken; else a fraction."""
    if args.stage_steps is not None:
        return args.stage_steps[0] if len(args.stage_steps) == 1 else args.stage_steps
    own_budget = args.max_steps > 0 or args.num_train_epochs is not None
    if chosen and args.stage_fraction is None and not own_budget:
        return [fixed.hidden_steps[place] for _, place in chosen]
    return args.value("stage_fraction")
