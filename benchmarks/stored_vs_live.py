"""What storing a curriculum costs a student: int8 and the top 64 outputs from disk, against a live float32 teacher.

    python benchmarks/stored_vs_live.py --teacher .assets/smollm2 --dataset .assets/wikipedia/train.jsonl \\
        --output results/stored_vs_live

For each seed students start equal and read the same rows in the same order: one from the teacher itself, with the full
divergence over float32 logits, one from `tutelage extract` at its defaults and, where the vocabulary has more than 64 entries,
one from the teacher itself with `--top_k 64`, which tells what int8 costs from what the top 64 cost. Held-out losses are
compared in pairs, on a real teacher (text) and on the teacher of `pcfg-clm/laptop`, which is trained first if it was not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tutelage.reproduction.recipes import resolve
from tutelage.runs.distill import distill
from tutelage.runs.environment import environment
from tutelage.runs.extraction.job import extract
from tutelage.runs.extraction.options import DEFAULT_TOP_K, ExtractOptions
from tutelage.runs.inputs import RunOptions
from tutelage.tasks.pcfg_grammar import build_grammar
from tutelage.training.config import CurriculumConfig

# two-sided 95% points of Student's t, by degrees of freedom
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def pcfg(folder: Path, rows: int) -> dict[str, Any]:
    """Teacher with a tokenizer, and strings, of the recipe `pcfg-clm/laptop`, as anybody's would lie on disk."""
    system = resolve("pcfg-clm/laptop", {})
    grammar = build_grammar(system.levels, seed=system.grammar_seed)
    teacher: Any = system.make_teacher(folder).model
    names = ("<pad>", "<mask>", "<bos>", "<eos>", *(f"t{terminal}" for terminal in range(grammar.terminals)))
    words = Tokenizer(models.WordLevel({name: token for token, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    teacher.save_pretrained(folder / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "teacher")
    for name, data in (("train", system.train_data((1,), rows)), ("heldout", system.eval_data((1,)))):
        ids = [row["input_ids"].tolist() for row in data.__getitems__(range(len(data)))]
        datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(folder / name)
    heads, width = system.student_heads, system.head_width
    return {
        "teacher": str(folder / "teacher"),
        "truncates": False,
        "run": {
            "student": f"hidden_size={heads * width},heads={heads}",
            "dataset": str(folder / "train"),
            "eval_dataset": str(folder / "heldout"),
        },
        "args": {
            "max_steps": 120,
            "per_device_train_batch_size": 32,
            "learning_rate": 3e-3,
            "normalize": "standardize",
        },
    }


def text(options: Any) -> dict[str, Any]:
    """The real teacher and text."""
    run = {"student": "layers=4,hidden_size=192", "dataset": options.dataset, "max_length": 64, "max_samples": 128}
    args = {"max_steps": options.steps, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    return {"teacher": options.teacher, "run": run, "args": args, "truncates": True}


def pair(system: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """Held-out losses of one seed's two students."""

    def settings(name: str, **fields: Any) -> CurriculumConfig:
        return CurriculumConfig(
            output_dir=str(folder / f"{name}-{seed}"),
            student_init="random",
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{**system["args"], **fields},
        )

    run = RunOptions(**system["run"])
    teacher = {"teacher_model_name_or_path": system["teacher"]}
    live = distill(RunOptions(**system["run"]), settings("live", **teacher))
    stored = settings("stored", **teacher)
    extract(RunOptions(**system["run"]), stored, ExtractOptions(), log=lambda line: None)
    disk = {"curriculum_dir": stored.output_dir, "max_steps": -1}
    from_disk = distill(RunOptions(student=run.student), settings("student", **disk))
    found = {"live": live.student.metrics["loss"], "stored": from_disk.student.metrics["loss"]}
    if system["truncates"]:
        top = distill(RunOptions(**system["run"]), settings("top", top_k=DEFAULT_TOP_K, **teacher))
        found["live_top_k"] = top.student.metrics["loss"]
    print(seed, found, flush=True)
    return found


def main() -> None:
    """Measure, and write results.json and README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40, help="of each student on text")
    parser.add_argument(
        "--systems", nargs="*", default=["text", "pcfg"], help="text, pcfg; none writes the table again"
    )
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11))
    options = parser.parse_args()
    line = f"python benchmarks/stored_vs_live.py --teacher {Path(options.teacher).name} "
    line += f"--dataset {Path(options.dataset).name} --output {options.output.name} "
    line += f"--steps {options.steps} --seeds {options.seeds}"
    file = options.output / "results.json"
    options.output.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text(encoding="utf-8"))["systems"] if file.exists() else {}
    for name in options.systems:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            system = pcfg(folder, 3_840) if name == "pcfg" else text(options)
            runs = [pair(system, seed, folder) for seed in range(options.seeds)]
        settings = {**system["run"], **system["args"], "dataset": Path(system["run"]["dataset"]).name}
        settings.pop("eval_dataset", None)
        live = [run["live"] for run in runs]
        found[name] = {
            "settings": settings,
            "runs": runs,
            "live": statistics.mean(live),
            "live_sd": statistics.stdev(live),
        }
        found[name]["stored_less_live"] = interval(runs, "stored", "live")
        if system["truncates"]:
            found[name]["stored_less_live_top_k"] = interval(runs, "stored", "live_top_k")
        result = {"command": line, "environment": environment(), "systems": found}
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = "\n".join(report(found, line, options.seeds))
    (options.output / "README.md").write_text(table, encoding="utf-8")


def report(found: dict[str, Any], line: str, seeds: int) -> list[str]:
    """Lines of README.md."""
    machine = environment()
    rows = []
    for name, entry in found.items():
        for key, what in (("stored_less_live", "live"), ("stored_less_live_top_k", "live, top 64")):
            if key in entry:
                low, high = entry[key]["ci95"]
                rows.append(
                    f"| {name} | {entry['live']:.4f} | {entry['live_sd']:.4f} | {what} | {entry[key]['mean']:+.5f} | "
                    f"{low:+.5f} to {high:+.5f} | {', '.join(f'{value:+.5f}' for value in entry[key]['by_seed'])} |"
                )
    return [
        "# A student from disk and one from the live teacher",
        "",
        f"By `{line}`; {machine['machine']}, {machine['threads']} thread(s), torch {machine['torch']}.",
        "",
        "From disk: int8 hidden states and the top 64 outputs. Live: float32 and the full divergence, or that of the top 64.",
        f"Held-out loss, in pairs of equal students and data order, {seeds} seeds.",
        "",
        "| system | live, mean | its deviation over seeds | from disk less | mean | 95% interval (t) | by seed |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def interval(runs: list[dict[str, float]], over: str, under: str) -> dict[str, Any]:
    """Mean difference of two losses over the seeds, with Student's 95% interval."""
    differences = [run[over] - run[under] for run in runs]
    mean = statistics.mean(differences)
    half = T95[len(runs) - 1] * statistics.stdev(differences) / len(runs) ** 0.5
    return {"mean": mean, "ci95": [mean - half, mean + half], "by_seed": differences}


if __name__ == "__main__":
    main()
