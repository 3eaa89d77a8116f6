"""Comparing methods on one recipe: the same data order, initial students, evaluation sets, rates and budget for all."""

import contextlib
import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tutelage.core.errors import UserError
from tutelage.io.claim import Claim, claim
from tutelage.io.files import alone, is_leftover
from tutelage.io.store import Store
from tutelage.reproduction import schedules
from tutelage.reproduction.display import listed
from tutelage.reproduction.recipe import PaperRecipe, Recipe
from tutelage.reproduction.results import COMPARISON_FILE, Comparison, MethodResult
from tutelage.reproduction.run_builder import RunBuilder
from tutelage.reproduction.runner import Runner, portable
from tutelage.reproduction.search import RATE
from tutelage.reproduction.summary import summarise
from tutelage.reproduction.teachers import Teacher
from tutelage.reproduction.tuning import axes_of, first_candidate, is_searched, tune
from tutelage.reproduction.variants import COSTS, Variant
from tutelage.reproduction.workers import Workers
from tutelage.runs.environment import environment

_SETTINGS_FILE = "settings.json"

_UNKNOWN = Teacher(nn.Identity(), "not made yet")

Log = Callable[[str], None]


def compare(
    recipe: Recipe,
    output_dir: Path,
    methods: Sequence[str | Variant] | None = None,
    *,
    match: str = "samples",
    jobs: int | Workers = 1,
    command: str | None = None,
    log: Log = print,
) -> Comparison:
    """Run methods x seeds on a recipe; write `comparison.json` and return its contents.

    Args:
        recipe: what is compared on.
        output_dir: the comparison's folder; a folder that contains the same comparison is resumed.
        methods: names of methods or of the recipe's variants, or variants; default: `recipe.default_methods`.
        match: the cost that is equal for every method and one-shot: `samples`, `flops` or `seconds`.
        jobs: number of runs at the same time, each in a separate process (1: in this process), or a pool of processes.
        command: the command that repeats the comparison, for the record.
        log: called with a line of progress.

    On several teachers (`recipe.teacher_seeds`), each has a folder of its own below `output_dir`.

    Raises UserError: settings that cannot work, among them a target above what the teacher reaches, or a folder
    that contains a different comparison."""
    asked = recipe.default_methods if methods is None else methods
    variants = [method if isinstance(method, Variant) else recipe.named(method) for method in asked]
    _check(recipe, variants, match, jobs)
    if isinstance(recipe, PaperRecipe) and len(recipe.teacher_seeds) > 1:
        return _on_each_teacher(recipe, output_dir, variants if methods else None, _How(match, jobs, command, log))
    sketch = recipe.sketch_teacher()
    if sketch is not None:  # what cannot work with a teacher of this shape is refused before the training
        untrained = Teacher(sketch, "untrained")  # without checkpoints, which progressive distillation needs
        _check_curricula(recipe, untrained, output_dir, [v for v in variants if v.method != "progressive"])
    with _claimed(output_dir, recipe, match):
        log(f"teacher of {recipe.name}/{recipe.size}")
        teacher = recipe.make_teacher(output_dir)
        _check_target(recipe, teacher)
        if methods is None and not teacher.checkpoints and any(v.method == "progressive" for v in variants):
            log("progressive distillation is left out: this teacher came without checkpoints of its training")
            variants = [variant for variant in variants if variant.method != "progressive"]
        runner = Runner(recipe, teacher, output_dir, match)
        _check_curricula(recipe, teacher, output_dir, variants)
        record = _Record(recipe, output_dir, _begun(recipe, teacher, match, command), log)
        record.begin(variants)
        if jobs == 1:
            for variant in variants:
                _run_method(runner, variant, record)
        else:
            with contextlib.nullcontext(jobs) if isinstance(jobs, Workers) else Workers(jobs) as workers:
                _run_side_by_side(workers, runner, variants, record)
        shutil.rmtree(runner.builder.memory, ignore_errors=True)
        return record.end()


@dataclass(frozen=True)
class _How:
    """Arguments of `compare` that are the same for every teacher."""

    match: str
    jobs: int | Workers
    command: str | None
    log: Log


def _on_each_teacher(
    recipe: PaperRecipe, output_dir: Path, variants: Sequence[Variant] | None, how: _How
) -> Comparison:
    """Compare on one teacher after another. What was chosen with the first is used with the others."""
    parts: list[Comparison] = []
    with _claimed(output_dir, recipe, how.match):
        for seed in recipe.teacher_seeds:
            one = dataclasses.replace(recipe, teacher_seeds=(seed,))
            folder = output_dir / f"teacher-{seed}"
            mine = _fitted(variants, one, folder) if parts and variants else variants
            made = compare(one, folder, mine, match=how.match, jobs=how.jobs, log=how.log)
            parts.append(made)
            pooled(parts, recipe, how.command).write(output_dir)
            if len(parts) == 1:
                asked = None if variants is None else {variant.name for variant in variants}
                found = [method for method in made.methods if asked is None or method.name in asked]
                variants = [chosen(method) for method in found if not method.diverged]
                if not variants:
                    raise UserError("every method diverged with the first teacher: add smaller learning_rates")
    return Comparison.read(output_dir)


def chosen(method: MethodResult) -> Variant:
    """The variant with what tuning chose for it, so that there is nothing left to search."""
    candidate = method.tunings[0].candidate
    assert candidate is not None
    overrides = {**method.variant.overrides, RATE: candidate.learning_rate, **candidate.settings}
    return dataclasses.replace(method.variant, overrides=overrides, search={})


def _fitted(variants: Sequence[Variant], recipe: PaperRecipe, folder: Path) -> Sequence[Variant]:
    """The variants, with checkpoints that the recipe's teacher has."""
    if not any("checkpoint" in variant.overrides for variant in variants):
        return variants
    teacher = recipe.make_teacher(folder)
    return [dataclasses.replace(one, overrides=schedules.within(one.overrides, teacher)) for one in variants]


def pooled(parts: Sequence[Comparison], recipe: PaperRecipe, command: str | None) -> Comparison:
    """One comparison of the runs on several teachers, the first of which the methods were tuned with."""
    first = parts[0]
    methods = []
    for method in first.methods:
        runs = [
            dataclasses.replace(run, teacher=index)
            for index, part in enumerate(parts)
            for same in part.methods
            if same.name == method.name
            for run in same.runs
        ]
        methods.append(dataclasses.replace(method, runs=tuple(runs)))
    whole = dataclasses.replace(
        first,
        command=command,
        complete=len(parts) == len(recipe.teacher_seeds),
        settings=recipe.all_settings(),
        teachers=tuple(teacher for part in parts for teacher in part.teachers),
        methods=tuple(methods),
    )
    return summarise(whole, recipe.target)


class _Record:
    """The comparison so far, which is on disk after each run; several threads may add to it."""

    def __init__(self, recipe: Recipe, folder: Path, comparison: Comparison, log: Log):
        self.recipe, self.folder, self.comparison, self.log = recipe, folder, comparison, log
        self._lock = threading.Lock()

    def begin(self, variants: Sequence[Variant]) -> None:
        """Put the variants after those that are already in the folder, which stay in the report."""
        file = self.folder / COMPARISON_FILE
        earlier: tuple[MethodResult, ...] = ()
        if file.exists():
            kept, mine = Comparison.read(self.folder), self.comparison
            if (kept.recipe, kept.match, kept.settings) != (mine.recipe, mine.match, mine.settings):
                raise UserError(
                    f"{str(file)!r} is of a different comparison: delete it, or put the right one in its place"
                )
            earlier = kept.methods
        methods = {method.name: method for method in earlier} | {v.name: MethodResult(v) for v in variants}
        self.comparison = dataclasses.replace(self.comparison, methods=tuple(methods.values()))

    def put(self, result: MethodResult) -> None:
        """Replace the result of a variant; the file is written once it has a run."""
        with self._lock:
            methods = tuple(result if method.name == result.name else method for method in self.comparison.methods)
            self.comparison = dataclasses.replace(self.comparison, methods=methods)
            if result.runs:
                self._write()

    def end(self) -> Comparison:
        self.comparison = dataclasses.replace(self.comparison, complete=True)
        self._write()
        return self.comparison

    def _write(self) -> None:
        self.comparison = summarise(self.comparison, self.recipe.target)
        self.comparison.write(self.folder)


def _run_side_by_side(workers: Workers, runner: Runner, variants: Sequence[Variant], record: _Record) -> None:
    """Run every variant in a separate thread, which waits for its runs."""
    runner = dataclasses.replace(runner, workers=workers, timed=False)
    machine = {**record.comparison.environment, "jobs": workers.count}
    record.comparison = dataclasses.replace(record.comparison, environment=machine)
    with ThreadPoolExecutor(len(variants)) as threads:
        started = [threads.submit(_run_method, runner, variant, record) for variant in variants]
        try:
            for done in as_completed(started):
                done.result()
        except BaseException:
            workers.end()  # what they have not finished is resumed when the command is given again
            raise


def _run_method(runner: Runner, variant: Variant, record: _Record) -> None:
    """Tune a variant and run it on the reported seeds; the record has each run once it is finished."""
    tuning = tune(runner, variant, record.log)
    best, result = tuning.candidate, MethodResult(variant, (tuning,))
    if best is None:
        record.log(f"{variant.name} diverged at every learning rate that was tried: add smaller learning_rates")
        record.put(result)
        return
    result = dataclasses.replace(result, curriculum=portable(runner.curriculum(variant, best)))
    record.log(f"{variant.name}: chosen {best.label}, seeds {listed(runner.recipe.seeds)}")
    for runs in runner.runs(variant, best, runner.recipe.seeds):
        result = dataclasses.replace(result, runs=(*result.runs, *runs))
        record.put(result)


def _check(recipe: Recipe, variants: Sequence[Variant], match: str, jobs: int | Workers) -> None:
    """Refuse what cannot be compared."""
    if match not in COSTS:
        raise UserError(f"unknown match {match!r}: use one of {listed(COSTS)}")
    if isinstance(jobs, int) and jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    if jobs != 1 and "seconds" in (match, *(variant.match for variant in variants)):
        raise UserError("runs at the same time slow each other down: match=seconds and --match seconds need --jobs 1")
    seeds, tuning = recipe.seeds, recipe.tuning_seeds
    given = {"methods": [variant.name for variant in variants], "seeds": seeds, "learning_rates": recipe.learning_rates}
    for name, values in {**given, "tuning_seeds": tuning}.items():
        if not values and name != "tuning_seeds":
            raise UserError(f"{name} are empty: give at least one")
        if len(set(values)) != len(values):
            raise UserError(f"{name} are repeated: {listed(values)}")
    if shared := set(seeds) & set(tuning):
        raise UserError(f"seeds {sorted(shared)} are tuning seeds too: rates must not be chosen on reported seeds")
    searched = (is_searched(recipe, axes_of(recipe, variant, _UNKNOWN)) for variant in variants)
    if not tuning and any(searched):
        raise UserError("tuning_seeds are empty: give some, or trials=1 and a single learning rate, which is then used")


def _check_curricula(recipe: Recipe, teacher: Teacher, folder: Path, variants: Sequence[Variant]) -> None:
    """Refuse variants that cannot be run: what the search begins with, and every rate and value that a variant asks for."""
    builder = RunBuilder(recipe, teacher, folder)
    for variant in variants:
        first = first_candidate(axes_of(recipe, variant, teacher))
        builder.check(variant, first)
        for name, values in variant.search.items():
            for value in values:
                other = {name: value} if name == RATE else {"settings": {**first.settings, name: value}}
                builder.check(variant, dataclasses.replace(first, **other))


def _check_target(recipe: Recipe, teacher: Teacher) -> None:
    if recipe.target is None or recipe.metric not in teacher.metrics:
        return
    reaches = float(teacher.metrics[recipe.metric])
    if not recipe.reached(reaches, recipe.target):
        raise UserError(
            f"the target {recipe.metric} {recipe.target} is beyond the teacher, which reaches {reaches:.4f}: lower the "
            "target, or train the teacher further"
        )


@contextlib.contextmanager
def _claimed(folder: Path, recipe: Recipe, match: str) -> Iterator[None]:
    """Take the folder for this comparison, and let no other process work in it meanwhile; UserError where it contains
    something else, or another process works in it."""
    store = Store(folder)
    mine = {"recipe": recipe.name, "size": recipe.size, "match": match, **recipe.all_settings()}
    with alone(folder, "making the comparison"):
        # at most, a comparison was refused or killed before it wrote anything else
        if {file.name for file in folder.iterdir() if not is_leftover(file)} <= {_SETTINGS_FILE}:
            store.write(_SETTINGS_FILE, json.dumps(mine, indent=1, default=str) + "\n")
        claim(store, Claim(_SETTINGS_FILE, mine, "a comparison"))
        yield


def _begun(recipe: Recipe, teacher: Teacher, match: str, command: str | None) -> Comparison:
    same = {name: getattr(recipe, name) for name in ("size", "metric", "better", "target", "seeds")}
    return Comparison(
        recipe=recipe.name,
        command=command,
        complete=False,
        match=match,
        budget=recipe.budget_samples,
        settings=recipe.all_settings(),
        teachers=(teacher.record,),
        environment=environment(),
        **same,
    )
