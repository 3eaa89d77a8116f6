"""How progressive distillation uses the checkpoints of the teacher's training (arXiv:2410.05464).

The schedule is `two` (one checkpoint for some samples, then the finished teacher), one of the paces (every checkpoint for as
long as the teacher needed to get there, or for a half or a quarter of that), `even` (every checkpoint and the finished teacher
for equal shares of the run) or `half` (every checkpoint for equal shares of the first half of the run)."""

from collections.abc import Mapping
from typing import Any

from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError, check_range
from tutelage.core.stages import OutputStage
from tutelage.reproduction.search import Axis
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.variants import SHARES
from tutelage.training.config import CurriculumConfig
from tutelage.training.resolution import build_curriculum as method_curriculum
from tutelage.training.resolution import shared_settings


def axes(teacher: Teacher, phase_samples: int, schedules: tuple[str, ...]) -> dict[str, Axis]:
    """What is searched for progressive distillation; `phase_samples` is tried first."""
    if not teacher.checkpoints:
        return {}
    middle = _transition(teacher)
    schedule = {"schedule": Axis(schedules, ordered=False)}
    phase = {
        "phase_samples": Axis(
            (max(1, phase_samples // 2), phase_samples, 2 * phase_samples), start=phase_samples, grows=True
        ),
        "checkpoint": Axis(tuple(range(-middle, len(teacher.checkpoints) - middle)), start=0),
    }
    # language has trials for little else; on parity a pace must be better than a phase of the right length
    return {**schedule, **phase} if schedules == SHARES else {**phase, **schedule}


def _transition(teacher: Teacher) -> int:
    return len(teacher.checkpoints) // 2 if teacher.transition is None else teacher.transition


def clean(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that the schedule does not use."""
    paced = settings.get("schedule", "two") != "two"
    return {name: value for name, value in settings.items() if not paced or name not in ("checkpoint", "phase_samples")}


def within(settings: Mapping[str, Any], teacher: Teacher) -> dict[str, Any]:
    """The settings with the nearest checkpoint that there is, where they were chosen with a teacher that has more of them."""
    if "checkpoint" not in settings or not teacher.checkpoints:
        return dict(settings)
    last = len(teacher.checkpoints) - 1
    place = min(max(_transition(teacher) + settings["checkpoint"], 0), last)
    return {**settings, "checkpoint": place - _transition(teacher)}


def build_curriculum(
    args: CurriculumConfig,
    settings: Mapping[str, Any],
    blocks: tuple[int, int],
    teacher: Teacher,
    steps: int,
    batch_size: int,
) -> Curriculum:
    """The curriculum of a run of `steps` steps of `batch_size` examples.

    `blocks` are the numbers of blocks of student and teacher. Progressive distillation uses the schedule in `settings` and the
    teacher's checkpoints.

    Raises UserError: progressive without checkpoints, a checkpoint that there is not, a phase that takes all of the steps, or
    what the builders refuse."""
    if args.method != "progressive":
        return method_curriculum(args, blocks, steps)
    if not teacher.checkpoints:
        found = "progressive distillation needs checkpoints of the teacher's training, and this teacher has none"
        raise UserError(f"{found} ({teacher.description}): leave progressive out of --methods")
    _check_phase(settings, steps * batch_size)
    uses: list[tuple[int, str | None]] = []
    left = steps
    for count, folder in _schedule(settings, teacher, steps, batch_size):
        count = min(count, left - 1)  # the finished teacher comes last, at least for one step
        if count < 1:
            break
        uses.append((count, folder))
        left -= count
    stages = tuple(
        OutputStage(count, teacher_checkpoint=folder, label_weight=args.label_weight, continues=number > 0)
        for number, (count, folder) in enumerate([*uses, (left, None)])
    )
    return Curriculum("progressive", stages, **shared_settings(args, blocks))


def _check_phase(settings: Mapping[str, Any], budget: int) -> None:
    """Raise UserError where the phase that was asked for leaves nothing of the budget to the finished teacher."""
    phase = clean(dict(settings)).get("phase_samples")
    check_range("phase_samples", phase, 1)
    if phase is not None and phase >= budget:
        found = f"phase_samples={phase} takes all of the {budget} samples of the run"
        raise UserError(f"{found}: give fewer, since the finished teacher comes last")


def _schedule(settings: Mapping[str, Any], teacher: Teacher, steps: int, batch_size: int) -> list[tuple[int, str]]:
    """Steps with each checkpoint."""
    name = settings.get("schedule", "two")
    if name == "two":
        place = _transition(teacher) + settings.get("checkpoint", 0)
        if not 0 <= place < len(teacher.checkpoints):
            found = f"checkpoint={settings['checkpoint']} is not one of the teacher's {len(teacher.checkpoints)}"
            raise UserError(f"{found}: the one in the middle of its transition is number {_transition(teacher) + 1}")
        chosen = teacher.checkpoints[place]
        samples = settings.get("phase_samples", chosen.samples // 2)
        return [(max(1, samples // batch_size), chosen.folder)]
    if name in SHARES:
        number = len(teacher.checkpoints)
        share = steps // (number + 1 if name == "even" else 2 * number)
        return [(max(1, share), checkpoint.folder) for checkpoint in teacher.checkpoints]
    pace = int(name.removeprefix("pace-"))
    return [
        (max(1, (checkpoint.samples - before) // (pace * batch_size)), checkpoint.folder)
        for before, checkpoint in zip(
            [0, *(checkpoint.samples for checkpoint in teacher.checkpoints)], teacher.checkpoints, strict=False
        )
    ]
