"""Curricula that are damaged in one place: each is refused with the file named, made again, or trains the same student.

    python benchmarks/reliability_damage.py --cases 400 --seed 0 --output results/reliability/damage.json

The teacher is a tiny random Llama. Finished curricula are opened by `distill --curriculum_dir` and by `extract` given again,
unfinished ones by `extract`. A case follows from the seed and its number alone: `--only NUMBER` repeats one."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import torch
import transformers
from damage import GOOD, Case, Subject, contents, judge
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tutelage.io.files import write_atomically
from tutelage.runs import distill as distilling
from tutelage.runs.environment import environment
from tutelage.runs.extraction.job import extract
from tutelage.runs.extraction.options import ExtractOptions
from tutelage.runs.inputs import RunOptions
from tutelage.targets.manifest import ShardWriter
from tutelage.training.config import CurriculumConfig

WORDS = [first + last for first in "bdfgklmnprst" for last in ("a", "en", "ik", "o", "ul", "ys", "ar", "om")]
STUDENT = "layers=2,hidden_size=16"
# by method: settings, and those of an older curriculum with files of the same names. The first has an output head and
# calibration rows, the second the first weights of its student.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "extraction": ({"student_init": "random"}, {"projection_seed": 1, "calibration_samples": 8}),
    "joint": ({"method": "joint", "student_init": "teacher"}, {"temperature": 2.0, "calibration_samples": 8}),
}


def make_inputs(root: Path) -> tuple[Path, Path]:
    """A teacher and a text."""
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "<eos>"}
    vocabulary = {word: index for index, word in enumerate((*names.values(), *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names).save_pretrained(root / "teacher")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(root / "teacher")
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(6, 12)))}) for _ in range(120)]
    (root / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root / "teacher", root / "text.jsonl"


def settings(folder: Path, **fields: Any) -> CurriculumConfig:
    tiny = {"max_steps": 6, "per_device_train_batch_size": 4, "calibration_samples": 16, "use_cpu": True}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return CurriculumConfig(output_dir=str(folder), **{**tiny, **quiet, **fields})


def curricula(root: Path, teacher: Path, text: Path) -> list[Subject]:
    """Finished and unfinished curricula, and what is done with them."""
    subjects = []
    for name, (fields, older) in METHODS.items():

        def run(folder: Path, fields: dict[str, Any] = fields) -> None:
            args = settings(folder, teacher_model_name_or_path=str(teacher), **fields)
            how = ExtractOptions(dtype="float32", shard_tokens=100)
            extract(RunOptions(student=STUDENT, dataset=str(text), max_length=16), args, how, log=lambda line: None)

        def again(names: list[str], run: Callable[[Path], None] = run) -> Callable[[Path, Path], Any]:
            def attempt(copy: Path, output: Path) -> Any:
                run(copy)
                return contents(copy, names)

            return attempt

        whole, before, cut = (root / f"{name}-{part}" for part in ("whole", "older", "unfinished"))
        run(whole)
        run(before, {**fields, **older})
        cut_short(lambda run=run, cut=cut: run(cut), shards=3)
        cut_short(lambda run=run, cut=cut, all_=fields | older: run(cut.with_name(f"{cut.name}-older"), all_), shards=3)
        names = list(contents(whole))
        subjects += [
            Subject(f"{name}, finished, distill", whole, train, before),
            Subject(f"{name}, finished, extract", whole, again(names), before),
            Subject(f"{name}, unfinished, extract", cut, again(names), cut.with_name(f"{cut.name}-older")),
        ]
    return subjects


def cut_short(extraction: Callable[[], None], shards: int) -> None:
    """End an extraction after so many shards, as a kill does."""
    write, written = ShardWriter.write, []

    def some(self: ShardWriter, number: int, batches: Any) -> Any:
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(number)
        return write(self, number, batches)

    with patch.object(ShardWriter, "write", some):
        try:
            extraction()
        except KeyboardInterrupt:
            return
    raise AssertionError(f"the extraction has no more than {shards} shards")


def train(copy: Path, output: Path) -> Any:
    """The student of a curriculum."""
    with patch.object(distilling, "plot_run"):  # half a second
        distilling.distill(RunOptions(), settings(output, curriculum_dir=str(copy), calibration_samples=None))
    return contents(output, ["model.safetensors", "config.json", "tokenizer.json"])


def run_cases(subjects: Sequence[Subject], numbers: Iterable[int], seed: int, scratch: Path) -> list[Case]:
    """The cases of these numbers, which are dealt to the subjects."""
    references: dict[str, Any] = {}
    found = []
    for number in numbers:
        subject = subjects[number % len(subjects)]
        if subject.name not in references:
            references[subject.name] = subject.reference(scratch / "references" / str(number % len(subjects)))
        found.append(judge(subject, f"{seed}/{number}", references[subject.name], scratch / "case"))
    return found


def main() -> None:
    """Run, print the counts and the cases that are not good, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one case to repeat")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    numbers = range(options.cases) if options.only is None else [options.only]
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        with patch.object(datasets.config, "HF_DATASETS_CACHE", root / "cache"):
            found = run_cases(curricula(root, *make_inputs(root)), numbers, options.seed, root / "cases")
    bad = [case for case in found if not case.good]
    for case in bad:
        print(f"{case.verdict}: {case.subject}, seed {case.seed}, {case.kind}: {case.what}\n    {case.message}")
    counts = Counter((case.subject, case.kind, case.verdict) for case in found)
    table = [{"subject": s, "kind": k, "verdict": v, "cases": count} for (s, k, v), count in sorted(counts.items())]
    totals = Counter(case.verdict for case in found)
    print(", ".join(f"{totals[verdict]} {verdict}" for verdict in (*GOOD, *sorted(totals.keys() - set(GOOD)))))
    if options.output is not None:
        command = f"python benchmarks/reliability_damage.py --cases {options.cases} --seed {options.seed}"
        result = {"command": command, "environment": environment(), "verdicts": dict(totals), "cases": table}
        write_atomically(options.output, json.dumps({**result, "bad": [asdict(case) for case in bad]}, indent=1) + "\n")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
