"""The recipe of sentence-transformers for smaller sentence encoders, with its own library, to compare ours with.

    python benchmarks/sentence_transformers_recipe.py --teacher .assets/minilm --layers 1 3 5 \\
        --dataset .assets/wikipedia/train.jsonl .assets/articles/train.jsonl \\
        --heldout .assets/wikipedia/heldout.jsonl --tokens 3000000 --output recipe-minilm-3

Their example "model distillation, layer reduction": the student is the teacher with some of its blocks, and learns the
teacher's embeddings, computed beforehand, by mean squared error; linear warm-up over a tenth of the steps, then linear decay.
`--width` is their other choice, a smaller encoder with random weights; a Dense module maps its pooled state to the teacher's
width. OUTPUT gets the student and `results.json`: settings, seconds, and a curve of tokens, seconds and the mean cosine to the
teacher's embeddings of held-out texts. A token is one that is not padding; seconds leave out loading, the teacher and the
evaluations. After training the student is measured as those of `students.py` are: held-out texts, Lee, retrieval by title and
by last sentence (files of `--assets`), megabytes and speed. Seed 1000 is for tuning, all others are reported. `--record` adds
the results as a file to a folder and writes the table of all files there; it trains nothing where the file exists.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MSELoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from students import TEACHERS, TUNING_SEED, with_assets
from torch import Tensor
from transformers import AutoModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from tutelage.io.files import write_atomically
from tutelage.runs.environment import environment
from tutelage.runs.evaluate import EvaluateOptions, evaluate
from tutelage.runs.sentences import read_tests
from tutelage.tasks.registry import get_task

HELDOUT = 1003  # texts
INFERENCE_BATCH = 64  # texts
# columns of the table: heading, and the metric that it shows with its digits
COLUMNS = {
    "cosine": ("held-out: cosine", 3),
    "Spearman": ("held-out: similarity_spearman", 3),
    "Lee": ("lee: pairs_spearman", 3),
    "title MRR": ("title: mrr", 3),
    "sentence MRR": ("sentence: mrr", 3),
    "sentence recall@1": ("sentence: recall_at_1", 3),
    "sentence recall@10": ("sentence: recall_at_10", 3),
    "MB": ("held-out: megabytes", 1),
    "times as fast": ("held-out: speedup", 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil a sentence encoder by the recipe of sentence-transformers.")
    parser.add_argument("--teacher", required=True, help="folder of a BERT-like sentence encoder")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 5], help="blocks to keep; the first is 0")
    parser.add_argument("--width", type=int, help="a student of this width with random weights instead, as many blocks")
    parser.add_argument("--dataset", nargs="+", required=True, help="JSONL with `text`")
    parser.add_argument("--heldout", required=True, help="JSONL with `text`")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="stop at so many tokens that are not padding")
    parser.add_argument("--every", type=int, default=250_000, help="tokens from one evaluation to the next")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate; theirs is 1e-4")
    parser.add_argument("--batch", type=int, default=16, help="texts a step; theirs is 64")
    parser.add_argument("--max_length", type=int, default=64, help="tokens per text, also for the teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    parser.add_argument("--assets", type=Path, default=Path(".assets"), help="folder of the tests of students.py")
    parser.add_argument("--record", type=Path, help="e.g. results/students/sentence-transformers")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    read_all_tests(args.assets)  # before training: a file may be missing
    file = None if args.record is None else args.record / file_name(args)
    if file is None or not file.exists():
        results = run(args)
        print(json.dumps(results["curve"][-1]), json.dumps(results["evaluations"]), f"in {args.output}")
        if file is not None:
            args.record.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(results, indent=2) + "\n")
    if args.record is not None:
        write_atomically(args.record / "README.md", page(args.record))


def file_name(args: argparse.Namespace) -> str:
    shape = f"{len(args.layers)}-layers" + ("" if args.width is None else f"-width-{args.width}")
    digits, power = f"{args.rate:e}".split("e")
    return f"{shape}-rate-{float(digits):g}e{int(power)}-batch-{args.batch}-seed-{args.seed}.json"


def run(args: argparse.Namespace) -> dict[str, Any]:
    set_seed(args.seed)
    teacher, student = (SentenceTransformer(args.teacher, device="cpu") for _ in range(2))
    if args.width is None:
        keep_blocks(student, args.layers)
    else:
        student = narrow_student(teacher, len(args.layers), args.width)
    length = student.max_seq_length
    teacher.max_seq_length = student.max_seq_length = args.max_length
    train, heldout = [text for path in args.dataset for text in texts(path)], texts(args.heldout)[:HELDOUT]

    start = time.monotonic()
    labels, targets = (torch.as_tensor(teacher.encode(part, batch_size=INFERENCE_BATCH)) for part in (train, heldout))
    teacher_seconds = time.monotonic() - start
    loss = CountingLoss(student)
    curve = Curve(student, loss, heldout, targets, args.tokens, args.every)
    encoded = teacher.tokenizer(train, truncation=True, max_length=args.max_length)["input_ids"]
    step_tokens = args.batch * sum(map(len, encoded)) / len(encoded)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            student,
            SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=math.ceil(args.tokens / step_tokens),
                per_device_train_batch_size=args.batch,
                learning_rate=args.rate,
                warmup_steps=0.1,  # fraction
                seed=args.seed,
                use_cpu=True,
                bf16=args.bf16,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"text": train, "label": labels.tolist()}),
            loss=loss,
            callbacks=[curve],
        )
        trainer.train()
    student.max_seq_length = length
    student.save(str(args.output), create_model_card=False)
    results = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "texts": len(train),
        "steps": trainer.state.global_step,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "teacher_seconds": round(teacher_seconds, 1),
        "curve": curve.points,
        "seed": "tuning seed" if args.seed == TUNING_SEED else "test seed",
        "evaluations": measure(args),
        "environment": {**environment(), "sentence-transformers": version("sentence-transformers")},
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def read_all_tests(assets: Path | None) -> dict[str, dict[str, Any]]:
    """Options of the tests of `students.py`, none without `assets`; UserError where one cannot be read."""
    if assets is None:
        return {}
    options = {name: with_assets(given, assets) for name, given in TEACHERS["minilm"]["evaluations"].items()}
    for given in options.values():
        read_tests(given.get("pairs"), given.get("retrieval"), get_task("embedding"))
    return options


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The saved student on held-out texts, with size and speed, and on the tests: what `students.py` measures, in its way."""
    student: Any = {"model": str(args.output), "max_length": args.max_length}
    held_out: Any = {"teacher": args.teacher, "dataset": args.heldout, "max_samples": HELDOUT, "measure_speed": True}
    found = {"held-out": evaluate(EvaluateOptions(**student, **held_out)).metrics}
    for name, given in read_all_tests(args.assets).items():
        found[name] = evaluate(EvaluateOptions(**student, **given, batch_size=INFERENCE_BATCH)).metrics
    return found


def page(folder: Path) -> str:
    """A table of the results in a folder, as Markdown; runs that were made before students were measured have few columns."""
    lines = [
        "# The recipe of sentence-transformers, with its own library",
        "",
        "Made by `python benchmarks/sentence_transformers_recipe.py`, which says what the recipe is; each JSON file has the",
        "settings, curve and environment of its run. *Tuning*: the seed that rates are chosen on. All columns are defined and",
        "measured as for [our students](../minilm/README.md). Seconds of training, with other processes on the machine.",
        "",
        f"| layers | width | rate | batch | seed | tokens | {' | '.join(COLUMNS)} | seconds |",
        "|---" * (len(COLUMNS) + 7) + "|",
    ]
    machines = set()
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        settings, last = found["settings"], found["curve"][-1]
        values = {"held-out: cosine": last["cosine"]}
        for name, metrics in found.get("evaluations", {}).items():
            values |= {f"{name}: {key}": value for key, value in metrics.items()}
        role = "tuning" if settings["seed"] == TUNING_SEED else "test"
        cells = [" ".join(str(layer + 1) for layer in settings["layers"]), settings["width"] or "the teacher's"]
        cells += [f"{settings['rate']:g}", settings["batch"], f"{settings['seed']} ({role})", f"{last['tokens']:,}"]
        cells += [f"{values[key]:.{digits}f}" if key in values else "" for key, digits in COLUMNS.values()]
        lines.append(f"| {' | '.join(map(str, cells))} | {last['seconds']:.0f} |")
        machines.add(", ".join(f"{key} {value}" for key, value in found["environment"].items()))
    return "\n".join([*lines, "", f"Environment: {'; or '.join(sorted(machines))}."]) + "\n"


def keep_blocks(student: SentenceTransformer, blocks: list[int]) -> None:
    """Shorten a BERT-like encoder to these of its blocks."""
    encoder: Any = student.transformers_model
    encoder.encoder.layer = torch.nn.ModuleList(encoder.encoder.layer[block] for block in blocks)
    encoder.config.num_hidden_layers = len(blocks)


def narrow_student(teacher: SentenceTransformer, blocks: int, width: int) -> SentenceTransformer:
    """Random weights and heads as wide as the teacher's; embeddings as wide as the teacher's through a Dense module."""
    embedding_size = teacher.get_embedding_dimension()
    assert teacher.transformers_model is not None and embedding_size is not None
    config = teacher.transformers_model.config
    head = config.hidden_size // config.num_attention_heads
    config = type(config).from_dict(
        {
            **config.to_dict(),
            "num_hidden_layers": blocks,
            "hidden_size": width,
            "num_attention_heads": width // head,
            "intermediate_size": 4 * width,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config(config).save_pretrained(folder)
        teacher.tokenizer.save_pretrained(folder)
        student = SentenceTransformer(folder, device="cpu")  # with mean pooling
    student.append(Dense(width, embedding_size, activation_function=torch.nn.Identity()))
    student.append(Normalize())
    return student


class CountingLoss(MSELoss):
    """Theirs; also counts the tokens that are not padding."""

    tokens = 0

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        features = list(sentence_features)
        self.tokens += sum(int(part["attention_mask"].sum()) for part in features)
        return super().forward(features, labels)


class Curve(TrainerCallback):
    """Evaluates before training, each time that `every` more tokens were seen, and at the end of the budget."""

    def __init__(
        self,
        student: SentenceTransformer,
        loss: CountingLoss,
        heldout: list[str],
        targets: Tensor,
        budget: int,
        every: int,
    ):
        self.student, self.loss, self.heldout, self.targets = student, loss, heldout, targets
        self.budget, self.every = budget, every
        self.seconds, self.resumed = 0.0, 0.0
        self.points: list[dict[str, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.measure()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.loss.tokens >= self.budget or state.global_step >= state.max_steps:
            control.should_training_stop = True
            self.measure()
        elif self.loss.tokens >= self.points[-1]["tokens"] + self.every:
            self.measure()

    def measure(self) -> None:
        """Add a point; the clock stands still meanwhile."""
        if self.points:
            self.seconds += time.monotonic() - self.resumed
        training = self.student.training
        embeddings = torch.as_tensor(self.student.encode(self.heldout, batch_size=INFERENCE_BATCH))
        self.student.train(training)
        cosine = torch.nn.functional.cosine_similarity(embeddings, self.targets, dim=-1).mean().item()
        self.points.append({"tokens": self.loss.tokens, "seconds": round(self.seconds, 2), "cosine": round(cosine, 5)})
        self.resumed = time.monotonic()


def texts(path: str) -> list[str]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


if __name__ == "__main__":
    main()
