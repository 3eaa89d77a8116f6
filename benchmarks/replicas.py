"""What ten parity students cost side by side, as a multiple of one.

    python benchmarks/replicas.py --output results/replicas

A step of each kind of stage of `parity-mlp/laptop`, for one student and for ten replicated ones, timed in turn on the same
machine in the same run; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from tutelage.core.curriculum import Curriculum
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.reproduction.recipes import resolve
from tutelage.runs.environment import environment
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import StatisticsFile
from tutelage.tasks.parity import ParityMLP, ParityMLPConfig
from tutelage.tasks.registry import get_task
from tutelage.training.objective import StageObjective

STAGES = {
    "labels alone": OutputStage(1, label_weight=1.0),
    "hidden stage": HiddenStage(1, 1, 2),
    "teacher's output": OutputStage(1),
}


def stepper(stage: HiddenStage | OutputStage, replicas: int, fields: Any) -> Any:
    """A function that makes one SGD step of a stage with so many students."""
    seeds = list(range(replicas))
    torch.manual_seed(0)
    teacher = LiveTargets(ParityMLP(ParityMLPConfig(fields.d, fields.teacher_width)), get_task("classification"))
    student = ParityMLP(ParityMLPConfig(fields.d, fields.student_width, replica_seeds=seeds))
    stages = (stage, OutputStage(1)) if isinstance(stage, HiddenStage) else (stage,)
    teacher.attach(Curriculum("benchmark", stages, normalize="none"), student)
    rows = [resolve("parity-mlp/laptop").train_data(seeds, 640)[index] for index in range(fields.batch_size)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    teacher.prepare(StatisticsFile(Path("unused"), read=False, write=False), lambda: [batch], "cpu")
    objective = StageObjective(student, teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        objective(**batch)["loss"].backward()
        optimizer.step()

    return step


def main() -> None:
    """Time, and write results.json and README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--replicas", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fields = resolve("parity-mlp/laptop")
    found: dict[str, dict[str, float]] = {}
    for name, stage in STAGES.items():
        one, many = stepper(stage, 1, fields), stepper(stage, options.replicas, fields)
        times: dict[str, list[float]] = {"one": [], "many": []}
        for index in range(options.steps + 10):
            for key, step in (("one", one), ("many", many)):
                start = time.perf_counter()
                step()
                if index >= 10:
                    times[key].append(time.perf_counter() - start)
        medians = {key: 1e3 * statistics.median(values) for key, values in times.items()}
        found[name] = {**medians, "ratio": medians["many"] / medians["one"]}
        print(name, found[name])
    options.output.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/replicas.py --output {options.output}"
    result = {"command": command, "replicas": options.replicas, "environment": environment(), "milliseconds": found}
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# {options.replicas} parity students side by side",
        "",
        f"By `{command}`; {result['environment']['machine']}, one thread, torch {result['environment']['torch']}.",
        "",
        f"A step of `parity-mlp/laptop` ((64, 5), teacher width {fields.teacher_width:,}, student width "
        f"{fields.student_width}, {fields.batch_size} examples per student), median of {options.steps}.",
        "",
        f"| step | 1 student, ms | {options.replicas} students, ms | ratio |",
        "|---|---|---|---|",
        *(f"| {name} | {v['one']:.2f} | {v['many']:.2f} | {v['ratio']:.2f} |" for name, v in found.items()),
        "",
    ]
    (options.output / "README.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
