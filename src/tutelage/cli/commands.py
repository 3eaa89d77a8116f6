"""The sub-commands: parse, call, print.

Public names: `COMMANDS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from tutelage.cli.compare import compare_command, progress, report_command
from tutelage.cli.diagnose import diagnose_command
from tutelage.cli.parsing import Parser
from tutelage.core.errors import UserError
from tutelage.runs.distill import describe, distill, quiet_unless_terminal
from tutelage.runs.evaluate import evaluate
from tutelage.runs.extract import DEFAULT_TOP_K, ExtractArguments, describe_extraction, extract
from tutelage.runs.options import ConfigParser, as_flags, read_options
from tutelage.runs.plan import describe_plan, plan
from tutelage.runs.plan_extraction import describe_extraction_plan, plan_extraction, read_count
from tutelage.runs.settings import DEFAULT_LENGTH, RunArguments
from tutelage.targets.extracted import ExtractedCurriculum
from tutelage.targets.manifest import MANIFEST_FILE
from tutelage.tasks.embedded import DEFAULT_STUDENT, DEFAULT_TEACHER
from tutelage.training.config import CurriculumConfig


def _parse_config(kinds: Sequence[Any], arguments: Sequence[str], prog: str, extra: Callable[[Any], None]) -> Any:
    """Dataclasses from a YAML file (`--config`) overridden by flags, and the namespace of what `extra` adds."""
    parser = ConfigParser(kinds, prog=prog)
    parser.add_argument("--config", help="YAML file with any of these options")
    extra(parser)
    config = parser.parse_known_args(arguments)[0].config
    if config is not None:
        known = {action.dest for action in parser._actions} - {"help", "config", "json"}
        arguments = [*_flags(Path(config), known), *arguments]
    *values, rest, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UserError(f"unknown option {unknown[0]!r}: see {prog} --help")
    return (*values, rest)


def _flags(path: Path, known: set[str]) -> list[str]:
    """A YAML file's options as flags, so that both are parsed alike."""
    options = read_options(path)
    for key in options:
        if key not in known:
            raise UserError(f"config {str(path)!r} has an unknown option {key!r}")
    return as_flags(options)


def _distill(arguments: Sequence[str]) -> None:
    run, args, _ = _parse_config((RunArguments, CurriculumConfig), arguments, "tutelage distill", lambda parser: None)
    result = distill(run, args)
    if args.process_index == 0:
        print(describe(result, args.output_dir))
    if torch.distributed.is_initialized():  # its threads can abort a process that just ends
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _extract(arguments: Sequence[str]) -> None:
    def extra(parser: Any) -> None:
        parser.add_argument("--teacher", help="folder or Hub name; the same as --teacher_model_name_or_path")

        # processes wait for the one with the longest share, however long that takes
        parser.set_defaults(ddp_timeout=30 * 24 * 3600)

    kinds = (RunArguments, CurriculumConfig, ExtractArguments)
    run, args, extraction, rest = _parse_config(kinds, arguments, "tutelage extract", extra)
    args.teacher_model_name_or_path = rest.teacher or args.teacher_model_name_or_path
    manifest = extract(run, args, extraction, log=progress)
    if args.process_index == 0:
        print(describe_extraction(args.output_dir, manifest))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _inspect(arguments: Sequence[str]) -> None:
    parser = Parser(prog="tutelage inspect")
    parser.add_argument("folder", help="output_dir of tutelage extract")
    parser.add_argument("--quick", action="store_true", help="do not read the files to compare their checksums")
    parser.add_argument("--json", action="store_true", help="print the manifest")
    options = parser.parse_args(arguments)
    stored = ExtractedCurriculum(options.folder, check=not options.quick)
    if options.json:
        print(stored.store.read(MANIFEST_FILE), end="")
        return
    print(describe_extraction(str(stored.store), stored.manifest))
    print("checksums: not compared" if options.quick else "checksums: all as in the manifest")


def _plan(arguments: Sequence[str]) -> None:
    def extra(parser: Any) -> None:
        parser.add_argument("--teacher", help="folder or Hub name; the same as --teacher_model_name_or_path")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument("--tokens", help="also plan an extraction of so many tokens, e.g. 1T")
        parser.add_argument("--projection_dim", type=int, help="width of its projections; the student's if left out")
        parser.add_argument("--runs", type=int, default=3, help="students to be trained from it")
        parser.add_argument("--tokens_per_second", type=float, help="of the teacher's forward pass, measured")

    run, args, rest = _parse_config((RunArguments, CurriculumConfig), arguments, "tutelage plan", extra)
    teacher = rest.teacher or args.teacher_model_name_or_path or DEFAULT_TEACHER
    student = run.student or (DEFAULT_STUDENT if teacher == DEFAULT_TEACHER else None)
    if student is None:
        raise UserError("name a student, e.g. --student layers=3,hidden_size=192")
    tokens = None if rest.tokens is None else read_count(rest.tokens)
    length = run.max_length or DEFAULT_LENGTH
    planned = plan(teacher, student, args, length)
    if tokens is not None:
        shares = {"causal_lm": 1.0, "masked_lm": run.mlm_probability}
        planned["extraction"] = plan_extraction(
            planned,
            tokens,
            vocabulary=planned["vocabulary"],
            width=planned["student"]["hidden_size"] if rest.projection_dim is None else rest.projection_dim,
            top_k=min(args.top_k or DEFAULT_TOP_K, planned["outputs"]),
            predicting=shares.get(planned["task"], 1 / length),  # others have one output a row
            runs=rest.runs,
            tokens_per_second=rest.tokens_per_second,
        )
    if rest.json:
        print(json.dumps(planned, indent=2))
        return
    print(describe_plan(planned))
    if tokens is not None:
        print(describe_extraction_plan(planned["extraction"]))


def _evaluate(arguments: Sequence[str]) -> None:
    parser = Parser(prog="tutelage evaluate")
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--dataset", required=True, help="Hub name, `datasets` folder, or .txt/.jsonl/.parquet file")
    parser.add_argument("--teacher", help="also compare with this model: folder or Hub name")
    parser.add_argument("--task", help="causal_lm, masked_lm, sequence_classification or embedding")
    parser.add_argument("--split", help="split of the dataset")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--max_length", type=int, help="tokens a sequence")
    parser.add_argument("--max_samples", type=int, help="evaluate on the first so many sequences")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--mlm_probability", type=float, default=0.3, help="share of tokens masked (masked_lm)")
    parser.add_argument("--blocks", help="dotted name of the list of blocks, where several are found")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with a checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = vars(parser.parse_args(arguments))
    as_json = options.pop("json")
    result = evaluate(**options)
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<22}{value:.4f}" if isinstance(value, float) else f"{name:<22}{value}")


def _quietly(command: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
    def run(arguments: Sequence[str]) -> None:
        transformers_logging.set_verbosity_error()
        quiet_unless_terminal()
        command(arguments)

    return run


COMMANDS = {
    "distill": _quietly(_distill),
    "extract": _quietly(_extract),
    "inspect": _quietly(_inspect),
    "plan": _quietly(_plan),
    "evaluate": _quietly(_evaluate),
    "compare": _quietly(compare_command),
    "report": _quietly(report_command),
    "diagnose": _quietly(diagnose_command),
}
