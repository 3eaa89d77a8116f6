"""Why a curriculum helps on text: how much of each layer of a language model short contexts explain.

Shapes: B sequences, T positions, W width, P positions with a whole context, n length of the context."""

import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from tutelage.core.blocks import FINAL
from tutelage.core.errors import LARGEST, UserError, check_range, check_texts
from tutelage.core.forward import forward_to
from tutelage.core.inputs import model_inputs, position_mask
from tutelage.core.records import Record
from tutelage.io.files import write_atomically
from tutelage.reproduction.display import save_plot
from tutelage.reproduction.probes import ngram_explained
from tutelage.runs.environment import environment
from tutelage.runs.escaping import as_label
from tutelage.runs.plots import COLORS
from tutelage.targets.live import LiveTargets
from tutelage.tasks.loading import load_tokenizer
from tutelage.tasks.registry import detect_task
from tutelage.tasks.text import read_dataset, split_dataset, tokenize
from tutelage.training.checks import check_dataset


@dataclass(frozen=True)
class NgramProbe:
    """What is probed."""

    teacher: str  # folder or Hub name of a language model
    dataset: str  # text that the probes are fitted on
    eval_dataset: str | None = None  # held-out text; default: the end of the dataset
    length: int = 3  # longest context, in tokens
    max_samples: int = 256  # sequences on each side (fitting, held out)
    max_length: int = 128  # tokens per sequence
    text_column: str = "text"  # column of the dataset that contains the text
    blocks: str | None = None  # dotted name of the teacher's list of blocks, where several are found

    def __post_init__(self) -> None:
        check_texts(self)
        check_range("length", self.length, 1, len(COLORS))
        for name in ("max_samples", "max_length"):
            check_range(name, getattr(self, name), 1, LARGEST)


@dataclass(frozen=True)
class LanguageDiagnosis(Record):
    """What short contexts explain of a language model's layers (`ngrams.json`)."""

    teacher: str
    dataset: str
    positions: tuple[int, ...]  # positions that the probes were fitted on, and held-out ones
    layers: dict[str, tuple[float, ...]]
    """By place: the fraction of held-out variance that the last 1, 2, ... tokens explain."""
    environment: dict[str, Any]


def diagnose_language(probe: NgramProbe, folder: Path) -> LanguageDiagnosis:
    """How much of each layer of a language model the last 1 to n tokens explain, linearly.

    Layers that short contexts explain are an easier target: this shows the curriculum that extraction follows. Writes
    ngrams.json and ngrams.png to `folder`.

    Raises UserError: no language model, no tokenizer, or text that cannot be read or is too short."""
    task = detect_task(probe.teacher)
    if not task.per_position:
        raise UserError(f"n-gram probes are for language models; {probe.teacher!r} is a model for {task.name}")
    tokenizer = load_tokenizer(probe.teacher)
    if tokenizer is None:
        raise UserError(f"found no tokenizer with {probe.teacher!r}: save one into its folder")
    model = task.load(probe.teacher)
    source = LiveTargets(model, task, probe.blocks)
    collate = partial(_unmasked, task.collator(tokenizer))
    sides = []
    for part in _texts(probe):
        rows = tokenize(part, tokenizer, task, probe.max_length, probe.text_column)
        rows = rows.select(range(min(probe.max_samples, len(rows))))
        check_dataset(rows, [model], task, "probed")
        sides.append(_states_and_contexts(source, DataLoader(rows, batch_size=16, collate_fn=collate), probe.length))
    (states, contexts), (held_out, held_out_contexts) = sides
    layers = {
        place: tuple(ngram_explained(states[place], contexts, held_out[place], held_out_contexts)) for place in states
    }
    positions = (len(contexts), len(held_out_contexts))
    found = LanguageDiagnosis(probe.teacher, probe.dataset, positions, layers, environment())
    write_atomically(folder / "ngrams.json", found.to_json() + "\n")
    _plot(found, folder / "ngrams.png")
    return found


def _texts(probe: NgramProbe) -> tuple[Any, Any]:
    data = read_dataset(probe.dataset)
    if probe.eval_dataset is None:
        return split_dataset(data, 0.3)
    parts = (data, read_dataset(probe.eval_dataset))
    first, second = (next(iter(part.values())) if isinstance(part, dict) else part for part in parts)
    return first, second


def _unmasked(collator: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch whose input is left unmasked, also for masked models."""
    batch = collator(rows)
    longest = batch["input_ids"].shape[1]
    ids = [list(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {**batch, "input_ids": torch.tensor(ids)}


@torch.inference_mode()
def _states_and_contexts(
    source: LiveTargets, batches: Any, length: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """States by place, each (P, W), at positions with a whole context, and the last tokens there, newest first, (P, n)."""
    states: dict[str, list[torch.Tensor]] = {}
    contexts = []
    device = next(source.model.parameters()).device
    for batch in batches:
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        ids_BT = inputs["input_ids"]
        captured = _all_states(source, inputs)
        keep_BT = position_mask(inputs, captured["0"]).clone()
        keep_BT[:, : length - 1] = False
        shifted_BTn = torch.stack([torch.roll(ids_BT, j, dims=1) for j in range(length)], dim=-1)
        contexts.append(shifted_BTn[keep_BT].cpu())
        for place, state_BTW in captured.items():
            states.setdefault(place, []).append(state_BTW[keep_BT].float().cpu())
    return {place: torch.cat(parts) for place, parts in states.items()}, torch.cat(contexts)


def _all_states(source: LiveTargets, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """States at every place, each (B, T, W), from one forward; places are in order."""
    found: dict[str, torch.Tensor] = {}

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found["0"] = args[0] if args else next(iter(kwargs.values()))

    def after(number: int, _module: Any, _args: Any, output: Any) -> None:
        found[str(number)] = output if isinstance(output, torch.Tensor) else output[0]

    blocks = [source.block_names.module(source.backbone, number) for number in range(1, len(source.block_names) + 1)]
    with contextlib.ExitStack() as hooks:
        hooks.callback(blocks[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for number, block in enumerate(blocks, 1):
            hooks.callback(block.register_forward_hook(partial(after, number)).remove)
        found[FINAL] = forward_to(source.backbone, FINAL, **model_inputs(source.backbone, inputs))
    return found


def _plot(found: LanguageDiagnosis, path: Path) -> None:
    places = list(found.layers)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for index, scores in enumerate(zip(*found.layers.values(), strict=True)):
        label = f"last {index + 1} token(s)"
        axis.plot(range(len(places)), scores, "o-", markersize=3, color=COLORS[index], label=label)
    axis.set_xticks(range(len(places)), places)
    axis.set(xlabel="place in the teacher (0 = embedding)", ylabel="variance explained on held-out text")
    axis.set_title(as_label(f"What the last tokens explain: {Path(found.teacher).name}"))
    save_plot(figure, path)
