"""From a trainer's arguments to models, curriculum and objective; every refusal happens here, before any compute."""

import copy
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tutelage.core.blocks import find_blocks
from tutelage.core.curriculum import Curriculum
from tutelage.core.errors import UserError, as_user_error
from tutelage.core.inputs import text_config
from tutelage.core.stages import JointStage, fitting_layer_map, parse_layer_map
from tutelage.targets.extracted import ExtractedTargets
from tutelage.targets.folder import ExtractedCurriculum, check_storable
from tutelage.targets.identity import data_fingerprint, model_hash, tokenizer_hash
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import NoTargets, TargetSource
from tutelage.tasks.base import Task
from tutelage.tasks.initialization.student import basis_kind
from tutelage.tasks.loading import load_tokenizer
from tutelage.tasks.registry import detect_task, get_task
from tutelage.tasks.students import WEIGHTS, weights_of
from tutelage.training import checks, warm_start
from tutelage.training.config import AFTER_START, CurriculumConfig
from tutelage.training.objective import StageObjective
from tutelage.training.resolution import ResolvedRun, default_method, resolve
from tutelage.training.self_check import check_precision, run_probe

_log = logging.getLogger(__name__)
_SHORT = 128  # tokens of a row
Teacher = nn.Module | str | TargetSource | None


@dataclass(frozen=True)
class Given:
    """What a trainer was given."""

    model: nn.Module | str  # the student
    teacher: Teacher
    train_dataset: Any
    eval_dataset: Any
    tokenizer: PreTrainedTokenizerBase | None
    curriculum: Curriculum | None


@dataclass(frozen=True)
class Prepared:
    """What a trainer trains, and by which stages."""

    run: ResolvedRun
    objective: StageObjective
    train_dataset: Any
    eval_dataset: Any
    tokenizer: PreTrainedTokenizerBase | None


def prepare(given: Given, args: CurriculumConfig, devices: int | None = None) -> Prepared:
    """Load what is given by name, decide what was left open, and check that everything fits together.

    The student trains on `devices`; None is those of this run. Raises UserError for anything that cannot work."""
    named = (part for part in (given.model, given.teacher) if isinstance(part, str))
    checkpoints = args.teacher_checkpoints or ()
    checks.check_not_read(args.output_dir, args.teacher_model_name_or_path, args.curriculum_dir, *named, *checkpoints)
    source = open_source(given, args)
    task, student, tokenizer = source.task, given.model, given.tokenizer or source.tokenizer
    if isinstance(student, str):
        loaded = task.load(student, what="student", trust_remote_code=args.trust_remote_code)
        loaded.__dict__[WEIGHTS] = "teacher" if source.stored_start(student) else "own"
        student = loaded
    _ready(student, args)
    eval_dataset = source.evaluation_rows(given.eval_dataset)
    models = [student, *source.models]
    if any(model is student for model in source.models):
        raise UserError(
            "the student is the teacher: one model cannot be both, since a teacher is frozen; give a copy (copy.deepcopy)"
        )
    theirs = {id(parameter) for model in source.models for parameter in model.parameters()}
    if common := [name for name, parameter in student.named_parameters() if id(parameter) in theirs]:
        what = f"student and teacher share {common[0]} (of {len(common)} parameters)"
        raise UserError(f"{what}, so that training would change the teacher: give the student a copy (copy.deepcopy)")
    for model in models:
        task.check_model(model)
    checks.check_recomputing(student, bool(args.gradient_checkpointing))

    check_precision(student, args.student_dtype == "stored")
    watched = [
        run_probe(name, model, task, args.blocks) for name, model in zip(("student", "teacher"), models, strict=False)
    ]
    outputs = checks.shared_outputs(student, source, tokenizer)
    checks.check_output_names(student, source)
    checks.compare_sizes(student, source)
    longest = checks.check_dataset(given.train_dataset, models, task, "training")
    longest_held_out = checks.check_dataset(eval_dataset, models, task, "evaluation")
    _choose_attention(models, args, longest_held_out if given.train_dataset is None else longest)
    args = decide_start(args, student, source)
    student_blocks = len(find_blocks(task.backbone(student), args.blocks))
    rows = len(given.train_dataset) if hasattr(given.train_dataset, "__len__") else None
    blocks, fixed = (student_blocks, source.blocks), source.fixed_settings(student_blocks)
    run = resolve(args, blocks, fixed, rows, default_warm_start(task, student), given.curriculum, devices)
    if given.curriculum is not None:
        _compare_start(args, given.curriculum, student)
    run = replace(run, curriculum=with_basis(run.curriculum, task, models))
    if args.torch_compile and any(isinstance(stage, JointStage) for stage in run.curriculum.stages):
        warnings.warn("torch_compile does nothing in a joint stage, which is not compiled: leave it out", stacklevel=2)
    checks.check_output(run.curriculum, task)
    for side, seen in zip(("student", "teacher"), watched, strict=False):
        if seen is not None:
            seen.check(run.curriculum.places(side))
    source.attach(run.curriculum, student, outputs)
    objective = StageObjective(
        student, source, container=args.blocks, chunk_size=args.logits_chunk_size, embedding_loss=args.embedding_loss
    )
    warm_start.check(objective)
    train_dataset = source.training_rows(given.train_dataset, run.reading)
    return Prepared(run, objective, train_dataset, eval_dataset, tokenizer)


def default_warm_start(task: Task, student: nn.Module) -> str:
    """`Task.warm_start`; `none` for a student with weights of its own, whose head is trained already."""
    return "none" if weights_of(student) == "own" else task.warm_start


def _compare_start(args: CurriculumConfig, curriculum: Curriculum, student: nn.Module) -> None:
    """Warn where a curriculum of the user's own starts the student from other weights than what was given."""
    if curriculum.student_init == "teacher" and weights_of(student) == "own":
        what = "the student brings its own weights, and the curriculum's student_init='teacher' writes over them"
        warnings.warn(f"{what}: make the curriculum with student_init='random' to keep them", stacklevel=3)
    if args.student_init == "teacher" != curriculum.student_init:
        what = f"the curriculum has student_init={curriculum.student_init!r}"
        warnings.warn(f"{what}, which goes before student_init='teacher' of the settings", stacklevel=3)


def with_basis(curriculum: Curriculum, task: Task, models: Sequence[nn.Module]) -> Curriculum:
    """`curriculum` with the residual basis named, for the records, where it follows from the widths of student and teacher."""
    if curriculum.student_init != "teacher" or curriculum.residual_basis is not None or len(models) < 2:
        return curriculum
    configs: list[Any] = [text_config(getattr(task.backbone(model), "config", None)) for model in models[:2]]
    student, teacher = (getattr(config, "hidden_size", None) for config in configs)
    if student is None or teacher is None:  # `attach` refuses a model without a configuration
        return curriculum
    return replace(curriculum, residual_basis=basis_kind(curriculum, student, teacher))


def decide_start(args: CurriculumConfig, student: nn.Module, source: TargetSource) -> CurriculumConfig:
    """A copy of `args` that says what the student starts from and, if that was not given, by which method it is trained."""
    args.check_choices()  # they may have been set after the construction
    args = copy.copy(args)
    args.student_init, args.start_blocks = _start(args, student, source)
    if args.method is None:
        args.method = source.method or _usual_method(args, student)
    return args


def _usual_method(args: CurriculumConfig, student: nn.Module) -> str:
    """The method of a run that names none, neither in its settings nor by its source."""
    if args.preset == "default" and args.student_init == "teacher":
        return default_method(args, AFTER_START["method"])
    if args.preset == "default" and weights_of(student) == "own":  # stages would undo what its blocks have learnt
        return default_method(args, "one_shot")
    method: str = args.value("method")
    return method


def _start_blocks(args: CurriculumConfig, student: nn.Module, source: TargetSource) -> str | None:
    """`start_blocks` as given, or the teacher's default where it fits; None is the layer map's blocks, or the uniform ones."""
    usual = source.start_blocks
    given = args.start_blocks is not None or args.layer_map is not None
    if given or usual == "uniform" or args.preset == "paper":
        return args.start_blocks
    try:
        source.check_start(student, args.residual_basis, start_blocks=usual)
    except UserError:  # such as blocks of different kinds, which the student has as the uniform map has them
        return None
    return usual


def _start(args: CurriculumConfig, student: nn.Module, source: TargetSource) -> tuple[str | None, str | None]:
    """`student_init`: `random` or `teacher`; None leaves it to the source. A student that brings weights of its own keeps them.
    And `start_blocks`, chosen where the student starts from the teacher."""
    weights, given = weights_of(student), args.start_blocks
    if weights == "teacher":  # by an extraction
        return "teacher", given
    if not source.can_start or args.method == "scratch" or args.value("student_init") == "random":
        return args.student_init, given
    if args.student_init == "teacher" and weights != "own":
        return "teacher", _start_blocks(args, student, source)
    if args.student_init == "teacher":
        warnings.warn("the student brings its own weights: student_init='teacher' leaves it alone", stacklevel=3)
    if weights != "random" or args.warm_start not in (None, "none"):  # a warm start would write over these weights
        return "random", given
    layer_map = args.layer_map
    if layer_map is not None and source.blocks is not None:  # one that cannot work is no reason for random weights
        pairs = parse_layer_map(layer_map) if isinstance(layer_map, str) else layer_map
        fitting_layer_map(pairs, len(find_blocks(source.task.backbone(student), args.blocks)), source.blocks)
    blocks = _start_blocks(args, student, source)
    try:
        source.check_start(student, args.residual_basis, layer_map, blocks)
    except UserError as error:
        if args.residual_basis is not None or given is not None:  # they ask for the start
            raise
        _log.warning("The student starts from random weights: %s", str(error).removeprefix("student_init='teacher': "))
        return "random", given
    return "teacher", blocks


def _ready(student: nn.Module, args: CurriculumConfig) -> None:
    """Give the student the precision and the dropout that it trains with."""
    if args.student_dtype == "float32":
        _use_float32(student)
    if args.disable_dropout:
        _disable_dropout(student)


def _use_float32(student: nn.Module) -> None:
    """Keep the weights that train in float32: in half precision most updates are smaller than what a weight can change by."""
    low = [p for p in student.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if low:
        what = f"the student comes in {str(low[0].dtype).removeprefix('torch.')} and is trained in float32"
        how = "student_dtype='stored' keeps its precision, in which most updates are lost in rounding"
        warnings.warn(f"{what}; {how}", UserWarning, stacklevel=3)
    for parameter in low:
        parameter.data = parameter.data.float()


def _choose_attention(models: Sequence[nn.Module], args: CurriculumConfig, longest: int | None) -> None:
    """Set the implementation of attention, where there is a choice, in the model of transformers that each is or contains.

    In bfloat16 on the CPU, PyTorch's `scaled_dot_product_attention` is slower than plain products of matrices as long as
    all rows are short (`benchmarks/cpu.py`); `longest` is the number in the longest one, if known."""
    short = longest is not None and longest <= _SHORT
    for model in models:
        network = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
        chosen = args.attn_implementation
        if network is not None and chosen is None and short and args.bf16 and args.device.type == "cpu":
            chosen = "eager" if network.config._attn_implementation == "sdpa" else None
        if network is not None and chosen is not None:
            with as_user_error(f"attn_implementation {chosen!r} cannot be used for {type(network).__name__}"):
                network.set_attn_implementation(chosen)


def _disable_dropout(student: nn.Module) -> None:
    """Set every dropout probability to 0 in the modules of the model; its configuration, which is saved, keeps its own.

    Some modules hold it in a number of their own, with which they call `torch.nn.functional.dropout` or an attention kernel."""
    for module in student.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__)):
                setattr(module, name, 0.0)


def open_source(given: Given, args: CurriculumConfig) -> TargetSource:
    """Where the targets of a run come from: an extracted curriculum, a teacher in memory or by name, or labels alone.

    Raises UserError where an extracted curriculum is damaged or was made from something else than what was given."""
    if isinstance(given.teacher, TargetSource):
        return given.teacher
    if args.curriculum_dir is not None:
        source = open_extracted(args.curriculum_dir, args)
        compare_given(source, given, args)
        return source
    teacher = given.teacher if given.teacher is not None else args.teacher_model_name_or_path
    if args.method == "scratch" and given.curriculum is None:
        teacher = None
    reference = given.model if teacher is None else teacher
    task = get_task(args.task) if args.task else detect_task(reference, args.trust_remote_code)
    if teacher is None:
        return NoTargets(task)
    if isinstance(teacher, str):
        theirs = load_tokenizer(teacher, trust_remote_code=args.trust_remote_code)
        checks.check_tokenizers(given.tokenizer, theirs)
        if isinstance(given.model, str):
            checks.check_tokenizers(load_tokenizer(given.model, trust_remote_code=args.trust_remote_code), theirs)
        teacher = task.load(teacher, **args.teacher_loading())
    return LiveTargets(teacher, task, args.blocks)


def open_extracted(folder: str, args: CurriculumConfig) -> ExtractedTargets:
    """An extracted curriculum; UserError where it is damaged, or for a method or task other than those of `args`."""
    extracted = ExtractedCurriculum(folder, check=False)
    # remote shards are compared when they are fetched, local ones by one process
    local = extracted.store.local is not None
    extracted.check(shards=args.check_curriculum and local and args.local_process_index == 0)
    if args.value("method") not in ("extraction", "joint", "one_shot"):
        what = f"method {args.method!r} does not train from an extracted curriculum"
        raise UserError(f"{what}: leave curriculum_dir out, or choose extraction, joint or one_shot")
    check_storable(args)
    if args.task not in (None, extracted.identity.task):
        where = f"the extracted curriculum in {str(extracted.store)!r}"
        raise UserError(f"{where} is for task {extracted.identity.task}, not {args.task}: leave task out")
    return ExtractedTargets(extracted)


def compare_given(source: ExtractedTargets, given: Given, args: CurriculumConfig) -> None:
    """Raise UserError for a teacher, tokenizer or training set that the curriculum was not extracted from."""
    identity, where = source.folder.identity, f"the extracted curriculum in {str(source.folder.store)!r}"
    if given.tokenizer is not None and tokenizer_hash(given.tokenizer) != identity.tokenizer:
        checks.check_tokenizers(given.tokenizer, source.tokenizer)  # says in which entry
        raise UserError(f"{where} was made with a different tokenizer: use the one in its folder")
    teacher = given.teacher if given.teacher is not None else args.teacher_model_name_or_path
    if isinstance(teacher, str):
        teacher = source.task.load(teacher, **args.teacher_loading())
    if isinstance(teacher, nn.Module) and model_hash(teacher) != identity.teacher.hash:
        dtype = f"the same teacher loaded with a different dtype ({identity.teacher.dtype})"
        what = f"a different teacher ({identity.teacher.name}), or from {dtype}"
        raise UserError(f"{where} was made from {what}: leave the teacher out, or extract again")
    if given.train_dataset is not None and data_fingerprint(given.train_dataset) != identity.data.fingerprint:
        streamed = ", the first rows of a stream" if identity.data.streamed else ""
        what = f"different data ({identity.data.name}, {identity.data.rows:,} rows{streamed})"
        how = "leave the dataset out, since the extracted curriculum contains it, or extract again"
        raise UserError(f"{where} was made from {what}: {how}")
