"""What storing a curriculum costs a student: int8 and the top 64 outputs from disk, against a live float32 teacher.

    python benchmarks/stored_vs_live.py --output results/stored_vs_live

For each seed students start equal and read the same rows in the same order: one from the teacher itself, with the full
divergence over float32 logits, one from `tutelage extract` at its defaults and, where the vocabulary has more than 64 entries,
one from the teacher itself with `--top_k 64`, which tells what int8 costs from what the top 64 cost. Held-out losses are
compared in pairs: on the embedded teacher and text, whose student starts from the teacher and so has learned something, and on
the teacher of `pcfg-clm/laptop`, which is trained first if it was not.
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
from tutelage.reproduction.statistics import interval
from tutelage.runs.distill import distill
from tutelage.runs.environment import environment
from tutelage.runs.extraction.job import extract
from tutelage.runs.extraction.options import DEFAULT_TOP_K, ExtractOptions
from tutelage.runs.inputs import RunOptions
from tutelage.tasks.pcfg_grammar import build_grammar
from tutelage.training.config import CurriculumConfig


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
            "max_steps": 500,
            "student_init": "random",
            "per_device_train_batch_size": 32,
            "learning_rate": 3e-3,
            "normalize": "standardize",
        },
    }


def austen(steps: int) -> dict[str, Any]:
    """The embedded teacher and text, with the default settings."""
    return {"run": {"student": "layers=2,hidden_size=64"}, "args": {"max_steps": steps}, "truncates": True}


def pair(system: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """Held-out losses of one seed's two students."""

    def settings(name: str, **fields: Any) -> CurriculumConfig:
        return CurriculumConfig(
            output_dir=str(folder / f"{name}-{seed}"),
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{**system["args"], **fields},
        )

    run = RunOptions(**system["run"])
    teacher = {"teacher_model_name_or_path": system["teacher"]} if "teacher" in system else {}
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
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200, help="of each student of the embedded teacher")
    parser.add_argument(
        "--systems", nargs="*", default=["austen", "pcfg"], help="austen, pcfg; none writes the table again"
    )
    parser.add_argument("--seeds", type=int, default=5, choices=range(5, 11))
    options = parser.parse_args()
    line = "python benchmarks/stored_vs_live.py --output results/stored_vs_live"
    line += f" --steps {options.steps} --seeds {options.seeds}"
    file = options.output / "results.json"
    options.output.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text(encoding="utf-8"))["systems"] if file.exists() else {}
    for name in options.systems:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            system = pcfg(folder, 3_840) if name == "pcfg" else austen(options.steps)
            runs = [pair(system, seed, folder) for seed in range(options.seeds)]
        settings = {key: value for key, value in {**system["run"], **system["args"]}.items() if "dataset" not in key}
        live = [run["live"] for run in runs]
        found[name] = {
            "settings": settings,
            "runs": runs,
            "live": statistics.mean(live),
            "live_sd": statistics.stdev(live),
        }
        found[name]["stored_less_live"] = difference(runs, "stored", "live")
        if system["truncates"]:
            found[name]["stored_less_live_top_k"] = difference(runs, "stored", "live_top_k")
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


def difference(runs: list[dict[str, float]], over: str, under: str) -> dict[str, Any]:
    """Mean difference of two losses over the seeds, with Student's 95% interval."""
    differences = [run[over] - run[under] for run in runs]
    return {"mean": statistics.mean(differences), "ci95": interval(differences), "by_seed": differences}


if __name__ == "__main__":
    main()
