"""One extraction: claim the folder, write the missing shards, finish."""

import copy
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import save_file
from tqdm.auto import tqdm

from tutelage.core.curriculum import RESIDUAL
from tutelage.core.errors import UserError
from tutelage.core.inputs import text_config
from tutelage.core.processes import Group
from tutelage.io.files import alone, temporary_folder
from tutelage.io.store import Store
from tutelage.runs.environment import quiet_unless_terminal
from tutelage.runs.extraction.encoder import Columns, Encoder
from tutelage.runs.extraction.options import DEFAULT_TOP_K, ExtractOptions, check_options, choose_stages, without_start
from tutelage.runs.extraction.progress import (
    SharedFiles,
    damaged,
    finish,
    forget_shards,
    put_folder,
    read_shared,
    reopen,
    write_shared,
)
from tutelage.runs.extraction.schedule import Batches, Schedule, plan_shards
from tutelage.runs.inputs import RunInputs, RunOptions, load_inputs, with_defaults
from tutelage.targets.folder import HEAD_FILE, STATISTICS_FILE, STUDENT_FOLDER, TEACHER_FOLDER, TOKENIZER_FOLDER
from tutelage.targets.identity import (
    DataIdentity,
    ExtractionIdentity,
    HeadSettings,
    TeacherIdentity,
    data_fingerprint,
    model_hash,
    tokenizer_hash,
)
from tutelage.targets.live import LiveTargets, check_widths
from tutelage.targets.manifest import Manifest, ShardWriter, Split, claim, comparing, read_manifest
from tutelage.targets.rows import RowFormat
from tutelage.targets.source import StatisticsFile
from tutelage.training.config import CurriculumConfig
from tutelage.training.feed import CollatedBatches
from tutelage.training.preparation import Given, prepare


def extract(
    run: RunOptions | None = None,
    args: CurriculumConfig | None = None,
    options: ExtractOptions = ExtractOptions(),  # noqa: B008 (frozen)
    log: Callable[[str], None] = print,
) -> Manifest:
    """Make an extracted curriculum in `args.output_dir`, or resume one that was begun; of a finished one, make again what is
    lost or damaged.

    `run` and `args` are as for `distill`; the student is only looked at. `log` is called with a line of progress.

    Raises:
        UserError: settings that cannot work, or a folder that contains something else; or the disk is full: what was whole
            stays, and the same command resumes with it."""
    run, args = run or RunOptions(), args or CurriculumConfig()
    check_options(args)
    run, args = with_defaults(*choose_stages(run, args, options))
    store = Store(args.output_dir or ".")
    state = PartialState()
    job = ExtractionJob(load_inputs(run, args, options.devices), args, options, state.device, run.streaming)
    group, first = Group.of_all(state.device), state.is_main_process
    with alone(store.local, "extracting") if store.local is not None and first else nullcontext():
        if not group.first(lambda: job.claim(store, log)):
            job.write(store, group, log)
            state.wait_for_everyone()
            group.first(lambda: job.finish(store))
    return read_manifest(store)


@dataclass(frozen=True)
class PlannedSplit:
    """A split, its shards, and what makes their columns."""

    name: str
    form: RowFormat
    shards: list[Batches]
    columns: Callable[[RowFormat, Batches], Iterator[Columns]]


class ExtractionJob:
    """Teacher (on `device`), schedule and encoder of one extraction; `streamed` data are the first rows of a stream."""

    def __init__(self, inputs: RunInputs, args: CurriculumConfig, options: ExtractOptions, device: Any, streamed: bool):
        source = inputs.source
        assert isinstance(source, LiveTargets)
        if not source.task.tokenized:
            raise UserError("an extraction needs tokens: plain networks train with the teacher itself")
        own, width = source.task.width(inputs.student), options.projection_dim
        if width not in (None, own):
            args = without_start(args, f"projection_dim={width} is for students of other widths than its {own}")
        args = copy.copy(args)
        if source.task.splits_head:
            args.top_k = args.top_k or DEFAULT_TOP_K
        self.inputs, self.options, self.device, self.streamed = inputs, options, device, streamed
        given = Given(inputs.student, source, inputs.train_dataset, inputs.eval_dataset, inputs.tokenizer, None)
        self.run = prepare(given, args, options.devices).run
        self.args, self.source, self.curriculum = args, source, self.run.curriculum
        self.source.to(device)
        widths = source.task.widths(inputs.student, self.curriculum.places("student"))
        self.width = options.projection_dim or max(widths.values(), default=source.task.width(inputs.student))
        check_widths(self.curriculum, self.width, source.widths(self.curriculum))
        data: Any = inputs.train_dataset
        sequential = args.train_sampling_strategy == "sequential"
        self.schedule = Schedule(self.curriculum, len(data), self.run.reading, sequential, options.all_stages)
        config: Any = source.backbone.config
        vocabulary, chunk = max(len(inputs.tokenizer), int(text_config(config).vocab_size)), args.logits_chunk_size
        self.encoder = Encoder(
            source, data, inputs.eval_dataset, inputs.collator, vocabulary, options.dtype, device, chunk
        )
        self.names = [f"stage_{index + 1}" for index in range(len(self.curriculum.stages))]
        self.example = self.encoder.batch([0])

    @functools.cached_property
    def forms(self) -> dict[str, RowFormat]:
        """How the rows of each split but the evaluation are stored."""
        stages = zip(self.names, self.curriculum.stages, strict=True)
        found = {name: self.encoder.form(stage, self.example) for name, stage in stages}
        if (index := self.curriculum.transplant_stage) is not None:
            found["calibration"] = found[self.names[index]]
        return found

    @functools.cached_property
    def identity(self) -> ExtractionIdentity:
        """Everything that the rows depend on."""
        task, head, model = self.source.task, self.source.output_head(), self.source.model
        transplants = self.curriculum.transplant_stage is not None
        outputs = 0 if head is None or not task.splits_head else head.linear.out_features
        reading, data = self.run.reading, self.encoder.data
        teacher = TeacherIdentity(
            name=Path(self.inputs.names["teacher"]).name,
            hash=model_hash(model),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            blocks=len(self.source.block_names),
            shape=task.teacher_shape(model),
            outputs=self.source.output_count or 0,
        )
        name = Path(self.inputs.names["dataset"]).name
        settings = HeadSettings() if head is None else HeadSettings(head.softcap, head.scale, head.outputs)
        return ExtractionIdentity(
            task=task.name,
            teacher=teacher,
            tokenizer=tokenizer_hash(self.inputs.tokenizer),
            data=DataIdentity(name, len(data), data_fingerprint(data), self.streamed),
            evaluation=data_fingerprint(self.inputs.eval_dataset),
            curriculum=self.curriculum,
            width=self.width,
            forms=self.forms,
            student=self.inputs.names["student"],
            causal=task.causal,
            with_mask="attention_mask" in self.example,
            mlm_probability=getattr(self.inputs.collator, "mlm_probability", None),
            longest=max(len(ids) for ids in data["input_ids"]),
            kept=min(self.curriculum.top_k or 0, self.source.outputs or outputs),
            seed=reading.seed,
            sequential=self.schedule.sequential,
            batch_size=reading.batch_size,
            step_examples=reading.step_examples,
            calibration_samples=self.run.calibration_samples,
            all_stages=self.options.all_stages,
            shard_tokens=self.options.shard_tokens,
            centered=transplants and task.head_has_bias(self.inputs.student),
            head=settings if transplants else None,
        )

    @functools.cached_property
    def splits(self) -> list[PlannedSplit]:
        """Every split with its shards."""
        planned = [self._stage_split(index, name) for index, name in enumerate(self.names)]
        if (index := self.curriculum.transplant_stage) is not None:
            form = self.forms["calibration"]
            columns = functools.partial(self.encoder.stage_columns, index)
            planned.append(PlannedSplit("calibration", form, [self.calibration_examples], columns))
        form = self.encoder.evaluation_form(self.forms[self.names[0]])
        rows = [[list(range(len(self.inputs.eval_dataset)))]]
        return [*planned, PlannedSplit("evaluation", form, rows, self.encoder.evaluation_columns)]

    def _stage_split(self, index: int, name: str) -> PlannedSplit:
        examples = self.schedule.examples(index)
        lengths = [len(ids) for ids in self.encoder.data.select(examples)["input_ids"]]
        shards = plan_shards(examples, lengths, self.run.reading.batch_size, self.options.shard_tokens)
        return PlannedSplit(name, self.forms[name], shards, functools.partial(self.encoder.stage_columns, index))

    @property
    def calibration_examples(self) -> Batches:
        """The first rows of the data, in batches."""
        count, size = min(self.run.calibration_samples, len(self.encoder.data)), self.run.reading.batch_size
        return [list(range(start, min(start + size, count))) for start in range(0, count, size)]

    def claim(self, store: Store, log: Callable[[str], None]) -> bool:
        """Make the folder this extraction's; True where it is finished, and no file is lost or damaged."""
        if not claim(store, self.identity):
            return False
        if lost := reopen(store, read_manifest(store), self.args.check_curriculum):
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            log(f"{store} has lost or damaged files, which are made again: {lost[0]}{more}")
        return not lost

    def write(self, store: Store, group: Group, log: Callable[[str], None]) -> None:
        """Write this process's part of the missing shards; the first process also what all of them need."""
        sha256_of_start = group.first(lambda: self._write_shared(store))
        if self.curriculum.hidden_stages:  # one set of statistics, whoever makes a shard and whenever
            stored = store.fetch(STATISTICS_FILE, comparing(store, STATISTICS_FILE, sha256_of_start[STATISTICS_FILE]))
            self._prepare_maps(StatisticsFile(stored, read=True, write=False))
        numbered = [
            (ShardWriter(store, split.name, len(split.shards), split.form.features), number, split)
            for split in self.splits
            for number in range(len(split.shards))
        ]
        check = self.args.check_curriculum
        mine = [planned for planned in numbered[group.rank :: group.size] if planned[0].done(planned[1], check) is None]
        quiet = quiet_unless_terminal(self.args.disable_tqdm) or group.rank != 0
        tokens, start = 0, time.perf_counter()
        with tqdm(total=len(mine), desc="Extracting", unit="shard", disable=quiet) as bar:
            for writer, number, split in mine:
                tokens += writer.write(number, split.columns(split.form, split.shards[number])).tokens
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")
                bar.update()
        if group.rank == 0:
            pace = f"{tokens:,} tokens at {tokens / (time.perf_counter() - start):,.0f} per second"
            log(f"{len(numbered)} shards in {store}" + (f" ({len(mine)} here, {pace})" if mine else ""))

    def _write_shared(self, store: Store) -> dict[str, str]:
        """Write what is no shard, where it is not there; the checksums of what every shard depends on."""
        before = read_shared(store)
        if before is not None and not damaged(store, before.start):
            start = before.start
        else:
            start = self._write_start(store)
            if before is None or before.start != start:
                forget_shards(store)  # they may have been made with other statistics
            write_shared(store, SharedFiles(start, {}))
        write_shared(store, SharedFiles(start, self._write_others(store)))
        return start

    def _write_start(self, store: Store) -> dict[str, str]:
        """Write the student's configuration and, where they come from the teacher, its first weights; and the statistics."""
        task, student, starts = self.source.task, self.inputs.student, self.curriculum.student_init == "teacher"
        if starts:
            self.source.start(student, self._calibration_batches)
        with temporary_folder(f"{store}/{STUDENT_FOLDER}") as folder:
            if starts:
                task.save(student, folder / STUDENT_FOLDER)
            config: Any = task.backbone(student).config
            config.save_pretrained(folder / STUDENT_FOLDER)
            written = put_folder(store, folder)
        if self.curriculum.hidden_stages:
            with store.writing(STATISTICS_FILE) as path:
                self._prepare_maps(StatisticsFile(path, read=False, write=True))
            written[STATISTICS_FILE] = store.sha256(STATISTICS_FILE)
        return written

    def _prepare_maps(self, file: StatisticsFile) -> None:
        self.source.prepare(file, self._calibration_batches, self.device, self.width)

    def _calibration_batches(self) -> CollatedBatches:
        return CollatedBatches(self.calibration_examples, self.encoder.batch)

    def _write_others(self, store: Store) -> dict[str, str]:
        """Write the teacher's config, the tokenizer and, for a transplant, the output head; their checksums."""
        head = self.source.output_head()
        with temporary_folder(str(store)) as folder:
            config: Any = self.source.backbone.config
            config.save_pretrained(folder / TEACHER_FOLDER)
            self.inputs.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
            if self.identity.head is not None and head is not None:
                tensors = {name: value.detach().cpu().contiguous() for name, value in head.linear.state_dict().items()}
                save_file(tensors, folder / HEAD_FILE)
            return put_folder(store, folder)

    def finish(self, store: Store) -> None:
        """Check that every file is there, then write what makes the folder an extracted curriculum."""
        splits = []
        for split in self.splits:
            writer = ShardWriter(store, split.name, len(split.shards), split.form.features)
            # they were compared with their checksums when they were written, or found
            written = [writer.done(number, check=False) for number in range(len(split.shards))]
            shards = tuple(shard for shard in written if shard is not None)
            if None in written:
                raise UserError(f"shard {writer.file(written.index(None))} was not written: run the same command again")
            splits.append(Split(split.name, shards))
        finish(store, self.identity, splits, {split.name: split.form.features for split in self.splits})


def _students(manifest: Manifest) -> str:
    """Which students train from an extraction, and what they start from."""
    curriculum, name = manifest.identity.curriculum, manifest.identity.student
    if curriculum.student_init == "random":
        return f"students up to width {manifest.identity.width}, from random weights"
    residual = curriculum.hidden_stages and curriculum.projection == RESIDUAL
    return f"{name}, from its teacher's weights{'' if residual else '; other students from random weights'}"


def describe_extraction(root: str, manifest: Manifest) -> str:
    """Splits, sizes and bytes per token, for the terminal."""
    teacher, data, curriculum = manifest.identity.teacher, manifest.identity.data, manifest.identity.curriculum
    lines = [
        f"extracted curriculum: {root} (format {manifest.format})",
        f"teacher:              {teacher.name}, {teacher.blocks} blocks, hash {teacher.hash[:16]}",
        f"data:                 {data.name}, {data.rows:,} rows",
        f"method:               {curriculum.method}",
        f"for:                  {_students(manifest)}",
        "",
        f"{'split':<14}{'what':<16}{'rows':>9}{'tokens':>12}{'bytes':>14}{'bytes/token':>13}",
    ]
    what = {f"stage_{index + 1}": stage.name for index, stage in enumerate(curriculum.stages)}
    for split in manifest.splits:
        sizes = f"{split.rows:>9,}{split.tokens:>12,}{split.bytes:>14,}{split.bytes / max(1, split.tokens):>13.1f}"
        lines.append(f"{split.name:<14}{what.get(split.name, ''):<16}{sizes}")
    lines += ["", f"total: {sum(split.bytes for split in manifest.splits):,} bytes"]
    return "\n".join(lines)
