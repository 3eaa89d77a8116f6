"""Why a curriculum helps: what is in the teacher's layers that is not in its output.

Public names: `diagnose_parity`, `diagnose_language`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from tutelage.core.blocks import FINAL, forward_to
from tutelage.core.errors import UserError
from tutelage.core.inputs import model_inputs, position_mask
from tutelage.core.projection import RandomProjection
from tutelage.io.files import write_atomically
from tutelage.reproduction.probes import ngram_explained, weights_by_degree
from tutelage.reproduction.recipe import Recipe
from tutelage.reproduction.runner import PlannedRun, Runner, StopAtTarget
from tutelage.reproduction.variants import Candidate, plain_variant
from tutelage.runs.environment import environment
from tutelage.runs.plots import COLORS, save_figure
from tutelage.targets.live import LiveTargets
from tutelage.tasks.loading import load_tokenizer
from tutelage.tasks.parity import ParityData, ParityMLP
from tutelage.tasks.registry import detect_task
from tutelage.tasks.text import read_dataset, split_dataset, tokenize

_EXAMPLES = 20_000


def diagnose_parity(system: Recipe, folder: Path, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Fourier weights of a parity teacher's output, of its projected hidden layer, and of a student over extraction.

    Writes fourier.json, fourier.png and fourier.md to `folder`.

    Args:
        system: of the `parity-mlp` recipe; its first seed and the middle one of its learning rates are used.
    """
    fields: Any = system
    if system.name != "parity-mlp":
        raise UserError(f"Fourier weights are for parity-mlp, not {system.name}")
    if not fields.seeds or not fields.learning_rates:
        raise UserError("a diagnosis needs a seed and a learning rate: give --seeds 0 and --learning_rates 0.3, say")
    if fields.k > len(COLORS):
        raise UserError(f"k={fields.k} is beyond the {len(COLORS)} degrees that the plot can tell apart")
    teacher = system.make_teacher(folder)
    model: Any = teacher.model
    support = fields.coordinates
    bits, _ = ParityData(fields.d, fields.k, _EXAMPLES, 9_999_991, support).arrays()
    with torch.inference_mode():
        hidden = forward_to(model, 2, input_ids=bits)
        projection = RandomProjection(hidden.shape[-1], fields.student_width, (0, 2, fields.seeds[0]))
        teacher_weights = {
            "output": weights_by_degree(_logit(model(bits)), bits, support),
            "projected hidden layer": weights_by_degree(projection(hidden), bits, support),
        }
    rate = sorted(fields.learning_rates)[len(fields.learning_rates) // 2]
    history: list[dict[str, Any]] = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            student: ParityMLP = kwargs["model"]
            with torch.inference_mode():
                logits = student(bits[:, None])[:, 0]
            weights = weights_by_degree(_logit(logits), bits, support)
            metrics = kwargs["metrics"]
            samples = state.global_step * fields.batch_size
            history.append({"samples": samples, "accuracy": metrics["eval_accuracy"], **weights})

    runner = Runner(system, teacher, folder, "samples")
    log("training a student by extraction")
    stop = StopAtTarget(system, fields.seeds[:1], None)
    planned = PlannedRun(plain_variant("extraction"), Candidate(rate), tuple(fields.seeds[:1]), folder / "student")
    runner.train(planned, [Watch(), stop])
    result = {
        "d": fields.d,
        "k": fields.k,
        "teacher_description": teacher.description,
        "examples": _EXAMPLES,
        "environment": environment(),
        "teacher": teacher_weights,
        "student": history,
    }
    write_atomically(folder / "fourier.json", json.dumps(result, indent=1) + "\n")
    _plot_fourier(result, folder / "fourier.png")
    write_atomically(folder / "fourier.md", _fourier_table(result))
    return result


def _logit(logits: torch.Tensor) -> torch.Tensor:
    """The signed margin of two logits, squashed to the probability that is compared."""
    return torch.tanh((logits[..., 1] - logits[..., 0]) / 2)


def _plot_fourier(result: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    degrees = list(range(1, result["k"] + 1))
    for offset, (color, (name, weights)) in enumerate(zip(COLORS, result["teacher"].items(), strict=False)):
        places = [degree + 0.38 * (offset - 0.5) for degree in degrees]
        left.bar(places, [weights["support"][degree] for degree in degrees], 0.36, color=color, label=name)
    left.set(xlabel="degree of the monomial", ylabel="share of variance", title="Teacher, monomials of the support")
    left.set_xticks(degrees)
    left.legend()
    samples = [point["samples"] for point in result["student"]]
    for color, degree in zip(COLORS, degrees, strict=False):
        series = [max(0.0, point["support"][degree]) for point in result["student"]]
        right.plot(samples, series, color=color, label=f"degree {degree}")
    right.plot(samples, [point["accuracy"] for point in result["student"]], "k--", label="accuracy")
    right.set(xlabel="samples", ylabel="share of variance", title="Student's output during extraction")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)


def _fourier_table(result: dict[str, Any]) -> str:
    degrees = list(range(1, result["k"] + 1))
    lines = [
        f"# Fourier weights of a ({result['d']}, {result['k']}) parity",
        "",
        f"Teacher: {result['teacher_description']}. Share of variance on the monomials of the support, by degree, from "
        f"{result['examples']:,} examples; off the support, the mean monomial times the same number.",
        "",
        "| function | " + " | ".join(f"degree {degree}" for degree in degrees) + " | off support, 1 | off support, 2 |",
        "|" + "---|" * (len(degrees) + 3),
    ]
    rows = {f"teacher, {name}": weights for name, weights in result["teacher"].items()}
    rows["student's output at the end"] = result["student"][-1]
    for name, weights in rows.items():
        cells = [f"{weights['support'][degree]:.4f}" for degree in degrees]
        cells += [f"{weights['off_support'].get(degree, float('nan')):.4f}" for degree in (1, 2)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![Fourier weights](fourier.png)", ""])


def diagnose_language(
    teacher: str,
    dataset: str,
    folder: Path,
    *,
    eval_dataset: str | None = None,
    length: int = 3,
    max_samples: int = 256,
    max_length: int = 128,
    text_column: str = "text",
    blocks: str | None = None,
) -> dict[str, Any]:
    """How much of each layer of a language model the last 1 to `length` tokens explain, linearly.

    Layers that short contexts explain are an easier target: this shows the curriculum that extraction walks. Writes
    ngrams.json and ngrams.png to `folder`.

    Args:
        teacher, dataset: as in `tutelage distill`.
        length: longest context, in tokens.
        max_samples: sequences on each side (fitting, held out).
        max_length: tokens a sequence.
    """
    task = detect_task(teacher)
    if not task.per_position:
        raise UserError(f"n-gram probes are for language models; {teacher!r} is a model for {task.name}")
    if not 1 <= length <= len(COLORS):
        raise UserError(f"length must be from 1 to {len(COLORS)} tokens, got {length}")
    if max_samples < 1:
        raise UserError(f"max_samples must be at least 1 sequence, got {max_samples}")
    tokenizer = load_tokenizer(teacher)
    if tokenizer is None:
        raise UserError(f"found no tokenizer with {teacher!r}: save one into its folder")
    model = task.load(teacher)
    source = LiveTargets(model, task, blocks)
    data = read_dataset(dataset)
    if eval_dataset is None:
        parts = split_dataset(data, 0.3)
    else:
        held_out = read_dataset(eval_dataset)
        parts = tuple(next(iter(p.values())) if isinstance(p, dict) else p for p in (data, held_out))
    collator = task.collator(tokenizer)
    sides = []
    for part in parts:
        rows = tokenize(part, tokenizer, task, max_length, text_column)
        rows = rows.select(range(min(max_samples, len(rows))))
        sides.append(_states_and_contexts(source, rows, collator, length))
    layers: dict[str, list[float]] = {}
    for name in sides[0][0]:
        (states, contexts), (test, test_contexts) = ((side[0][name], side[1]) for side in sides)
        layers[name] = ngram_explained(states, contexts, test, test_contexts)
    result = {
        "teacher": teacher,
        "dataset": dataset,
        "positions": [len(side[1]) for side in sides],
        "layers": layers,
        "environment": environment(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "ngrams.json", json.dumps(result, indent=1) + "\n")
    _plot_ngrams(result, folder / "ngrams.png")
    return result


@torch.inference_mode()
def _states_and_contexts(
    source: LiveTargets, rows: Any, collator: Any, length: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """States of every layer at positions with a whole context, and the last tokens there (newest first).

    A masked model's input is left unmasked.
    """
    places: list[Any] = [*range(len(source.block_names) + 1), FINAL]
    states: dict[str, list[torch.Tensor]] = {str(place): [] for place in places}
    contexts = []
    device = next(source.model.parameters()).device

    def unmasked(part: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collator(part)
        longest = batch["input_ids"].shape[1]
        ids = [list(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in part]
        return {**batch, "input_ids": torch.tensor(ids)}

    for batch in DataLoader(rows, batch_size=16, collate_fn=unmasked):
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        ids = inputs["input_ids"]
        keep = torch.ones_like(ids, dtype=torch.bool)
        captured = _all_states(source, inputs)
        keep &= position_mask(inputs, captured["0"])
        keep[:, : length - 1] = False
        shifted = torch.stack([torch.roll(ids, j, dims=1) for j in range(length)], dim=-1)
        contexts.append(shifted[keep].cpu())
        for place, state in captured.items():
            states[place].append(state[keep].float().cpu())
    return {place: torch.cat(parts) for place, parts in states.items()}, torch.cat(contexts)


def _all_states(source: LiveTargets, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """States at every place, from one forward."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    first = source.block_names.module(source.backbone, 1)

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        found["0"] = value

    handles.append(first.register_forward_pre_hook(before, with_kwargs=True))
    for number in range(1, len(source.block_names) + 1):

        def after(_module: Any, _args: Any, output: Any, number: int = number) -> None:
            found[str(number)] = output if isinstance(output, torch.Tensor) else output[0]

        handles.append(source.block_names.module(source.backbone, number).register_forward_hook(after))
    try:
        found[FINAL] = forward_to(source.backbone, FINAL, **model_inputs(source.backbone, inputs))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _plot_ngrams(result: dict[str, Any], path: Path) -> None:
    names = list(result["layers"])
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index in range(len(next(iter(result["layers"].values())))):
        values = [result["layers"][name][index] for name in names]
        axis.plot(
            range(len(names)), values, "o-", markersize=3, color=COLORS[index], label=f"last {index + 1} token(s)"
        )
    axis.set_xticks(range(len(names)), names)
    axis.set(
        xlabel="place in the teacher (0 = embedding)",
        ylabel="variance explained on held-out text",
        title=f"What the last tokens explain: {Path(result['teacher']).name}",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path, dpi=120)
