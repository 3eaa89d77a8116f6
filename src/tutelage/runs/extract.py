"""Running the teacher once: from settings to a curriculum on disk.

Public names: `ExtractArguments`, `extract`, `describe_extraction`.

The data is divided among the stages as training with the same settings divides it: the rows of a stage are those that the
steps of the stage would read, in that order, and each is made by a teacher that is run no deeper than the stage's block.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum, HiddenStage, OutputStage, Stage
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import at_positions, label_positions, last_token
from tutelage.core.losses import CHUNK_LOGITS
from tutelage.core.topk import TopK, top_k
from tutelage.io.store import Store
from tutelage.runs.distill import environment, quiet_unless_terminal
from tutelage.runs.settings import Run, RunArguments, fill_defaults, prepare_run
from tutelage.targets import rows
from tutelage.targets.extracted import HEAD_FILE, MAPS_FILE, TEACHER_FOLDER, TOKENIZER_FOLDER
from tutelage.targets.identity import data_fingerprint, model_hash, tokenizer_hash
from tutelage.targets.live import LiveTeacher
from tutelage.targets.manifest import Manifest, Shard, ShardWriter, Split, claim, finish, read_manifest, reopen
from tutelage.targets.reading import epoch_order
from tutelage.targets.rows import RowFormat
from tutelage.tasks.base import backbone, hidden_size
from tutelage.tasks.embedding import EmbeddingModel, EmbeddingShape
from tutelage.training import warm_start
from tutelage.training.calibration import prepare_targets
from tutelage.training.checks import check_widths
from tutelage.training.config import CurriculumConfig
from tutelage.training.objective import StageObjective
from tutelage.training.preparation import prepare, total_steps


@dataclass
class ExtractArguments:
    """What of a curriculum is stored, and how."""

    stages: list[str] | None = field(
        default=None,
        metadata={
            "help": "Teacher blocks whose states are stored, with final for the state before the output head, instead of those "
            "that a student asks for, e.g. 8 16 final; needs projection_dim."
        },
    )
    projection_dim: int | None = field(
        default=None,
        metadata={"help": "Width of the stored projections; unset is the student's. Narrower students fit too."},
    )
    dtype: str = field(default="int8", metadata={"help": f"Of hidden states: {', '.join(rows.DTYPES)}."})
    shard_tokens: int = field(default=1_000_000, metadata={"help": "Tokens a file, about."})
    devices: int = field(
        default=1, metadata={"help": "Devices that the student will train on, which divides the data among the stages."}
    )
    all_stages: bool = field(default=False, metadata={"help": "Store every row for every stage, for many epochs."})


# Outputs kept where nothing is said; the rest is one bucket.
DEFAULT_TOP_K = 64


def extract(
    run: RunArguments, args: CurriculumConfig, extraction: ExtractArguments, log: Callable[[str], None] = print
) -> Manifest:
    """Make a curriculum in `args.output_dir`, or go on with one that was begun.

    Args:
        run, args: as for `distill`; the student is only looked at.
        extraction: how it is stored.
        log: called with a line of progress.

    Raises:
        UserError: settings that cannot work, or a folder that holds something else.
        OSError: the disk is full; what was whole stays, and the same command goes on with it.
    """
    if args.curriculum_dir is not None:
        raise UserError("an extraction runs the teacher: leave curriculum_dir out")
    if args.method not in ("extraction", "one_shot"):
        raise UserError(
            f"method {args.method!r} reads no finished teacher's states: extract with extraction or one_shot"
        )
    if args.label_weight:
        raise UserError("label_weight is chosen when a student is trained: leave it out of the extraction")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise UserError(f"an extraction follows a random or sequential order, not {args.train_sampling_strategy!r}")
    for name in ("shard_tokens", "devices", "projection_dim"):
        value = getattr(extraction, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if extraction.stages is not None:
        _choose_stages(run, args, extraction)
    fill_defaults(run, args)
    store = Store(args.output_dir or ".")
    state = PartialState()
    prepared = prepare_run(run, args, extraction.devices)
    if not prepared.task.whole:
        args.top_k = args.top_k or DEFAULT_TOP_K
    work = _Work(prepared, args, extraction, state.device, run.streaming)
    finished = True
    if state.is_main_process:
        finished = claim(store, work.identity)
        if finished and reopen(store, read_manifest(store)):
            log(f"{store} has lost shards, which are made again")
            finished = False
    state.wait_for_everyone()
    if not state.is_main_process:
        finished = claim(store, work.identity)
    if not finished:
        work.write(store, state.process_index, state.num_processes, log)
        state.wait_for_everyone()
        if state.is_main_process:
            work.finish(store)
        state.wait_for_everyone()
    return read_manifest(store)


def _choose_stages(run: RunArguments, args: CurriculumConfig, extraction: ExtractArguments) -> None:
    """Stages that no student asked for: those of a student with a block for each."""
    stages, width = extraction.stages or [], extraction.projection_dim
    for name, value in (("student", run.student), ("layer_map", args.layer_map), ("num_stages", args.num_stages)):
        if value is not None:
            raise UserError(f"stages and {name} both say what is stored: leave one of them out")
    if width is None:
        raise UserError("stages say nothing about a width: add --projection_dim, that of the widest student to come")
    if args.method != "extraction":
        raise UserError(f"method {args.method!r} has no hidden stages: leave stages out")
    blocks = [stage for stage in stages if stage != FINAL]
    numbers = [int(block) if block.isdecimal() else 0 for block in blocks]
    increasing = all(first < second for first, second in zip([0, *numbers], numbers, strict=False))
    if not stages or not increasing or FINAL in stages[:-1]:
        raise UserError(
            f"stages must be teacher blocks from 1, each deeper than the one before, {FINAL} at most as the last, "
            f"e.g. 8 16 {FINAL}; got {' '.join(stages)}"
        )
    places = [str(index + 1) for index in range(len(blocks))] + [FINAL] * (len(stages) - len(blocks))
    args.layer_map = ",".join(f"{mine}:{theirs}" for mine, theirs in zip(places, stages, strict=True))
    run.student = f"layers={max(1, len(blocks))},hidden_size={width}"


class _Work:
    """Teacher, maps and rows of one extraction."""

    def __init__(
        self,
        prepared: Run,
        args: CurriculumConfig,
        extraction: ExtractArguments,
        device: Any,
        streamed: bool = False,
    ):
        assert prepared.teacher is not None
        self.streamed = streamed
        self.args, self.extraction, self.prepared, self.device = args, extraction, prepared, device
        self.data: Any = prepared.train_dataset
        self.task = prepared.task
        if self.task.plain:
            raise UserError("an extraction needs tokens: plain networks train with the teacher itself")
        rows.RowFormat(extraction.dtype, 1, "none", False, "states")  # refuses an unknown dtype
        args.max_steps = total_steps(args, self.data, extraction.devices) or args.max_steps
        setup = prepare(
            prepared.student, prepared.teacher, args, self.data, prepared.eval_dataset, prepared.tokenizer, None
        )
        self.curriculum: Curriculum = setup.curriculum
        self.objective: StageObjective = setup.objective
        assert setup.teacher is not None
        self.teacher: LiveTeacher = setup.teacher
        if not hasattr(self.teacher.model, "hf_device_map"):
            self.teacher.model.to(device)
        self.width = extraction.projection_dim or hidden_size(prepared.student)
        check_widths(self.curriculum, self.width, hidden_size(self.teacher.model))
        self.outputs = setup.objective.outputs
        self.names = [f"stage_{index + 1}" for index in range(len(self.curriculum.stages))]
        self.example = self._batch([0])
        self.forms = self._forms()
        self.identity = self._identity()

    def _identity(self) -> dict[str, Any]:
        teacher, args, head = self.teacher.model, self.args, self._head()
        transplants = warm_start.head_stage(self.curriculum) is not None
        return {
            "task": self.task.name,
            "causal": self.task.causal,
            "with_mask": "attention_mask" in self.example,
            "teacher": {
                "name": Path(self.prepared.names["teacher"]).name,
                "hash": model_hash(teacher),
                "dtype": str(next(self.teacher.model.parameters()).dtype).removeprefix("torch."),
                "blocks": len(self.teacher.blocks),
                "embedding": _embedding_shape(teacher),
                "outputs": 0 if self.task.whole else OutputHead.of(teacher).linear.out_features,
            },
            "tokenizer": tokenizer_hash(self.prepared.tokenizer),
            "data": {
                "name": Path(self.prepared.names["dataset"]).name,
                "rows": len(self.data),
                "fingerprint": data_fingerprint(self.data),
                "streamed": self.streamed,
            },
            "evaluation": data_fingerprint(self.prepared.eval_dataset),
            "mlm_probability": getattr(self.prepared.collator, "mlm_probability", None),
            "longest": max(len(ids) for ids in self.data["input_ids"]),
            "curriculum": self.curriculum.to_json(),
            "width": self.width,
            "kept": min(self.curriculum.top_k or 0, self.outputs or (head.linear.out_features if head else 0)),
            "seed": self.args.order_seed,
            "sequential": args.train_sampling_strategy == "sequential",
            "batch_size": args.per_device_train_batch_size,
            "step_examples": self._step_examples,
            "calibration_samples": args.calibration_samples,
            "all_stages": self.extraction.all_stages,
            "shard_tokens": self.extraction.shard_tokens,
            "centered": transplants and warm_start.head_has_bias(self.prepared.student),
            "head": None
            if not transplants
            else {"softcap": None, "scale": 1.0, "outputs": None}
            if head is None
            else {"softcap": head.softcap, "scale": head.scale, "outputs": head.outputs},
            "forms": {name: dataclasses.asdict(form) for name, form in self.forms.items()},
        }

    def _head(self) -> OutputHead | None:
        """The teacher's output head; for an embedding model, the linear map on its pooled state, if any."""
        if self.task.name != "embedding":
            return OutputHead.of(self.teacher.model, self.outputs)
        linear: nn.Linear | None = self.teacher.model.head  # type: ignore[assignment]
        return None if linear is None else OutputHead(linear)

    @property
    def _step_examples(self) -> int:
        """Of training: how many processes extract changes nothing."""
        return self.args.step_examples(self.extraction.devices)

    def _forms(self) -> dict[str, RowFormat]:
        label = "none"
        if "labels" in self.example and not (self.task.causal and "labels" not in self.data.column_names):
            label = "tokens" if self.example["labels"].dim() == 2 else "class"
        config: Any = backbone(self.teacher.model).config
        vocabulary = max(len(self.prepared.tokenizer), int(config.vocab_size))

        def form(kind: str) -> RowFormat:
            return RowFormat(self.extraction.dtype, vocabulary, label, "token_type_ids" in self.example, kind)

        found = {name: form(self._kind(stage)) for name, stage in zip(self.names, self.curriculum.stages, strict=True)}
        if (index := warm_start.head_stage(self.curriculum)) is not None:
            found["calibration"] = found[self.names[index]]
        return found

    def _kind(self, stage: Stage) -> str:
        if isinstance(stage, OutputStage):
            return "whole" if self.task.whole else "top_k"
        pooled = (
            isinstance(stage, HiddenStage)
            and stage.teacher_place == FINAL
            and self.task.name == "sequence_classification"
        )
        return "pooled" if pooled else "states"

    # ---- Which rows ----

    def _examples(self, index: int) -> list[int]:
        """Rows of the data that a stage reads, in the order it reads them, each once."""
        if self.extraction.all_stages:
            return self._order(0)
        stages, count = self.curriculum.stages, len(self.data)
        start = sum(stage.steps for stage in stages[:index]) * self._step_examples
        stop = start + stages[index].steps * self._step_examples
        seen: dict[int, None] = {}
        for epoch in range(start // count, math.ceil(stop / count)):
            order = self._order(epoch)
            seen.update(dict.fromkeys(order[max(0, start - epoch * count) : stop - epoch * count]))
        return list(seen)

    def _order(self, epoch: int) -> list[int]:
        """The order in which the trainer's sampler reads the data in an epoch."""
        sequential = self.args.train_sampling_strategy == "sequential"
        order: list[int] = epoch_order(len(self.data), self.args.order_seed, epoch, sequential).tolist()
        return order

    def _shards(self, examples: Sequence[int]) -> list[list[list[int]]]:
        """Examples in batches, batches in shards: the same whatever runs them."""
        size = self.args.per_device_train_batch_size
        lengths = [len(ids) for ids in self.data.select(list(examples))["input_ids"]]
        shards: list[list[list[int]]] = [[]]
        tokens = 0
        for start in range(0, len(examples), size):
            batch = sum(lengths[start : start + size])
            if shards[-1] and tokens + batch > self.extraction.shard_tokens:
                shards.append([])
                tokens = 0
            shards[-1].append(list(examples[start : start + size]))
            tokens += batch
        return shards

    def _batch(self, examples: Sequence[int]) -> dict[str, Any]:
        found = [self.data[int(example)] for example in examples]
        batch = self.prepared.collator([{k: v for k, v in row.items() if k in rows.INPUT_COLUMNS} for row in found])
        return {name: value.to(self.device) for name, value in batch.items()}

    # ---- Writing ----

    def write(self, store: Store, rank: int, ranks: int, log: Callable[[str], None]) -> None:
        """Write this process's share of the missing shards; the first process also what all of them share."""
        with tempfile.TemporaryDirectory() as folder:
            maps = Path(folder) / MAPS_FILE
            if rank == 0 and not store.exists(MAPS_FILE):
                self._prepare_targets(maps, resuming=False)
                if maps.exists():
                    with store.writing(MAPS_FILE) as path:
                        shutil.copyfile(maps, path)
            PartialState().wait_for_everyone()
            # one set of statistics, whoever makes a shard and whenever
            self._prepare_targets(store.fetch(MAPS_FILE) if store.exists(MAPS_FILE) else maps, resuming=True)
        if rank == 0:
            self._write_shared(store)
        features = self.features
        numbered = [
            (ShardWriter(store, name, len(shards), features[name]), number, batches, make)
            for name, shards, make in self._planned
            for number, batches in enumerate(shards)
        ]
        mine = [planned for planned in numbered[rank::ranks] if planned[0].done(planned[1]) is None]
        quiet = quiet_unless_terminal(self.args.disable_tqdm) or rank != 0
        tokens, start = 0, time.perf_counter()
        with tqdm(total=len(mine), desc="Extracting", unit="shard", disable=quiet) as bar:
            for writer, number, batches, make in mine:
                tokens += writer.write(number, make(batches)).tokens
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")
                bar.update()
        if rank == 0:
            pace = f", {tokens:,} tokens at {tokens / (time.perf_counter() - start):,.0f} a second" if mine else ""
            log(f"{len(numbered)} shards in {store}{f' ({len(mine)} here{pace})' if mine else ''}")

    def _prepare_targets(self, maps: Path, resuming: bool) -> None:
        prepare_targets(
            self.objective,
            maps,
            self._calibration,
            self.device,
            resuming=resuming,
            write=not resuming,
            width=self.width,
        )

    @functools.cached_property
    def _planned(self) -> list[tuple[str, list[list[list[int]]], Callable[..., Iterator[dict[str, Any]]]]]:
        planned: list[Any] = []
        for index, name in enumerate(self.names):
            planned.append((name, self._shards(self._examples(index)), self._maker(index)))
        if (head := warm_start.head_stage(self.curriculum)) is not None:
            planned.append(("calibration", [self._calibration_examples], self._maker(head)))
        planned.append(("evaluation", [[list(range(len(self.prepared.eval_dataset)))]], self._evaluation))
        return planned

    @property
    def features(self) -> dict[str, Any]:
        """Columns of every split."""
        found = {name: form.features for name, form in self.forms.items()}
        found["evaluation"] = self._evaluation_form().features
        return found

    def _evaluation_form(self) -> RowFormat:
        first = self.forms[self.names[0]]
        label = "none"
        if "labels" in self.prepared.eval_dataset.column_names:
            label = "class" if self.task.name == "sequence_classification" else "tokens"
        kind = "whole" if self.task.name == "embedding" else "inputs"
        return dataclasses.replace(first, label=label, token_types=False, kind=kind)

    def _maker(self, index: int) -> Callable[[list[list[int]]], Iterator[dict[str, Any]]]:
        stage, form = self.curriculum.stages[index], self.forms[self.names[index]]

        def make(batches: list[list[int]]) -> Iterator[dict[str, Any]]:
            for examples in batches:
                batch = self._batch(examples)
                columns = rows.encode_inputs(batch, examples, form)
                if isinstance(stage, HiddenStage):
                    states, keep = self.objective.live_states(index, batch)
                    columns |= rows.encode_states(states, keep, rows.lengths_of(batch), form)
                elif form.kind == "whole":
                    columns |= rows.encode_whole(self.teacher.output(batch), form)
                else:
                    kept, counts = self._top_k(batch)
                    columns |= rows.encode_outputs(kept, counts, form)
                yield columns

        return make

    @torch.inference_mode()
    def _top_k(self, batch: dict[str, Any]) -> tuple[TopK, list[int]]:
        """The teacher's largest outputs at the positions that predict, and how many of these each row has."""
        state, head = self.teacher.hidden(FINAL, batch), self._head()
        assert head is not None and self.curriculum.top_k is not None
        if self.task.per_position:
            mask, _ = label_positions(batch, self.task.causal)
            state, counts = at_positions(state, mask), mask.sum(1).tolist()
        else:
            state, counts = last_token(state, batch), [1] * len(batch["input_ids"])
        size = self.args.logits_chunk_size or max(1, CHUNK_LOGITS // head.linear.out_features)
        parts = [
            top_k(head(state[start : start + size]), self.curriculum.top_k, self.curriculum.temperature)
            for start in range(0, len(state), size)
        ]
        return TopK(
            *(torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "log_probs", "log_rest"))
        ), counts

    def _evaluation(self, batches: list[list[int]]) -> Iterator[dict[str, Any]]:
        form, data = self._evaluation_form(), self.prepared.eval_dataset
        for example in batches[0]:
            row = data[example]
            read = ("input_ids", "attention_mask", *(["labels"] if form.label != "none" else []))
            batch = {name: torch.tensor([row[name]]) for name in read if name in row}
            columns = rows.encode_inputs(batch, [example], form)
            if form.kind == "whole":
                columns |= rows.encode_whole(
                    self.teacher.output({n: v.to(self.device) for n, v in batch.items()}), form
                )
            yield columns

    @property
    def _calibration_examples(self) -> list[list[int]]:
        """The first rows of the data, in batches."""
        count, size = min(self.args.calibration_samples, len(self.data)), self.args.per_device_train_batch_size
        return [list(range(start, min(start + size, count))) for start in range(0, count, size)]

    def _calibration(self) -> list[dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            return [self._batch(examples) for examples in self._calibration_examples]

    def _write_shared(self, store: Store) -> None:
        """Teacher's config, tokenizer and, for a transplant, output head."""
        with tempfile.TemporaryDirectory() as folder:
            backbone(self.teacher.model).config.save_pretrained(Path(folder) / TEACHER_FOLDER)  # type: ignore[union-attr,operator]
            self.prepared.tokenizer.save_pretrained(Path(folder) / TOKENIZER_FOLDER)
            for file in Path(folder).rglob("*.*"):
                with store.writing(file.relative_to(folder).as_posix()) as path:
                    shutil.copyfile(file, path)
        head = self._head()
        if self.identity["head"] is None or head is None:
            return
        tensors = {name: value.detach().cpu().contiguous() for name, value in head.linear.state_dict().items()}
        with store.writing(HEAD_FILE) as path:
            save_file(tensors, path)

    def finish(self, store: Store) -> None:
        """Check that every shard is there, then write what makes the folder a curriculum."""
        splits, features = [], self.features
        for name, shards, _ in self._planned:
            writer = ShardWriter(store, name, len(shards), features[name])
            written: list[Shard] = []
            for number in range(len(shards)):
                shard = writer.done(number)
                if shard is None:
                    raise UserError(f"shard {writer.file(number)} was not written: run the same command again")
                written.append(shard)
            splits.append(Split(name, tuple(written)))
        shared = [MAPS_FILE, HEAD_FILE, *store.files(TEACHER_FOLDER), *store.files(TOKENIZER_FOLDER)]
        files = {name: store.sha256(name) for name in shared if store.exists(name)}
        manifest = Manifest(json.loads(json.dumps(self.identity)), tuple(splits), files, environment=environment())
        finish(store, manifest, features)


def _embedding_shape(teacher: nn.Module) -> dict[str, Any] | None:
    if not isinstance(teacher, EmbeddingModel):
        return None
    return dataclasses.asdict(EmbeddingShape(teacher.embedding_size, teacher.pooling, teacher.normalize))


def describe_extraction(root: str, manifest: Manifest) -> str:
    """Splits, sizes and bytes a token, for the terminal."""
    identity, teacher = manifest.identity, manifest.identity["teacher"]
    lines = [
        f"curriculum: {root} (format {manifest.format})",
        f"teacher:    {teacher['name']}, {teacher['blocks']} blocks, hash {teacher['hash'][:16]}",
        f"data:       {identity['data']['name']}, {identity['data']['rows']:,} rows",
        "",
        f"{'split':<14}{'what':<16}{'rows':>9}{'tokens':>12}{'bytes':>14}{'bytes/token':>13}",
    ]
    curriculum = Curriculum.from_json(identity["curriculum"])
    what = {f"stage_{index + 1}": stage.name for index, stage in enumerate(curriculum.stages)}
    for split in manifest.splits:
        lines.append(
            f"{split.name:<14}{what.get(split.name, ''):<16}{split.rows:>9,}{split.tokens:>12,}{split.bytes:>14,}"
            f"{split.bytes / max(1, split.tokens):>13.1f}"
        )
    lines += ["", f"total: {sum(split.bytes for split in manifest.splits):,} bytes"]
    return "\n".join(lines)
