"""What two choices for the CPU gain: attention that is `eager` in bfloat16, and an output loss that works in the cache.

    python benchmarks/cpu.py --output results/cpu     # two minutes; measure while nothing else runs

A step is a forward in training mode and a backward, on one thread. The two sides take turns, and each counts with its median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from tutelage import output_loss
from tutelage.core import chunked
from tutelage.core.heads import OutputHead
from tutelage.io.files import write_atomically
from tutelage.runs.environment import environment

SIZES = {"num_hidden_layers": 3, "vocab_size": 1000, "hidden_size": 384, "intermediate_size": 1536}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# name: class, configuration, sequences and tokens of a batch
BERT = BertConfig(**SIZES, **NO_DROPOUT, num_attention_heads=12)
MODELS: dict[str, tuple[Any, Any, int, int]] = {
    "BERT, 32 x 64 tokens": (BertModel, BERT, 32, 64),
    "BERT, 8 x 256 tokens": (BertModel, BERT, 8, 256),
    "BERT, 4 x 512 tokens": (BertModel, BERT, 4, 512),
    "Llama, 8 x 128 tokens": (LlamaModel, LlamaConfig(**SIZES, num_attention_heads=6), 8, 128),
}
ROUNDS, VOCABULARY = 12, 49152
PRECISION = {True: "bfloat16 autocast", False: "float32"}
Row = tuple[str, str, str, str, float, float]  # what, precision, the two sides, and their milliseconds


def attention() -> Iterator[Row]:
    """Steps of small models with PyTorch's `sdpa`, and with `eager`."""
    for name, (build, config, sequences, length) in MODELS.items():
        model = build(config).train()
        batch = {"input_ids": torch.randint(1, 1000, (sequences, length))}
        batch["attention_mask"] = (torch.arange(length) < torch.randint(length // 2, length + 1, (sequences, 1))).long()
        for bf16 in (True, False):

            def run(kind: str, model: Any = model, batch: Any = batch, bf16: bool = bf16) -> None:
                model.set_attn_implementation(kind)
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model(**batch).last_hidden_state.float().square().mean()
                loss.backward()

            yield (f"step of {name}", PRECISION[bf16], "sdpa", "eager", *in_turn(run, "sdpa", "eager"))


def loss() -> Iterator[Row]:
    """The output loss over a large vocabulary, whole chunks at a time and block by block."""
    heads = [OutputHead(nn.Linear(width, VOCABULARY, bias=False)) for width in (384, 576)]
    states, theirs = torch.randn(1024, 384, requires_grad=True), torch.randn(1024, 576)
    for bf16 in (True, False):

        def run(block: int, bf16: bool = bf16) -> None:
            chunked.BLOCK_LOGITS = block
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                found = output_loss(states, heads[0], theirs, heads[1])
            found.backward()

        times = in_turn(run, chunked.CHUNK_LOGITS, chunked.BLOCK_LOGITS)
        yield (f"output loss, {VOCABULARY:,} outputs", PRECISION[bf16], "whole chunks", "blocks", *times)


def in_turn(run: Callable[[Any], None], *sides: Any) -> tuple[float, float]:
    """Median milliseconds of both sides."""
    times: dict[Any, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, found in times.items():
            start = time.perf_counter()
            run(side)
            found.append(1e3 * (time.perf_counter() - start))
    first, second = (statistics.median(found[2:]) for found in times.values())
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description="What two choices for the CPU gain.")
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [*attention(), *loss()]
    output.mkdir(parents=True, exist_ok=True)
    made = environment()
    names = ("what", "precision", "before", "after", "before_ms", "after_ms")
    found = {"rows": [dict(zip(names, row, strict=True)) for row in rows], "environment": made}
    write_atomically(output / "results.json", json.dumps(found, indent=1) + "\n")
    lines = ["# Choices for the CPU", "", "`python benchmarks/cpu.py --output results/cpu`", ""]
    lines += [f"torch {made['torch']}, transformers {made['transformers']}, {made['machine']}, 1 thread.", ""]
    lines += ["| what | precision | sides | ms | ratio |", "|---|---|---|---|---|"]
    for what, precision, before, after, first, second in rows:
        lines.append(
            f"| {what} | {precision} | {after} / {before} | {second:.0f} / {first:.0f} | {second / first:.2f} |"
        )
    write_atomically(output / "README.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
