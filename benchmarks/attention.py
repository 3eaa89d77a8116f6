"""Why attention is `eager` in bfloat16 on the CPU: training steps of small models with it, against PyTorch's own `sdpa`.

    python benchmarks/attention.py --output results/attention     # under a minute; measure while nothing else runs

A step is a forward in training mode and a backward, on one thread. The two sides take turns, and each counts with its median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from tutelage.io.files import write_atomically
from tutelage.runs.environment import environment

SIZES = {"num_hidden_layers": 3, "vocab_size": 1000, "hidden_size": 384, "intermediate_size": 1536}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# name: class, configuration, sequences and tokens of a batch
MODELS: dict[str, tuple[Any, Any, int, int]] = {
    "BERT, 3 x 384, 12 heads": (BertModel, BertConfig(**SIZES, **NO_DROPOUT, num_attention_heads=12), 32, 64),
    "Llama, 3 x 384, 6 heads": (LlamaModel, LlamaConfig(**SIZES, num_attention_heads=6), 8, 128),
}
ROUNDS = 15


def seconds_of(model: Any, batch: dict[str, torch.Tensor], bf16: bool, attention: str) -> float:
    """Seconds of one step."""
    model.set_attn_implementation(attention)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**batch).last_hidden_state.float().square().mean()
    loss.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention in training steps on the CPU.")
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, (build, config, sequences, length) in MODELS.items():
        model = build(config).train()
        batch = {"input_ids": torch.randint(1, 1000, (sequences, length))}
        batch["attention_mask"] = (torch.arange(length) < torch.randint(length // 2, length + 1, (sequences, 1))).long()
        for bf16 in (True, False):
            times: dict[str, list[float]] = {"sdpa": [], "eager": []}
            for _ in range(ROUNDS):
                for attention, found in times.items():
                    found.append(seconds_of(model, batch, bf16, attention))
            sdpa, eager = (statistics.median(found[2:]) for found in times.values())
            precision = "bfloat16 autocast" if bf16 else "float32"
            rows.append({"model": name, "precision": precision, "sdpa_ms": 1e3 * sdpa, "eager_ms": 1e3 * eager})
    output.mkdir(parents=True, exist_ok=True)
    found = {"steps": rows, "environment": environment()}
    write_atomically(output / "results.json", json.dumps(found, indent=1) + "\n")
    lines = [
        "# Attention in training steps on the CPU",
        "",
        "`python benchmarks/attention.py --output results/attention`",
    ]
    lines[-1] += f". {found['environment']}"
    lines += ["", "| model | precision | sdpa, ms | eager, ms | eager / sdpa |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = row["eager_ms"] / row["sdpa_ms"]
        numbers = f"{row['sdpa_ms']:.0f} | {row['eager_ms']:.0f} | {ratio:.2f}"
        lines.append(f"| {row['model']} | {row['precision']} | {numbers} |")
    write_atomically(output / "README.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
