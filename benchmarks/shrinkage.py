"""What a second moment from few positions does to held-out states, with and without shrinkage.

    python benchmarks/shrinkage.py --minilm .assets/minilm --dataset .assets/wikipedia --output results/shrinkage

Statistics come from N = D/8, D, 2D and 32D positions of the training text, in rows of 128 tokens; everything is measured on
held-out text. The teachers are the embedded one (final state, output head) and MiniLM (final state; its output is the state).

- *mean square*: of the targets of the projections `pca` and `logits`, which is the hidden loss of a student that gives zeros.
- *lost*: fraction of the variance of the logits (of the state, for MiniLM) that the transplanted head loses although the
  student matches its targets, for `gaussian`, `pca` and `logits`.

`before` is the sample moment with the code that this replaced; `Ledoit-Wolf` and `OAS` shrink by their papers' formulas;
`halves` is what calibration does (`tutelage.core.moments.shrunk_moment`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tutelage import DEFAULT_EVAL_TEXT, DEFAULT_TEACHER, DEFAULT_TEXT, RandomProjection, Standardizer
from tutelage.core.moments import FLOOR, Moments, shrunk_moment
from tutelage.core.projection import DataProjection, Projection, spectral_projection
from tutelage.runs.environment import environment

LENGTH = 128
MULTIPLES = (1 / 8, 1, 2, 32)

Moment = torch.Tensor


# ---- Before ----


def square_root(gram: Moment) -> Moment:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def directions_before(moment: Moment, columns: int, gram: Moment | None = None) -> Projection:
    """`spectral_projection` as it was."""
    root = torch.eye(len(moment), dtype=torch.float64) if gram is None else square_root(gram)
    values, vectors = torch.linalg.eigh(root @ moment @ root)
    top = torch.arange(len(moment) - 1, len(moment) - 1 - columns, -1)
    scale = values[top].clamp_min(1e-12 * float(values[-1])).rsqrt()
    return DataProjection(root @ vectors[:, top] * scale, "before")


def decoder_before(projection: Projection, moment: Moment) -> torch.Tensor:
    """`Projection.decoder` as it was."""
    moment = moment + 1e-9 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    root = square_root(moment)
    return torch.linalg.lstsq(root @ projection.matrix().double(), root, driver="gelsd").solution


# ---- Moments ----


def towards_identity(moment: Moment, weight: float) -> Moment:
    size = moment.diagonal().mean()
    identity = torch.eye(len(moment), dtype=torch.float64)
    return (1 - weight) * moment + (weight + FLOOR) * size * identity


def ledoit_wolf(states: torch.Tensor, moment: Moment) -> Moment:
    """Ledoit and Wolf (2004), as in scikit-learn."""
    spread = (moment - moment.diagonal().mean() * torch.eye(len(moment))).square().sum()
    error = (states.square().sum(1).square().mean() - moment.square().sum()) / len(states)
    return towards_identity(moment, float(min(error / spread, 1.0)))


def oas(states: torch.Tensor, moment: Moment) -> Moment:
    """Chen, Wiesel, Eldar and Hero (2010)."""
    width, trace, squares = len(moment), moment.trace(), moment.square().sum()
    error = (1 - 2 / width) * squares + trace**2
    return towards_identity(
        moment, min(1.0, float(error / ((len(states) + 1 - 2 / width) * (squares - trace**2 / width))))
    )


def statistics(states_BTD: torch.Tensor, count: int) -> tuple[Standardizer, dict[str, Moment]]:
    """Of the first `count` positions, as calibration makes them for a student whose head has no bias."""
    mask = (torch.arange(states_BTD.shape[0] * LENGTH) < count).view(states_BTD.shape[:2])
    standardizer = Standardizer.fit(states_BTD[mask], center=False)
    mask = mask & standardizer.keep(states_BTD)
    halves = Moments(full=True), Moments(full=True)
    for half, moments in enumerate(halves):
        moments.add(states_BTD[half::2][mask[half::2]])
    kept = standardizer(states_BTD[mask]).double()
    sample = kept.T @ kept / len(kept)
    return standardizer, {
        "before": sample,
        "Ledoit-Wolf": ledoit_wolf(kept, sample),
        "OAS": oas(kept, sample),
        "halves": shrunk_moment(halves, standardizer.mean, standardizer.scale),
    }


# ---- Measures ----


def measure(
    moment: Moment, before: bool, held_out_ND: torch.Tensor, gram: Moment | None, columns: int
) -> dict[str, float]:
    """Mean square of the targets, and what a transplant loses, on held-out standardised states."""
    make = directions_before if before else spectral_projection
    projections: dict[str, Projection] = {
        "gaussian": RandomProjection(len(moment), columns, 0),
        "pca": make(moment, columns),
        **({} if gram is None else {"logits": make(moment, columns, gram)}),
    }
    found = {}
    metric = torch.eye(len(moment), dtype=torch.float64) if gram is None else gram
    for name, projection in projections.items():
        targets = held_out_ND @ projection.matrix().double()
        decoder = decoder_before(projection, moment) if before else projection.decoder(moment).double()
        lost = held_out_ND - targets @ decoder
        if name != "gaussian":
            found[f"mean square, {name}"] = targets.square().mean().item()
        found[f"lost, {name}"] = (((lost @ metric) * lost).sum() / ((held_out_ND @ metric) * held_out_ND).sum()).item()
    return found


def rows_of(text: str, tokenizer: Any, count: int) -> torch.Tensor:
    ids: list[int] = []
    while len(ids) < count * LENGTH:
        piece, text = text[:100_000], text[100_000:]
        assert piece, "the text is too short"
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


@torch.no_grad()
def compare(
    states: Callable[[torch.Tensor], torch.Tensor], texts: tuple[str, str], tokenizer: Any, head: torch.Tensor | None
) -> dict[str, Any]:
    """Every measure at every N; `head` is the teacher's, (V, D)."""
    tokenizer.model_max_length = 10**9  # rows are cut here
    width = states(torch.zeros(1, 2, dtype=torch.long)).shape[-1]
    rows = -(-round(MULTIPLES[-1] * width) // LENGTH)
    train, held_out = (
        torch.cat([states(batch) for batch in rows_of(text, tokenizer, count).split(8)])
        for text, count in zip(texts, (rows, 24), strict=True)
    )
    found: dict[str, Any] = {"D": width, "R": width * 2 // 5}
    for multiple in MULTIPLES:
        standardizer, moments = statistics(train, round(multiple * width))
        flat = standardizer(held_out[standardizer.keep(held_out)]).double()
        gram = None
        if head is not None:
            weight = (head - head.mean(0)).double() * standardizer.scale.double()
            gram = weight.T @ weight
        found[str(round(multiple * width))] = {
            name: measure(moment, name == "before", flat, gram, found["R"]) for name, moment in moments.items()
        }
    return found


def table(teacher: str, found: dict[str, Any]) -> list[str]:
    counts = [key for key in found if key.isdigit()]
    columns = list(found[counts[0]]["before"])
    lines = [f"## {teacher}: D = {found['D']}, R = {found['R']}", ""]
    lines += ["| N | moment | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for count in counts:
        for name, values in found[count].items():
            cells = [
                f"{values[column]:,.3f}" if values[column] < 1e4 else f"{values[column]:.1e}" for column in columns
            ]
            lines.append(f"| {int(count):,} | {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2; default: the embedded teacher alone")
    parser.add_argument("--dataset", type=Path, help="folder with train.jsonl and heldout.jsonl, for MiniLM")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_TEACHER).eval()
    texts = tuple(Path(path).read_text(encoding="utf-8") for path in (DEFAULT_TEXT, DEFAULT_EVAL_TEXT))
    tokenizer, head = AutoTokenizer.from_pretrained(DEFAULT_TEACHER), model.lm_head.weight
    found = {"Austen": compare(lambda ids: model.model(ids).last_hidden_state, texts, tokenizer, head)}
    command = f"python benchmarks/shrinkage.py --output {options.output}"
    if options.minilm is not None:
        command += f" --minilm {options.minilm} --dataset {options.dataset}"
        encoder = AutoModel.from_pretrained(options.minilm).eval()
        lines = ((options.dataset / name).read_text(encoding="utf-8") for name in ("train.jsonl", "heldout.jsonl"))
        texts = tuple("\n".join(json.loads(line)["text"] for line in part.splitlines()) for part in lines)
        tokenizer = AutoTokenizer.from_pretrained(options.minilm)
        found["MiniLM"] = compare(lambda ids: encoder(ids).last_hidden_state, texts, tokenizer, None)
    options.output.mkdir(parents=True, exist_ok=True)
    made = environment()
    result = {"command": command, "environment": made, "found": found}
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    head_lines = [
        "# Second moments from few positions",
        "",
        f"By `{command}`; {made['machine']}, {made['threads']} thread(s), torch {made['torch']}, transformers "
        f"{made['transformers']}. The columns are explained in the script; calibration uses `halves`.",
        "",
    ]
    lines = [*head_lines, *(line for name, each in found.items() for line in table(name, each))]
    (options.output / "README.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
