"""Our one-shot against TRL's trainer for distillation: the same weights, batches, optimiser and budget.

    python -m pip install -c constraints.txt -e . trl==1.16.0
    python benchmarks/trl_one_shot.py --output results/trl_one_shot
    python benchmarks/trl_one_shot.py --system text-clm --rates 3e-3 1e-2 --output results/trl_one_shot_text

`--system` is the embedded teacher with the defaults of `tutelage distill --method one_shot --student_init random`, or a recipe
for causal text, whose teacher is trained first if it was not. TRL's trainer is `trl.experimental.gkd.GKDTrainer` with `lmbda`
0 (no text of the student), `seq_kd` off (no text of the teacher) and `beta` 0: the loss is KL(teacher || student). It is a mean
over predicted positions, as ours, and always at temperature 1. (`trl.DistillationTrainer` learns from the student's own text
only.) The ids that each student was given in training are compared: the program stops if they differ. For the last seed ours is
trained once more with the output loss in smaller chunks, which changes nothing but rounding. Pairs that are in OUTPUT already
are not trained again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from tutelage.reproduction.recipes import resolve
from tutelage.runs.environment import environment, quiet_unless_terminal
from tutelage.runs.inputs import RunInputs, RunOptions, load_inputs, with_defaults
from tutelage.targets.live import LiveTargets
from tutelage.tasks.base import EvaluationTools
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_TEXT
from tutelage.tasks.language import CausalCollator
from tutelage.training.config import CurriculumConfig
from tutelage.training.trainer import CurriculumTrainer

ONE_SHOT = {"method": "one_shot", "student_init": "random"}
# of GKDTrainer alone; bfloat16 and checkpointing are on by default there
GKD = {"lmbda": 0.0, "beta": 0.0, "seq_kd": False, "bf16": False, "activation_checkpointing": False}
CHUNK = 500  # positions whose logits are held at a time, in the run that shows what rounding does
_PLACES = ("output_dir", "logging_dir", "run_name")  # settings that do not change what is learned


def embedded(seed: int) -> tuple[RunInputs, dict[str, Any]]:
    """What `tutelage distill` has by default, evaluated on the whole held-out text; and its settings."""
    given = RunOptions(dataset=DEFAULT_TEXT, eval_dataset=DEFAULT_EVAL_TEXT)
    args = CurriculumConfig(seed=seed, **ONE_SHOT)  # type: ignore[arg-type]
    options, args = with_defaults(given, args)
    fields = {"max_steps": 200, "per_device_train_batch_size": args.value("per_device_train_batch_size")}
    fields |= {"lr_scheduler_type": "cosine", "warmup_steps": args.value("warmup_steps")}
    return load_inputs(options, args), fields


def recipe(name: str, seed: int) -> tuple[RunInputs, dict[str, Any]]:
    """Teacher, student, text and settings of a recipe for causal text."""
    system: Any = resolve(name if "/" in name else f"{name}/laptop", {})
    teacher: Any = system.make_teacher(Path(tempfile.gettempdir())).model
    steps = system.budget_samples // system.batch_size
    rows = (system.train_data((seed,), system.budget_samples), system.eval_data(()))
    names = {"teacher": name, "student": name, "dataset": name}
    student = system.make_student((seed,))
    inputs = RunInputs(LiveTargets(teacher), student, system.tokenizer, *rows, system.collator, names)
    fields = {name: value for name, value in system.arguments().items() if name != "preset"}
    return inputs, {**fields, "max_steps": steps, "per_device_train_batch_size": system.batch_size}


def ours(inputs: RunInputs, student: nn.Module, fields: dict[str, Any]) -> Any:
    """Our trainer for one-shot."""
    args = CurriculumConfig(**ONE_SHOT, **fields)
    rows = (inputs.train_dataset, inputs.eval_dataset)
    return CurriculumTrainer(student, inputs.source, args, *rows, inputs.tokenizer, inputs.collator)


def theirs(inputs: RunInputs, student: nn.Module, fields: dict[str, Any]) -> Any:
    """TRL's."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # of an environment of its own

    source: Any = inputs.source
    collator = CausalCollator(inputs.tokenizer.pad_token_id, always_mask=True)
    data = {"train_dataset": inputs.train_dataset, "data_collator": collator, "processing_class": inputs.tokenizer}
    return GKDTrainer(student, source.model, GKDConfig(**GKD, **fields), **data)


def train(
    make: Callable[..., Any], inputs: RunInputs, fields: dict[str, Any]
) -> tuple[dict[str, float], str, TrainingArguments]:
    """Train a copy of the student: its metrics on held-out text, a checksum of the ids it was given, and the settings."""
    student = copy.deepcopy(inputs.student)
    seen = hashlib.sha256()

    def record(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if module.training and len(arguments[0]) > 1:  # our trainer counts FLOPs on one row
            seen.update(arguments[0].numpy().tobytes())

    embedding: Any = student.get_input_embeddings()  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(inputs, student, {**fields, "output_dir": folder})
        handle = embedding.register_forward_pre_hook(record)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        handle.remove()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    batches = DataLoader(inputs.eval_dataset, batch_size=16, collate_fn=inputs.collator)  # type: ignore[arg-type]
    source = inputs.source
    found = source.task.evaluate(student.eval(), iter(batches), source.output, EvaluationTools(source.outputs))
    kept = {name: found[name] for name in ("loss", "kl", "accuracy", "teacher_loss")}
    return {**kept, "first_training_loss": logged[0], "seconds": seconds}, seen.hexdigest(), trainer.args


def pair(system: str, seed: int, rate: float, steps: int | None = None, again: bool = False) -> dict[str, Any]:
    """Both students of a seed and a rate; `again`: ours also with other rounding."""
    inputs, fields = embedded(seed) if system == "embedded" else recipe(system, seed)
    fields |= {"seed": seed, "learning_rate": rate, "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    fields |= {"disable_tqdm": True, "logging_first_step": True, **({"max_steps": steps} if steps else {})}
    mine, my_ids, my_args = train(ours, inputs, fields)
    other, other_ids, other_args = train(theirs, inputs, fields)
    if my_ids != other_ids:
        raise RuntimeError("the two students were not given the same batches")
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in _PLACES]
    both = {name: (getattr(my_args, name), getattr(other_args, name)) for name in names}
    different = {name: [str(value) for value in pair] for name, pair in both.items() if pair[0] != pair[1]}
    shared = {name: value for name, value in fields.items() if name not in ("seed", "learning_rate")}
    found = {"seed": seed, "rate": rate, "ours": mine, "trl": other}
    if again:
        found["ours_in_chunks"], _, _ = train(ours, inputs, {**fields, "logits_chunk_size": CHUNK})
    return {**found, "ids": my_ids, "settings": shared, "settings_that_differ": different}


def report(result: dict[str, Any]) -> str:
    """README.md."""
    runs, where = result["runs"], result["environment"]
    rows = []
    for rate in sorted({run["rate"] for run in runs}):
        some = [run for run in runs if run["rate"] == rate]
        columns = [[run[side]["loss"] for run in some] for side in ("ours", "trl")]
        cells = [f"{statistics.mean(column):.4f} ({min(column):.4f} to {max(column):.4f})" for column in columns]
        for side in ("trl", "ours_in_chunks"):
            cells.append(", ".join(f"{run[side]['loss'] - run['ours']['loss']:+.5f}" for run in some if side in run))
        rows.append(f"| {rate:g} | {len(some)} | {' | '.join(cells)} |")
    first = max(abs(run["ours"]["first_training_loss"] - run["trl"]["first_training_loss"]) for run in runs)
    seconds = [statistics.median(run[side]["seconds"] for run in runs) for side in ("ours", "trl")]
    differ = ", ".join(f"`{name}` ({' and '.join(pair)})" for name, pair in runs[0]["settings_that_differ"].items())
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "transformers", "trl"))
    lines = [
        f"# One-shot by this package and by TRL, {result['system']}",
        "",
        f"By `{result['command']}`; {where['machine']}, {where['threads']} thread(s), {versions}.",
        "",
        "Held-out loss of students that start from the same random weights and are given the same batches in the same order:",
        "mean, lowest and highest over seeds, and TRL's less ours for each seed. No rate was chosen: all are shown. The last",
        f"column is ours once more with `logits_chunk_size` {CHUNK}, less ours, for the last seed: the same computation,",
        "rounded differently.",
        f"The teacher's loss is {runs[0]['ours']['teacher_loss']:.4f}. TRL: `GKDTrainer`, `lmbda` 0, `beta` 0, `seq_kd` off.",
        "",
        "| rate | seeds | ours | TRL | TRL less ours | rounding alone |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"The losses of the first training step differ by at most {first:.1g}. Median seconds of training: "
        f"{seconds[0]:.0f} (ours), {seconds[1]:.0f} (TRL), with other processes on the machine.",
        "",
        f"Settings of both: {json.dumps(runs[0]['settings'])}; the others are the defaults of `TrainingArguments`. Arguments "
        f"of the trainers that differ (ours and TRL's): {differ}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train the pairs, and write results.json and README.md after each."""
    parser = argparse.ArgumentParser(description="One-shot distillation by this package and by TRL.")
    parser.add_argument("--system", default="embedded", help="embedded, or a recipe: text-clm, text-clm/smoke")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="another budget; default: that of the system")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_unless_terminal()
    command = f"python benchmarks/trl_one_shot.py --system {options.system} --rates {' '.join(map(str, options.rates))}"
    command += f" --seeds {' '.join(map(str, options.seeds))} --output {options.output}"
    command += f" --steps {options.steps}" if options.steps else ""
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.json"
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else []
    made = {(run["seed"], run["rate"]) for run in runs}
    where = {**environment(), "trl": version("trl")}
    for seed, rate in itertools.product(options.seeds, options.rates):
        if (seed, rate) in made:
            continue
        runs.append(pair(options.system, seed, rate, options.steps, seed == options.seeds[-1]))
        print(json.dumps(runs[-1]), flush=True)
        result = {"command": command, "environment": where, "system": options.system, "runs": runs}
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (options.output / "README.md").write_text(report(result), encoding="utf-8")


if __name__ == "__main__":
    main()
