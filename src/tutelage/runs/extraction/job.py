"""One extraction: claim the folder, write the missing shards, finish."""

import copy
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import save_file
from tqdm.auto import tqdm

from tutelage.core.curriculum import RESIDUAL
from tutelage.core.errors import UserError
from tutelage.core.inputs import text_config
from tutelage.io.store import Store
from tutelage.runs.environment import environment, quiet_unless_terminal
from tutelage.runs.extraction.encoder import Columns, Encoder
from tutelage.runs.extraction.options import DEFAULT_TOP_K, ExtractOptions, check_options, choose_stages, without_start
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
from tutelage.targets.manifest import Manifest, ShardWriter, Split, claim, finish, read_manifest, reopen
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
    """Make an extracted curriculum in `args.output_dir`, or resume one that was begun.

    `run` and `args` are as for `distill`; the student is only looked at. `log` is called with a line of progress.

    Raises:
        UserError: settings that cannot work, or a folder that contains something else.
        OSError: the disk is full; what was whole stays, and the same command resumes with it."""
    run, args = run or RunOptions(), args or CurriculumConfig()
    check_options(args, options)
    run, args = with_defaults(*choose_stages(run, args, options))
    store = Store(args.output_dir or ".")
    state = PartialState()
    job = ExtractionJob(load_inputs(run, args, options.devices), args, options, state.device, run.streaming)
    with state.main_process_first():
        finished = claim(store, job.identity)
        if state.is_main_process and finished and reopen(store, read_manifest(store)):
            log(f"{store} has lost shards, which are made again")
            finished = False
    if not finished:
        job.write(store, state.process_index, state.num_processes, log)
        state.wait_for_everyone()
        if state.is_main_process:
            job.finish(store)
        state.wait_for_everyone()
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

    def write(self, store: Store, rank: int, ranks: int, log: Callable[[str], None]) -> None:
        """Write this process's part of the missing shards; the first process also what all of them need."""
        with tempfile.TemporaryDirectory() as folder:
            statistics = Path(folder) / STATISTICS_FILE
            if rank == 0 and not self._begun(store):
                self._start_student(store)
                self._prepare_maps(StatisticsFile(statistics, read=False, write=True))
                if statistics.exists():
                    with store.writing(STATISTICS_FILE) as path:
                        shutil.copyfile(statistics, path)
            PartialState().wait_for_everyone()
            # one set of statistics, whoever makes a shard and whenever
            stored = store.fetch(STATISTICS_FILE) if store.exists(STATISTICS_FILE) else statistics
            self._prepare_maps(StatisticsFile(stored, read=True, write=False))
        if rank == 0:
            self._write_shared(store)
        numbered = [
            (ShardWriter(store, split.name, len(split.shards), split.form.features), number, split)
            for split in self.splits
            for number in range(len(split.shards))
        ]
        mine = [planned for planned in numbered[rank::ranks] if planned[0].done(planned[1]) is None]
        quiet = quiet_unless_terminal(self.args.disable_tqdm) or rank != 0
        tokens, start = 0, time.perf_counter()
        with tqdm(total=len(mine), desc="Extracting", unit="shard", disable=quiet) as bar:
            for writer, number, split in mine:
                tokens += writer.write(number, split.columns(split.form, split.shards[number])).tokens
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")
                bar.update()
        if rank == 0:
            pace = f"{tokens:,} tokens at {tokens / (time.perf_counter() - start):,.0f} per second"
            log(f"{len(numbered)} shards in {store}" + (f" ({len(mine)} here, {pace})" if mine else ""))

    def _begun(self, store: Store) -> bool:
        """Whether what every shard depends on is there: the initialised student and the statistics."""
        parts = [STATISTICS_FILE] if self.curriculum.hidden_stages else []
        return all(map(store.exists, [*parts, f"{STUDENT_FOLDER}/config.json"]))

    def _start_student(self, store: Store) -> None:
        """Write the student's configuration and, where they come from the teacher, its first weights."""
        task, student = self.source.task, self.inputs.student
        with tempfile.TemporaryDirectory() as folder:
            if self.curriculum.student_init == "teacher":
                self.source.start(student, self._calibration_batches)
                task.save(student, Path(folder))
            config: Any = task.backbone(student).config
            config.save_pretrained(folder)
            for file in sorted(Path(folder).rglob("*.*"), key=lambda path: path.name == "config.json"):
                with store.writing(f"{STUDENT_FOLDER}/{file.relative_to(folder).as_posix()}") as path:
                    shutil.copyfile(file, path)

    def _prepare_maps(self, file: StatisticsFile) -> None:
        self.source.prepare(file, self._calibration_batches, self.device, self.width)

    def _calibration_batches(self) -> CollatedBatches:
        return CollatedBatches(self.calibration_examples, self.encoder.batch)

    def _write_shared(self, store: Store) -> None:
        """Configs of teacher and student, tokenizer and, for a transplant, the output head."""
        with tempfile.TemporaryDirectory() as folder:
            config: Any = self.source.backbone.config
            config.save_pretrained(Path(folder) / TEACHER_FOLDER)
            self.inputs.tokenizer.save_pretrained(Path(folder) / TOKENIZER_FOLDER)
            for file in Path(folder).rglob("*.*"):
                with store.writing(file.relative_to(folder).as_posix()) as path:
                    shutil.copyfile(file, path)
        head = self.source.output_head()
        if self.identity.head is not None and head is not None:
            tensors = {name: value.detach().cpu().contiguous() for name, value in head.linear.state_dict().items()}
            with store.writing(HEAD_FILE) as path:
                save_file(tensors, path)

    def finish(self, store: Store) -> None:
        """Check that every shard is there, then write what makes the folder an extracted curriculum."""
        splits = []
        for split in self.splits:
            writer = ShardWriter(store, split.name, len(split.shards), split.form.features)
            written = [writer.done(number) for number in range(len(split.shards))]
            shards = tuple(shard for shard in written if shard is not None)
            if None in written:
                raise UserError(f"shard {writer.file(written.index(None))} was not written: run the same command again")
            splits.append(Split(split.name, shards))
        folders = (TEACHER_FOLDER, STUDENT_FOLDER, TOKENIZER_FOLDER)
        shared = [STATISTICS_FILE, HEAD_FILE, *(name for folder in folders for name in store.files(folder))]
        files = {name: store.sha256(name) for name in shared if store.exists(name)}
        manifest = Manifest(self.identity, tuple(splits), files, environment=environment())
        finish(store, manifest, {split.name: split.form.features for split in self.splits})


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
