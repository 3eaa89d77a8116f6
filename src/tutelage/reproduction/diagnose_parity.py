"""Why a curriculum helps on a parity: Fourier weights that are in the teacher's hidden layer but not in its output."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import TrainerCallback

from tutelage.core.errors import UserError
from tutelage.core.forward import forward_to
from tutelage.core.projection import RandomProjection
from tutelage.core.records import Record
from tutelage.io.files import write_atomically
from tutelage.reproduction.display import Table, save_plot
from tutelage.reproduction.probes import DegreeWeights, weights_by_degree
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.recipes.parity import ParityMLPRecipe
from tutelage.reproduction.runner import PlannedRun, Runner
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.variants import Candidate, plain_variant
from tutelage.runs.environment import environment
from tutelage.runs.plots import COLORS
from tutelage.tasks.parity import ParityData

_EXAMPLES = 20_000
_EXAMPLES_SEED = 9_999_991


@dataclass(frozen=True)
class StudentPoint(Record):
    """The student's output during extraction."""

    samples: int
    accuracy: float
    weights: DegreeWeights


@dataclass(frozen=True)
class ParityDiagnosis(Record):
    """Fourier weights of a parity's teacher and student (`fourier.json`)."""

    d: int
    k: int
    teacher: str  # how the teacher was made
    examples: int  # uniform inputs that the weights are estimated from
    environment: dict[str, Any]
    output: DegreeWeights  # of the teacher's output
    hidden: DegreeWeights  # of the teacher's hidden layer, projected to the student's width
    student: tuple[StudentPoint, ...]


def diagnose_parity(recipe: Recipe, folder: Path, log: Callable[[str], None] = print) -> ParityDiagnosis:
    """Fourier weights of a parity teacher's output, of its projected hidden layer, and of a student over extraction.

    Writes fourier.json, fourier.png and fourier.md to `folder`. The recipe is a `parity-mlp`, whose first seed and middle
    learning rate are used.

    Raises UserError: a different recipe, no seed or learning rate, or more degrees than the plot has colours."""
    if not isinstance(recipe, ParityMLPRecipe):
        raise UserError(f"Fourier weights are for parity-mlp, not {recipe.name}")
    if not recipe.seeds or not recipe.learning_rates:
        raise UserError("a diagnosis needs a seed and a learning rate: give --seeds 0 and --learning_rates 0.3, say")
    if recipe.k > len(COLORS):
        raise UserError(f"the plot has colours for {len(COLORS)} degrees, got k={recipe.k}: choose a smaller k")
    teacher = recipe.make_teacher(folder)
    bits_Nd, _ = ParityData(recipe.d, recipe.k, _EXAMPLES, _EXAMPLES_SEED, recipe.coordinates).arrays()
    with torch.inference_mode():
        hidden_NW = forward_to(teacher.model, 2, input_ids=bits_Nd)
        projection = RandomProjection(hidden_NW.shape[-1], recipe.student_width, (0, 2, recipe.seeds[0]))
        output = weights_by_degree(_margin(teacher.model(bits_Nd)), bits_Nd, recipe.coordinates)
        hidden = weights_by_degree(projection(hidden_NW), bits_Nd, recipe.coordinates)
    log("training a student by extraction")
    student = _train_student(recipe, teacher, bits_Nd, folder)
    about = (recipe.d, recipe.k, teacher.description, _EXAMPLES, environment())
    found = ParityDiagnosis(*about, output, hidden, student)
    write_atomically(folder / "fourier.json", found.to_json() + "\n")
    _plot(found, folder / "fourier.png")
    write_atomically(folder / "fourier.md", _report(found))
    return found


class _Watch(TrainerCallback):
    """Takes the weights of the student's output at every evaluation."""

    def __init__(self, recipe: ParityMLPRecipe, bits_Nd: torch.Tensor):
        self.recipe, self.bits_Nd = recipe, bits_Nd
        self.points: list[StudentPoint] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.inference_mode():
            logits_N2 = kwargs["model"](self.bits_Nd[:, None])[:, 0]  # one replica
        weights = weights_by_degree(_margin(logits_N2), self.bits_Nd, self.recipe.coordinates)
        samples = state.global_step * self.recipe.batch_size
        self.points.append(StudentPoint(samples, kwargs["metrics"]["eval_accuracy"], weights))


def _train_student(
    recipe: ParityMLPRecipe, teacher: Teacher, bits_Nd: torch.Tensor, folder: Path
) -> tuple[StudentPoint, ...]:
    watch, seeds = _Watch(recipe, bits_Nd), recipe.seeds[:1]
    rate = sorted(recipe.learning_rates)[len(recipe.learning_rates) // 2]
    planned = PlannedRun(plain_variant("extraction"), Candidate(rate), seeds, folder / "student")
    Runner(recipe, teacher, folder, "samples").train(planned, [watch])
    return tuple(watch.points)


def _margin(logits: torch.Tensor) -> torch.Tensor:
    """The signed margin of two logits, squashed to the probability that is compared."""
    return torch.tanh((logits[..., 1] - logits[..., 0]) / 2)


def _plot(found: ParityDiagnosis, path: Path) -> None:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    degrees = list(range(1, found.k + 1))
    sides = (("output", found.output, -0.19), ("projected hidden layer", found.hidden, 0.19))
    for color, (name, weights, offset) in zip(COLORS, sides, strict=False):
        left.bar(
            [degree + offset for degree in degrees],
            [weights.support[degree] for degree in degrees],
            0.36,
            color=color,
            label=name,
        )
    left.set(xlabel="degree of the monomial", ylabel="fraction of variance", title="Teacher, monomials of the support")
    left.set_xticks(degrees)
    samples = [point.samples for point in found.student]
    for color, degree in zip(COLORS, degrees, strict=False):
        series = [max(0.0, point.weights.support[degree]) for point in found.student]
        right.plot(samples, series, color=color, label=f"degree {degree}")
    right.plot(samples, [point.accuracy for point in found.student], "k--", label="accuracy")
    right.set(xlabel="samples", ylabel="fraction of variance", title="Student's output during extraction")
    save_plot(figure, path)


def _report(found: ParityDiagnosis) -> str:
    degrees = range(1, found.k + 1)
    functions = {
        "teacher, output": found.output,
        "teacher, projected hidden layer": found.hidden,
        "student's output at the end": found.student[-1].weights,
    }
    rows = []
    for name, weights in functions.items():
        off_support = (weights.off_support.get(degree, float("nan")) for degree in (1, 2))
        rows.append([name, *(f"{number:.4f}" for number in (*weights.support.values(), *off_support))])
    columns = ["function", *(f"degree {degree}" for degree in degrees), "off support, 1", "off support, 2"]
    note = (
        f"Teacher: {found.teacher}. The numbers are fractions of the variance on the monomials of the support, by degree, "
        f"from {found.examples:,} examples; off the support, the mean monomial times the same number of monomials."
    )
    title = f"Fourier weights of a ({found.d}, {found.k}) parity"
    return f"# {title}\n\n{Table(title, columns, rows, note).to_markdown()}\n\n![Fourier weights](fourier.png)\n"
