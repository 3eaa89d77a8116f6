"""Fine-tune a classifier of film reviews from the real sentence encoder, for tests and benchmarks of classifiers.

    python scripts/train_reviews_classifier.py [--dir DIR] [--epochs 2] [--rate 5e-5] [--seed 0]

DIR is `$TUTELAGE_ASSETS`, or `.assets`. Reads `DIR/minilm/` and `DIR/reviews/` (see `fetch_assets.py`) and
writes `DIR/reviews-classifier/`: a `BertForSequenceClassification` of 6 blocks x 384 with its tokenizer. Prints its accuracy
on the held-out reviews.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from asset_texts import LABELS
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

MAX_LENGTH = 64  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a classifier of film reviews.")
    parser.add_argument("--dir", type=Path, default=Path(os.environ.get("TUTELAGE_ASSETS") or ".assets"))
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    missing = next((name for name in ("minilm", "reviews") if not (args.dir / name).is_dir()), None)
    if missing:
        parser.error(f"no {args.dir / missing}: run `python scripts/fetch_assets.py --dir {args.dir} {missing}`")
    start = time.monotonic()
    accuracy = train(args.dir, args.epochs, args.rate, args.seed)
    print(f"{args.dir / 'reviews-classifier'}: held-out accuracy {accuracy:.4f}, {time.monotonic() - start:.0f} s")


def train(directory: Path, epochs: float, rate: float, seed: int) -> float:
    """Write the classifier; its accuracy on held-out reviews."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(directory / "minilm")
    names = dict(enumerate(LABELS))
    model = AutoModelForSequenceClassification.from_pretrained(
        directory / "minilm", id2label=names, label2id={name: label for label, name in names.items()}
    )
    output = directory / "reviews-classifier"
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(output),
            num_train_epochs=epochs,
            learning_rate=rate,
            lr_scheduler_type="linear",
            weight_decay=0.01,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length",
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=tokens(directory / "reviews" / "train.jsonl", tokenizer),
        eval_dataset=tokens(directory / "reviews" / "heldout.jsonl", tokenizer),
        compute_metrics=fraction_correct,
    )
    trainer.train()
    accuracy: float = trainer.evaluate()["eval_accuracy"]
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return accuracy


def fraction_correct(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(found.predictions, -1) == found.label_ids).mean())}


def tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)
    return Dataset.from_dict({**encoded, "labels": [row["label"] for row in rows]})


if __name__ == "__main__":
    main()
