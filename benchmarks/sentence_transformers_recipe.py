"""The recipe of sentence-transformers for smaller sentence encoders, with its own library, to compare ours with.

    python benchmarks/sentence_transformers_recipe.py --teacher .assets/minilm --layers 1 3 5 \\
        --dataset .assets/wikipedia/train.jsonl .assets/articles/train.jsonl \\
        --heldout .assets/wikipedia/heldout.jsonl --tokens 3000000 --output recipe-minilm-3

Their example "model distillation, layer reduction": the student is the teacher with some of its blocks, and learns the
teacher's embeddings, computed beforehand, by mean squared error; linear warm-up over a tenth of the steps, then linear decay.
`--width` is their other choice, a smaller encoder with random weights; a Dense module maps its pooled state to the teacher's
width. OUTPUT gets the student and `results.json`: settings, seconds, and a curve of tokens, seconds and the mean cosine to the
teacher's embeddings of held-out texts. A token is one that is not padding; seconds leave out loading, the teacher and the
evaluations.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MSELoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import Tensor
from transformers import AutoModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from tutelage.runs.environment import environment

HELDOUT = 1003  # texts
INFERENCE_BATCH = 64  # texts


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
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = run(args)
    print(json.dumps(results["curve"][-1]), f"in {args.output}")


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
        "environment": environment(),
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


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
