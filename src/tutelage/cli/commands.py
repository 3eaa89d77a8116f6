"""The sub-commands: parse, call, print.

Public names: `run_command`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from logging import CRITICAL
from typing import Any

import torch
from datasets.utils import logging as datasets_logging
from transformers.utils import logging as transformers_logging

from tutelage.cli.help import CommandHelp, progress, render_help
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
from tutelage.tasks.registry import get_task
from tutelage.training.config import CurriculumConfig

_EXTRACTED = "extracted-curriculum"

Arguments = Sequence[str]


@dataclass(frozen=True)
class PrintOptions:
    """How a command prints."""

    json: bool = field(default=False, metadata={"help": "Print JSON."})


@dataclass(frozen=True)
class PlanOptions:
    """What `tutelage plan` adds."""

    tokens: str | None = field(default=None, metadata={"help": "Also plan an extraction of this many tokens, e.g. 1T."})
    projection_dim: int | None = field(
        default=None, metadata={"help": "Width of the stored projections; default: the student's."}
    )
    runs: int = field(default=3, metadata={"help": "Students to be trained from the extraction."})
    tokens_per_second: float | None = field(
        default=None, metadata={"help": "Tokens per second of the teacher's forward pass, as measured."}
    )


@dataclass(frozen=True)
class InspectOptions:
    """What `tutelage inspect` reads."""

    quick: bool = field(default=False, metadata={"help": "Do not read the files to compare their checksums."})


def _parse(kinds: Sequence[Any], arguments: Arguments, prog: str, shown: CommandHelp, **defaults: Any) -> Any:
    """The dataclasses of a command; None after its help was printed."""
    parser = OptionParser(kinds, prog=prog)
    parser.set_defaults(**defaults)
    if {"-h", "--help"} & set(arguments):
        parser.add_argument("--config", help="YAML file with any of these options")
        print(render_help(parser, shown), end="")
        return None
    return parse_options(parser, arguments)[:-1]


def _distill(arguments: Arguments) -> None:
    shown = CommandHelp(
        "Trains a student from a teacher. Without options: the teacher, student and text that come with tutelage.",
        "tutelage distill --teacher T --student layers=3,hidden_size=192 --dataset corpus.txt --max_steps 2000",
        (
            *("teacher_model_name_or_path", "student", "dataset", "eval_dataset", "max_length", "max_steps", "method"),
            *("learning_rate", "output_dir", "curriculum_dir", "config"),
        ),
    )
    parsed = _parse((RunOptions, CurriculumConfig), arguments, "tutelage distill", shown)
    if parsed is None:
        return
    run, args = parsed
    result = distill(run, args)
    if args.process_index == 0:
        print(describe(result, args.output_dir))
    _leave_group()


def _extract(arguments: Arguments) -> None:
    shown = CommandHelp(
        "Runs the teacher once and stores what a student learns from it. Students then train without the teacher.",
        "tutelage extract --teacher T --dataset corpus.txt --student layers=3,hidden_size=192 --max_steps 2000",
        (
            *("teacher_model_name_or_path", "student", "dataset", "eval_dataset", "max_length", "max_steps", "stages"),
            *("projection_dim", "dtype", "output_dir", "config"),
        ),
    )
    kinds = (RunOptions, CurriculumConfig, ExtractOptions)
    # processes wait for the one with the most shards, however long that takes
    waiting = 30 * 24 * 3600
    parsed = _parse(kinds, arguments, "tutelage extract", shown, ddp_timeout=waiting, output_dir=_EXTRACTED)
    if parsed is None:
        return
    run, args, options = parsed
    manifest = extract(run, args, options, log=progress)
    if args.process_index == 0:
        print(describe_extraction(args.output_dir, manifest))
    _leave_group()


def _leave_group() -> None:
    """End together: the threads of a process group can abort a process that just ends."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _inspect(arguments: Arguments) -> None:
    shown = CommandHelp(
        "Says what an extracted curriculum contains, and compares its files with their checksums. Without a folder: "
        f"{_EXTRACTED}.",
        f"tutelage inspect {_EXTRACTED}",
        ("quick", "json"),
    )
    folders = [word for word in arguments if not word.startswith("-")][:1]
    options = [word for word in arguments if word not in folders]
    parsed = _parse((InspectOptions, PrintOptions), options, "tutelage inspect FOLDER", shown)
    if parsed is None:
        return
    inspect, output = parsed
    extracted = ExtractedCurriculum(folders[0] if folders else _EXTRACTED, check=not inspect.quick)
    if output.json:
        print(extracted.store.read(MANIFEST_FILE), end="")
        return
    print(describe_extraction(str(extracted.store), extracted.manifest))
    print("checksums: not compared" if inspect.quick else "checksums: all as in the manifest")


def _plan(arguments: Arguments) -> None:
    shown = CommandHelp(
        "Shows blocks, stages, predicted cost and, with --tokens, what an extraction would take. Trains nothing.",
        "tutelage plan --teacher T --student layers=3,hidden_size=192 --max_steps 2000",
        (
            *("teacher_model_name_or_path", "student", "max_length", "max_steps", "method", "layer_map", "tokens"),
            *("tokens_per_second", "json", "config"),
        ),
    )
    kinds = (RunOptions, CurriculumConfig, PlanOptions, PrintOptions)
    parsed = _parse(kinds, arguments, "tutelage plan", shown)
    if parsed is None:
        return
    run, args, options, output = parsed
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


def _evaluate(arguments: Arguments) -> None:
    shown = CommandHelp(
        "Measures a model on held-out data, alone or against a teacher. Without options: the embedded teacher and text.",
        "tutelage evaluate --model student --dataset held-out.txt --teacher T",
        (
            *("model", "dataset", "teacher", "max_length", "max_samples", "mlm_probability", "batch_size", "task"),
            *("text_column", "json"),
        ),
    )
    parsed = _parse((EvaluateOptions, PrintOptions), arguments, "tutelage evaluate", shown)
    if parsed is None:
        return
    options, output = parsed
    result = evaluate(options)
    if output.json:
        print(result.to_json())
        return
    named = {"model": result.model, "dataset": result.dataset, "teacher": result.teacher or "none"}
    for name, value in {**named, "sequences": result.sequences}.items():
        print(f"{name:<22}{value}")
    for name, metric in result.metrics.items():
        print(f"{name:<22}{metric:.4f}")


def _compare(arguments: Arguments) -> None:
    from tutelage.cli.compare import compare_command

    compare_command(arguments)


def _report(arguments: Arguments) -> None:
    from tutelage.cli.compare import report_command

    report_command(arguments)


def _diagnose(arguments: Arguments) -> None:
    from tutelage.cli.diagnose import diagnose_command

    diagnose_command(arguments)


_COMMANDS: dict[str, Callable[[Arguments], None]] = {
    "distill": _distill,
    "extract": _extract,
    "inspect": _inspect,
    "plan": _plan,
    "evaluate": _evaluate,
    # the reproduction is imported when it is asked for: the commands above work without it
    "compare": _compare,
    "report": _report,
    "diagnose": _diagnose,
}


def run_command(name: str, arguments: Arguments) -> None:
    """Run a command with libraries quietened."""
    transformers_logging.set_verbosity_error()
    datasets_logging.set_verbosity(CRITICAL)  # its reasons are in our errors
    quiet_unless_terminal()
    _COMMANDS[name](arguments)
