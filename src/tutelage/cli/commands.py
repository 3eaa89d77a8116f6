"""The sub-commands: parse, call, print."""

import dataclasses
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from logging import CRITICAL

import torch
from datasets.utils import logging as datasets_logging
from transformers.utils import logging as transformers_logging

from tutelage.cli.help import CommandHelp, progress, render_help
from tutelage.core.errors import LARGEST, UserError, check_positive, check_range, check_texts
from tutelage.core.interrupts import interrupts
from tutelage.runs.distill import describe, distill
from tutelage.runs.environment import quiet_unless_terminal
from tutelage.runs.evaluate import EvaluateOptions, evaluate
from tutelage.runs.extraction.job import describe_extraction, extract
from tutelage.runs.extraction.options import DEFAULT_TOP_K, ExtractOptions
from tutelage.runs.inputs import DEFAULT_LENGTH, DEFAULT_MLM_PROBABILITY, RunOptions
from tutelage.runs.options import OptionParser, parse_options
from tutelage.runs.plan import describe_plan, plan
from tutelage.runs.plan_extraction import ExtractionRequest, describe_extraction_plan, plan_extraction, read_count
from tutelage.targets.folder import ExtractedCurriculum
from tutelage.targets.manifest import MANIFEST_FILE
from tutelage.tasks.loading import MOST_WIDTH
from tutelage.tasks.registry import get_task
from tutelage.training.config import CurriculumConfig, option

_EXTRACTED = "extracted-curriculum"


@dataclass(frozen=True)
class PrintOptions:
    """How a command prints."""

    json: bool = option("Print JSON.", False)


@dataclass(frozen=True)
class PlanOptions:
    """What `tutelage plan` adds."""

    tokens: str | None = option("Also plan an extraction of this many tokens, e.g. 1T.")
    projection_dim: int | None = option("Width of the stored projections; default: the student's.")
    runs: int = option("Students to be trained from the extraction.", 3)
    tokens_per_second: float | None = option("Tokens per second of the teacher's forward pass, as measured.")

    def __post_init__(self) -> None:
        check_texts(self)
        check_range("projection_dim", self.projection_dim, 1, MOST_WIDTH)
        check_range("runs", self.runs, 1, LARGEST)
        check_positive("tokens_per_second", self.tokens_per_second)


@dataclass(frozen=True)
class InspectOptions:
    """What `tutelage inspect` reads."""

    quick: bool = option("Do not read the files to compare their checksums.", False)


def _distill(run: RunOptions, args: CurriculumConfig) -> None:
    result = distill(run, args, log=progress)
    if args.process_index == 0:
        print(describe(result, str(args.output_dir)))


def _extract(run: RunOptions, args: CurriculumConfig, options: ExtractOptions) -> None:
    manifest = extract(run, args, options, log=progress)
    if args.process_index == 0:
        print(describe_extraction(str(args.output_dir), manifest))


def _inspect(folder: str, inspect: InspectOptions, output: PrintOptions) -> None:
    if not folder.strip():
        raise UserError(f"the folder is empty text: name one, or leave it out for {_EXTRACTED}")
    extracted = ExtractedCurriculum(folder, check=not inspect.quick)
    if output.json:
        print(extracted.store.read(MANIFEST_FILE), end="")
        return
    print(describe_extraction(str(extracted.store), extracted.manifest))
    print("checksums: not compared" if inspect.quick else "checksums: all as in the manifest")


def _plan(run: RunOptions, args: CurriculumConfig, options: PlanOptions, output: PrintOptions) -> None:
    tokens = None if options.tokens is None else read_count(options.tokens)
    planned = plan(run, args)
    if tokens is not None:
        masked = run.mlm_probability or DEFAULT_MLM_PROBABILITY
        request = ExtractionRequest(
            tokens,
            planned.student.hidden_size if options.projection_dim is None else options.projection_dim,
            min(args.top_k or DEFAULT_TOP_K, planned.outputs),
            options.runs,
            options.tokens_per_second,
            get_task(planned.task).outputs_per_token(run.max_length or DEFAULT_LENGTH, masked),
        )
        planned = dataclasses.replace(planned, extraction=plan_extraction(planned, request))
    if output.json:
        print(planned.to_json())
        return
    print(describe_plan(planned))
    if planned.extraction is not None:
        print(describe_extraction_plan(planned.extraction))


def _evaluate(options: EvaluateOptions, output: PrintOptions) -> None:
    result = evaluate(options)
    if output.json:
        print(result.to_json())
        return
    tests = {"pairs": result.pairs, "retrieval": result.retrieval}
    named = {"model": result.model, "dataset": result.dataset, **tests, "teacher": result.teacher or "none"}
    for name, value in {**named, "sequences": result.sequences if result.dataset else None}.items():
        if value is not None:
            print(f"{name:<30}{value}")
    for name, metric in result.metrics.items():
        print(f"{name:<30}{f'{metric:,}' if isinstance(metric, int) else f'{metric:.4f}'}")


_SCREEN = "teacher_model_name_or_path student dataset eval_dataset max_length max_steps"
_COMMANDS = {
    "distill": CommandHelp(
        _distill,
        (RunOptions, CurriculumConfig),
        "Trains a student from a teacher. Without options: the teacher, student and text that come with tutelage.",
        "--teacher T --student layers=3,hidden_size=192 --dataset corpus.txt --max_steps 2000",
        f"{_SCREEN} preset method student_init learning_rate output_dir curriculum_dir config",
    ),
    "extract": CommandHelp(
        _extract,
        (RunOptions, CurriculumConfig, ExtractOptions),
        "Runs the teacher once and stores what a student learns from it. Students then train without the teacher.",
        "--teacher T --dataset corpus.txt --student layers=3,hidden_size=192 --max_steps 2000",
        f"{_SCREEN} preset student_init stages projection_dim dtype output_dir config",
        # processes wait for the one with the most shards, however long that takes
        {"ddp_timeout": 30 * 24 * 3600, "output_dir": _EXTRACTED},
    ),
    "inspect": CommandHelp(
        _inspect,
        (InspectOptions, PrintOptions),
        "Says what an extracted curriculum contains, and compares its files with their checksums. Without a folder: "
        f"{_EXTRACTED}.",
        _EXTRACTED,
        "quick json",
    ),
    "plan": CommandHelp(
        _plan,
        (RunOptions, CurriculumConfig, PlanOptions, PrintOptions),
        "Shows blocks, stages, predicted cost and, with --tokens, what an extraction would take. With "
        "--dataset also how much of the teacher's states a student keeps that starts from it.",
        "--teacher T --student layers=3,hidden_size=192 --max_steps 2000",
        "teacher_model_name_or_path student dataset max_length max_steps preset method student_init layer_map tokens "
        "tokens_per_second json config",
    ),
    "evaluate": CommandHelp(
        _evaluate,
        (EvaluateOptions, PrintOptions),
        "Measures a model on held-out data, alone or against a teacher; a sentence encoder also on rated pairs and on "
        "retrieval. Without options: the embedded teacher and text.",
        "--model student --dataset held-out.txt --teacher T",
        "model dataset teacher pairs retrieval max_length max_samples mlm_probability batch_size measure_speed task "
        "text_column json",
    ),
}
# imported when it is asked for: the commands above work without the reproduction
_REPRODUCTION = {
    "compare": "tutelage.cli.compare:compare_command",
    "report": "tutelage.cli.compare:report_command",
    "diagnose": "tutelage.cli.diagnose:diagnose_command",
}


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Run a command, or print its help, with libraries quietened."""
    transformers_logging.set_verbosity_error()
    datasets_logging.set_verbosity(CRITICAL)  # its reasons are in our errors
    quiet_unless_terminal()
    if name in _REPRODUCTION:
        with interrupts.importing():
            command_of_reproduction = pkgutil.resolve_name(_REPRODUCTION[name])
        command_of_reproduction(arguments)
        return
    command = _COMMANDS[name]
    folders = []
    if name == "inspect":
        before = dict(zip(arguments[1:], arguments, strict=False))
        words = (word for word in arguments if not word.startswith("-") and before.get(word) != "--config")
        folders = [next(words, _EXTRACTED)]
    parser = OptionParser(command.kinds, prog=f"tutelage {name}{' FOLDER' * len(folders)}")
    parser.add_argument("--config", help="YAML file with any of these options")
    parser.set_defaults(**command.defaults)
    if {"-h", "--help"} & set(arguments):
        print(render_help(parser, command.summary, f"tutelage {name} {command.example}", command.main.split()), end="")
        return
    command.run(*folders, *parse_options(parser, [word for word in arguments if word not in folders]))
    if (
        torch.distributed.is_initialized()
    ):  # end together: threads of a process group can abort a process that just ends
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
