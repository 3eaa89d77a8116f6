"""Make a student of the embedded teacher, then run one-shot distillation at the same budget and compare the two.

python examples/demo.py [output_dir]
"""

import sys
from pathlib import Path

from tutelage import CurriculumConfig, RunOptions, distill

STEPS = 120  # `tutelage distill` takes 200: this keeps both students together within three minutes on 2 slow cores
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
results = {}
for method, output in (("extraction", folder), ("one_shot", folder / "one-shot")):
    print(f"Training a student by {method}...", flush=True)
    args = CurriculumConfig(output_dir=str(output), method=method, overwrite_output_dir=True, save_strategy="no")
    args.max_steps = STEPS
    results[method] = distill(RunOptions(), args)

mine, one_shot = results["extraction"], results["one_shot"]
print(f"\n{'':24}{'extraction':>14}{'one-shot':>14}{'teacher':>14}")
for name in ("loss", "accuracy", "kl", "agreement"):
    cells = [mine.student.metrics[name], one_shot.student.metrics[name], mine.teacher.metrics.get(name)]
    shown = ["-" if value is None else f"{value:.4f}" for value in cells]
    print(f"held-out {name:<15}" + "".join(f"{cell:>14}" for cell in shown))
print(f"{'steps':24}{mine.budget.steps:>14,}{one_shot.budget.steps:>14,}")
print(f"{'FLOPs':24}{mine.budget.flops:>14.3g}{one_shot.budget.flops:>14.3g}")
print(f"{'seconds':24}{mine.budget.seconds:>14.0f}{one_shot.budget.seconds:>14.0f}")
print(f"\nThe student is in {folder}, its table in {folder / 'README.md'} and its plot in {folder / 'loss.png'}.")
