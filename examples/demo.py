"""Make a student of the embedded teacher with the default settings, then run one-shot distillation from random weights at the
same budget and compare the two.

python examples/demo.py [output_dir]
"""

import sys
from pathlib import Path

from tutelage import CurriculumConfig, RunOptions, distill

STEPS = 200  # as `tutelage distill`: both students together took 99 seconds on 2 cores
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
results = {}
one_shot_settings = {"method": "one_shot", "student_init": "random"}
for name, output, settings in (("tutelage", folder, {}), ("one-shot", folder / "one-shot", one_shot_settings)):
    print(f"Training a student: {name}...", flush=True)
    common = {"output_dir": str(output), "max_steps": STEPS, "overwrite_output_dir": True, "save_strategy": "no"}
    results[name] = distill(RunOptions(), CurriculumConfig(**common, **settings))

mine, one_shot = results["tutelage"], results["one-shot"]
print(f"\n{'':24}{'tutelage':>14}{'one-shot':>14}{'teacher':>14}")
for name in ("loss", "accuracy", "kl", "agreement"):
    cells = [mine.student.metrics[name], one_shot.student.metrics[name], mine.teacher.metrics.get(name)]
    shown = ["-" if value is None else f"{value:.4f}" for value in cells]
    print(f"held-out {name:<15}" + "".join(f"{cell:>14}" for cell in shown))
print(f"{'steps':24}{mine.budget.steps:>14,}{one_shot.budget.steps:>14,}")
print(f"{'FLOPs':24}{mine.budget.flops:>14.3g}{one_shot.budget.flops:>14.3g}")
print(f"{'seconds':24}{mine.budget.seconds:>14.0f}{one_shot.budget.seconds:>14.0f}")
print(f"\nThe student is in {folder}, its table in {folder / 'README.md'} and its plot in {folder / 'loss.png'}.")
