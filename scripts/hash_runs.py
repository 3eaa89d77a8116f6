"""SHA-256 of the students of short runs: every task, every method, live and from disk, resumed.

    python scripts/hash_runs.py [FOLDER]

A change that is meant to leave training as it is must leave these as they are, on one machine with the same libraries.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    default_data_collator,
)

from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.cli import main
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_TEACHER
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.parity import ParityData, ParityMLP, ParityMLPConfig, planted_teacher

FINAL = "final"
LOGITS = "logits"
STEPS = ["--max_steps=8", "--per_device_train_batch_size=4", "--max_length=24", "--use_cpu=true", "--logging_steps=4"]
QUIET = ["--save_strategy=no", "--max_samples=4", "--calibration_samples=8", "--report_to=none"]


def run(*arguments: Any) -> None:
    """A command of tutelage that must end well."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main([str(argument) for argument in arguments])
    if code:
        raise SystemExit(f"{' '.join(map(str, arguments))}\n{errors.getvalue()}")


def digest(folder: Path) -> str:
    """Of every weight of a student."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("model*.safetensors")):
        if "checkpoint-" in str(file):
            continue
        for name, value in sorted(load_file(file).items()):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def teachers(root: Path) -> dict[str, Path]:
    """A tiny teacher of each task, and two checkpoints of the causal one."""
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_TEACHER)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "masked": BertForMaskedLM(BertConfig(**sizes)),
        "classes": BertForSequenceClassification(BertConfig(**{**sizes, "num_labels": 3})),
        "sentences": EmbeddingModel(BertModel(BertConfig(**sizes))),
    }
    for number in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(DEFAULT_TEACHER)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter) / number)
        models[f"early{number}"] = model
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in models}


def texts(root: Path) -> dict[str, Path]:
    """Lines of the embedded text, with labels."""
    lines = [
        line.strip().replace('"', "'") for line in Path(DEFAULT_EVAL_TEXT).read_text().splitlines() if len(line) > 30
    ][:80]
    rows = "".join(f'{{"text": "{line}", "label": {index % 3}}}\n' for index, line in enumerate(lines))
    (root / "rows.jsonl").write_text(rows.replace("\\", ""))
    (root / "text.txt").write_text("\n".join(lines) + "\n")
    return {"rows": root / "rows.jsonl", "text": root / "text.txt"}


def runs(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of each student."""
    made, text = teachers(root), texts(root)
    causal = [
        "--teacher_model_name_or_path",
        DEFAULT_TEACHER,
        "--student",
        "layers=2,hidden_size=32",
        "--dataset",
        text["text"],
    ]

    def distill(name: str, *options: Any) -> tuple[str, Path]:
        run("distill", *options, *STEPS, *QUIET, f"--output_dir={root / 'runs' / name}")
        return name, root / "runs" / name

    def student(task: str, data: str) -> list[Any]:
        return [
            "--teacher_model_name_or_path",
            made[task],
            "--student",
            "layers=2,hidden_size=16",
            "--dataset",
            text[data],
        ]

    yield distill("causal, extraction", *causal)
    yield distill("causal, one-shot, labels", *causal, "--method=one_shot", "--label_weight=0.3", "--temperature=2")
    yield distill(
        "causal, progressive", *causal, "--method=progressive", "--teacher_checkpoints", made["early1"], made["early2"]
    )
    yield distill("causal, scratch", *causal, "--method=scratch")
    yield distill(
        "causal, logits projection, two stages, top 16",
        *causal,
        f"--projection={LOGITS}",
        f"--layer_map=1:2,{FINAL}:{FINAL}",
        "--top_k=16",
    )
    run("distill", *causal, *STEPS, *QUIET[1:], "--save_steps=3", f"--output_dir={root / 'resumed'}")
    shutil.rmtree(root / "resumed" / "checkpoint-8")
    run(
        "distill",
        *causal,
        *STEPS,
        *QUIET[1:],
        "--save_steps=3",
        f"--output_dir={root / 'resumed'}",
        "--resume_from_checkpoint=true",
    )
    yield "causal, extraction, resumed", root / "resumed"
    run("extract", *causal, *STEPS, *QUIET, "--dtype=int8", "--top_k=32", f"--output_dir={root / 'causal-disk'}")
    yield distill(
        "causal, from disk", f"--curriculum_dir={root / 'causal-disk'}", "--student", "layers=2,hidden_size=32"
    )
    yield distill("masked, uniform stages, pca", *student("masked", "text"), "--num_stages=2", "--projection=pca")
    run(
        "extract",
        *student("masked", "text"),
        *STEPS,
        *QUIET,
        "--dtype=float16",
        "--top_k=32",
        f"--output_dir={root / 'masked-disk'}",
    )
    yield distill(
        "masked, from disk", f"--curriculum_dir={root / 'masked-disk'}", "--student", "layers=2,hidden_size=16"
    )
    yield distill("classes, extraction", *student("classes", "rows"))
    yield distill("sentences, extraction", *student("sentences", "rows"))
    run(
        "extract",
        *student("sentences", "rows"),
        *STEPS,
        *QUIET,
        "--dtype=float32",
        f"--output_dir={root / 'sentences-disk'}",
    )
    yield distill(
        "sentences, from disk", f"--curriculum_dir={root / 'sentences-disk'}", "--student", "layers=2,hidden_size=16"
    )
    yield "parity, replicas", parity(root / "parity")


def parity(folder: Path) -> Path:
    """Replicated two-layer students of a planted teacher."""
    seeds = [0, 1]
    args = CurriculumConfig(
        output_dir=str(folder),
        task="classification",
        layer_map="1:2",
        max_steps=8,
        learning_rate=0.1,
        optim="sgd",
        normalize="none",
        lr_scheduler_type="constant",
        warmup_steps=0,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = CurriculumTrainer(
        ParityMLP(ParityMLPConfig(16, 20, replica_seeds=seeds)),
        planted_teacher(16, 3, 200),
        args,
        ParityData(16, 3, 1000, seeds),
        ParityData(16, 3, 100, [seed + 100 for seed in seeds]),
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model()
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for name, folder in runs(Path(sys.argv[1] if len(sys.argv) > 1 else temporary)):
            print(f"{digest(folder)[:16]}  {name}", flush=True)
