"""What of an extraction is stored, and how."""

import copy
import dataclasses
import logging
from dataclasses import dataclass

from tutelage.core.blocks import FINAL, Place
from tutelage.core.errors import LARGEST, UserError, check_range, check_texts
from tutelage.runs.inputs import RunOptions
from tutelage.targets.folder import check_storable
from tutelage.targets.rows import DTYPES
from tutelage.tasks.loading import MOST_WIDTH
from tutelage.training.config import CurriculumConfig, option
from tutelage.training.saving import AUTO

_log = logging.getLogger(__name__)
# Outputs kept where nothing is given; the rest is merged into one bucket.
DEFAULT_TOP_K = 64


@dataclass(frozen=True)
class ExtractOptions:
    """What of a curriculum is stored, and how."""

    stages: list[str] | None = option(
        "Teacher blocks whose states are stored, e.g. 8 16 final (the state before the output head), where no student is "
        "chosen yet; needs projection_dim."
    )
    projection_dim: int | None = option(
        "Width of stored projections; default: the student's. Narrower students fit too."
    )
    dtype: str = option(f"Of hidden states: {', '.join(DTYPES)}.", "int8")
    shard_tokens: int = option("Tokens per file, about.", 1_000_000)
    devices: int = option("Devices that the student will train on, which divides the data among the stages.", 1)
    all_stages: bool = option("Store every row for every stage, for many epochs.", False)

    def __post_init__(self) -> None:
        check_texts(self)
        check_range("projection_dim", self.projection_dim, 1, MOST_WIDTH)
        for name in ("shard_tokens", "devices"):
            check_range(name, getattr(self, name), 1, LARGEST)
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}: use one of {', '.join(DTYPES)}")


def check_options(args: CurriculumConfig) -> None:
    """Raise UserError for settings that no extraction can have."""
    if args.curriculum_dir is not None:
        raise UserError("an extraction runs the teacher: leave curriculum_dir out")
    if args.value("method") not in ("extraction", "joint", "one_shot"):
        how = "extract with extraction, joint or one_shot"
        raise UserError(f"method {args.method!r} reads no finished teacher's states: {how}")
    check_storable(args)
    if args.warm_start not in (None, "none") and args.value("method") != "extraction":
        found = (
            f"warm_start={args.warm_start!r} is stored for hidden stages, which method {args.method!r} does not have"
        )
        raise UserError(f"{found}: leave warm_start out, or extract with extraction")
    for name in ("label_weight", "hidden_weight"):
        if getattr(args, name):
            raise UserError(f"{name} is chosen when a student is trained: leave it out of the extraction")
    if args.resume_from_checkpoint not in (None, AUTO):
        found = "an extraction always continues what is in output_dir"
        raise UserError(f"{found}: leave resume_from_checkpoint out, or choose a different output_dir")
    if args.overwrite_output_dir:
        raise UserError(
            "an extraction overwrites nothing: leave overwrite_output_dir out, and delete the folder yourself"
        )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise UserError(f"an extraction follows a random or sequential order, not {args.train_sampling_strategy!r}")


def choose_stages(
    run: RunOptions, args: CurriculumConfig, options: ExtractOptions
) -> tuple[RunOptions, CurriculumConfig]:
    """Stages that no student asked for: those of a student with a block for each. The arguments stay as they are."""
    stages, width = options.stages, options.projection_dim
    if stages is None:
        return run, args
    for name, value in (("student", run.student), ("layer_map", args.layer_map), ("num_stages", args.num_stages)):
        if value is not None:
            raise UserError(f"stages and {name} both say what is stored: leave one of them out")
    if width is None:
        what = "the hidden size of the widest student that you plan to train"
        raise UserError(f"`--stages` needs `--projection_dim`: {what}")
    if args.method == "one_shot":
        raise UserError(f"method {args.method!r} has no hidden stages: leave stages out")
    blocks = [stage for stage in stages if stage != FINAL]
    numbers = [int(block) if block.isdecimal() else 0 for block in blocks]
    increasing = all(first < second for first, second in zip([0, *numbers], numbers, strict=False))
    if not stages or not increasing or FINAL in stages[:-1]:
        what = f"teacher blocks from 1, each deeper than the one before, {FINAL} at most as the last"
        raise UserError(f"stages must be {what}, e.g. 8 16 {FINAL}; got {' '.join(stages)}")
    pairs: list[tuple[Place, Place]] = [(index + 1, number) for index, number in enumerate(numbers)]
    args = without_start(args, "stages are for students of several shapes")
    args.layer_map = pairs + [(FINAL, FINAL)] * (len(stages) - len(blocks))  # type: ignore[assignment]
    return dataclasses.replace(run, student=f"layers={max(1, len(blocks))},hidden_size={width}"), args


def without_start(args: CurriculumConfig, why: str) -> CurriculumConfig:
    """A copy of the settings for students that are not known yet, and so start from random weights.

    UserError, which says `why`, where they are to start from the teacher."""
    if args.student_init == "teacher":
        found = "student_init='teacher' stores the first weights of one student"
        raise UserError(f"{found}, but {why}: leave one of them out")
    if args.value("student_init") == "teacher":
        _log.warning("The extraction is for students that start from random weights: %s", why)
    args = copy.copy(args)
    args.student_init = "random"
    return args
