"""Turns what `fetch_assets.py` downloads into plain texts, passages and queries.

- `articles`: the full articles in an XML export of Wikipedia, without their markup.
- `brown_paragraphs`: the sentences of one text of the Brown corpus, without their tags.
- `passages`: texts of about the same length from either.
- `rated_pairs`: all pairs of the Lee corpus with their human ratings.
- `title_queries`, `sentence_queries`: two grades of retrieval from titles and summaries of articles.
- `reviews`: labelled reviews without duplicates.
"""

from __future__ import annotations

import csv
import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence

Paragraph = list[str]  # sentences
LABELS = ("fresh", "rotten")  # of reviews: 0 and 1
QUERY_WORDS = 4  # a shorter query says too little
BETWEEN_SENTENCES = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:Dr|Mr|St|Jr|Sr|vs|ca)\.)(?<!\bMrs\.)\s+(?=[\"“(]?[A-Z0-9])"
)
END_MATTER = re.compile(
    r"^==\s*(see also|notes|references|footnotes|citations|bibliography|further reading|external links|sources)\s*==",
    re.IGNORECASE | re.MULTILINE,
)
NESTED = [re.compile(r"\{\{[^{}]*\}\}"), re.compile(r"\{\|[^{}]*\|\}")]  # templates and tables, the innermost first
MARKUP = [  # in this order
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"<(ref|gallery|timeline)\b[^<>]*/>", re.IGNORECASE), ""),
    (re.compile(r"<(ref|math|gallery|timeline|table|imagemap|source)\b.*?</\1>", re.DOTALL | re.IGNORECASE), ""),
    (re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\]|\[[^\[\]]*\])*\]\]", re.IGNORECASE), ""),
    (re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]"), r"\1"),  # links: what is shown
    (re.compile(r"\[\w+://\S+\s*([^\]]*)\]"), r"\1"),
    (re.compile(r"<[^<>]+>"), ""),
    (re.compile(r"'{2,}"), ""),  # bold and italic
    (re.compile(r"\(\s*[;,]?\s*\)"), ""),  # what a template left behind
    (re.compile(r"[ \t\xa0]+"), " "),
    (re.compile(r" (?=[,.;])"), ""),
]


def sentences(text: str) -> list[str]:
    """Split at full stops, question and exclamation marks that end a sentence; initials and titles of persons do not."""
    return BETWEEN_SENTENCES.split(text.strip())


def passages(paragraphs: Iterable[Paragraph], least: int = 60, most: int = 200) -> Iterator[str]:
    """Whole sentences in their order, `least` to `most` words in each passage; a passage ends with a paragraph if it can."""
    held: list[str] = []
    count = 0
    for paragraph in [*paragraphs, []]:
        for sentence in paragraph:
            length = len(sentence.split())
            if count + length > most:
                if count >= least:
                    yield " ".join(held)
                held, count = [], 0
            if length <= most:
                held, count = [*held, sentence], count + length
        if count >= least:
            yield " ".join(held)
            held, count = [], 0


def articles(xml: bytes) -> Iterator[tuple[str, list[Paragraph]]]:
    """Title and paragraphs of each page that is an article: no redirect and no list of meanings."""
    for page in ElementTree.fromstring(xml).findall("{*}page"):
        title, markup = page.findtext("{*}title") or "", page.findtext("{*}revision/{*}text") or ""
        if page.find("{*}redirect") is None and not re.search(r"\{\{\s*disambig", markup, re.IGNORECASE):
            yield title, [sentences(line) for line in prose(markup)]


def prose(markup: str) -> list[str]:
    """The paragraphs of an article: no headings, lists, tables, pictures, formulas, references or end matter."""
    text = END_MATTER.split(markup, maxsplit=1)[0]
    text = html.unescape(text)
    for pattern, shown in MARKUP[:3]:
        text = pattern.sub(shown, text)
    for pattern in NESTED:
        while pattern.search(text):
            text = pattern.sub("", text)
    for pattern, shown in MARKUP[3:]:
        text = pattern.sub(shown, text)
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and line[0] not in "=*#:;|!{}[]" and line[-1] in ".!?\"'"]


def brown_paragraphs(tagged: str) -> list[Paragraph]:
    """Words as `word/tag`, a sentence on a line; a tab begins a paragraph."""
    paragraphs: list[Paragraph] = []
    for line in tagged.splitlines():
        if line.startswith("\t") or not paragraphs:
            paragraphs.append([])
        if line.strip():
            paragraphs[-1].append(joined([token.rpartition("/")[0] for token in line.split()]))
    return paragraphs


def joined(words: Sequence[str]) -> str:
    """A sentence with its spaces as in print, and marks that the corpus doubles (`? ?`) written once."""
    text = " ".join(words)
    text = re.sub(r"([;?!])(?: \1)+", r"\1", text)
    text = re.sub(r"(``|\() ", r"\1", text)
    text = re.sub(r" (''|[,.;:?!)])", r"\1", text)
    text = re.sub(r"''([,.?!])", r"\1''", text)
    return re.sub(r"``|''", '"', text)


def rated_pairs(documents: Sequence[str], ratings: Sequence[Sequence[float]]) -> list[dict[str, str | float]]:
    """Each pair once, from the triangle above the diagonal; ratings from 0 to 1."""
    return [
        {"sentence1": documents[i], "sentence2": documents[j], "score": ratings[i][j]}
        for i in range(len(documents))
        for j in range(i + 1, len(documents))
    ]


def title_queries(rows: Sequence[dict[str, str]], asked: Sequence[bool]) -> list[dict[str, str]]:
    """Title as query, summary as document. Articles that are not asked for have an empty query."""
    return [
        {"query": row["title"] if ask else "", "document": row["text"]} for row, ask in zip(rows, asked, strict=True)
    ]


def sentence_queries(rows: Sequence[dict[str, str]], asked: Sequence[bool]) -> list[dict[str, str]]:
    """The last sentence as query, without the words that name the article; the rest of the summary as document."""
    pairs = []
    for row, ask in zip(rows, asked, strict=True):
        *rest, last = sentences(row["text"])
        query = anonymous(last, row["title"], " ".join(rest)) if ask and rest else ""
        enough = len(query.split()) >= QUERY_WORDS
        pairs.append({"query": query if enough else "", "document": " ".join(rest) or last})
    return pairs


def anonymous(sentence: str, title: str, rest: str) -> str:
    """Without the words of the title, and without capitalised words that the rest has too (an `s` at the end aside)."""
    named, told = names(title), names(rest)
    kept = (
        word
        for word in sentence.split()
        if not names(word) & named and not (any(letter.isupper() for letter in word) and names(word) & told)
    )
    return " ".join(kept)


def names(text: str) -> set[str]:
    """Words in lower case, without a plural or possessive `s`."""
    return {word.removesuffix("s") for word in re.findall(r"\w+", text.lower())} - {""}


def reviews(lines: Iterable[str]) -> list[dict[str, str | int]]:
    """The labelled rows of a CSV file with the columns `category` and `text`, each text once."""
    found: dict[str, int] = {}
    for row in csv.DictReader(lines):
        text = " ".join(row["text"].split())
        if text and row["category"] in LABELS:
            found.setdefault(text, LABELS.index(row["category"]))
    return [{"text": text, "label": label} for text, label in found.items()]
