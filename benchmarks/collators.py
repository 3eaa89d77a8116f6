"""What the format of a dataset costs: a batch read and collated from torch and numpy rows, as a multiple of list rows.

    python benchmarks/collators.py --output results/collators

The batches of all formats are compared first: they are equal. Times are the fastest ones, taken in turn in one run; the last
column is the time of the check that the ids fit the models.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tutelage.runs.environment import environment
from tutelage.tasks.registry import get_task
from tutelage.training.data import CheckedCollator, Limits

FORMATS = (None, "numpy", "torch")
TASKS = ("causal_lm", "masked_lm", "sequence_classification", "embedding")
ROWS, LENGTH, VOCABULARY = 16, 512, 30_000


def tokenizer() -> PreTrainedTokenizerFast:
    """One id per word, with a padding and a mask token."""
    words = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), **names)


def rows(ragged: bool) -> Dataset:
    """Random tokens; ragged rows have between an eighth and all of the length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(LENGTH // 8, LENGTH + 1, (ROWS,), generator=generator) if ragged else [LENGTH] * ROWS
    ids = [torch.randint(3, VOCABULARY, (int(length),), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


def measure(task: str, ragged: bool, repeats: int) -> dict[str, float]:
    """Milliseconds of a batch from each format, and of the check of a batch."""
    collator, indices = get_task(task).collator(tokenizer()), list(range(ROWS))
    data = {str(kind): rows(ragged).with_format(kind) for kind in FORMATS}

    def batch(kind: str) -> Any:
        return collator(data[kind].__getitems__(indices))

    expected = batch("None")
    check = CheckedCollator(lambda _: expected, Limits(LENGTH, VOCABULARY, VOCABULARY))
    for kind in data:
        assert all(torch.equal(value, batch(kind)[name]) for name, value in expected.items())
    times: dict[str, list[float]] = {name: [] for name in (*data, "check")}
    for _ in range(repeats):
        for name in times:
            start = time.perf_counter()
            check(None) if name == "check" else batch(name)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * min(values) for name, values in times.items()}


def main() -> None:
    """Time, and write results.json and README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = ((task, ragged) for task in TASKS for ragged in (False, True))
    found = {f"{task}, {'ragged' if r else 'equal'} rows": measure(task, r, options.repeats) for task, r in kinds}
    options.output.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/collators.py --output {options.output}"
    result = {"command": command, "environment": environment(), "milliseconds": found}
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    where = result["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "transformers", "datasets"))
    lines = [
        "# A batch from rows of each format",
        "",
        f"By `{command}`; {where['machine']}, one thread, {versions}.",
        "",
        f"{ROWS} rows of up to {LENGTH} tokens, read from a `datasets.Dataset` and collated; the fastest of "
        f"{options.repeats}, in turn. "
        "The batches are equal. The check is that of token ids and labels against the models.",
        "",
        "| batch | lists, ms | numpy / lists | torch / lists | check / lists |",
        "|---|---|---|---|---|",
    ]
    for name, v in found.items():
        ratios = " | ".join(f"{v[kind] / v['None']:.2f}" for kind in ("numpy", "torch", "check"))
        lines.append(f"| {name} | {v['None']:.2f} | {ratios} |")
    (options.output / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
