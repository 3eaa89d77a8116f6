"""Texts, passages and queries that the scripts make of what they download, on small inputs written here."""

from __future__ import annotations

import html
import importlib
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("asset_texts")


def test_sentences_end_at_full_stops_but_not_at_initials_and_titles(texts: Any) -> None:
    text = 'Dr. J. K. Smith met Mrs. Brown. "Why?" he asked. It was 3.5 km. 20 days passed! The end.'
    assert texts.sentences(text) == [
        "Dr. J. K. Smith met Mrs. Brown.",
        '"Why?" he asked.',
        "It was 3.5 km.",
        "20 days passed!",
        "The end.",
    ]


def test_passages_hold_whole_sentences_of_a_bounded_length(texts: Any) -> None:
    paragraphs = [["a b c.", "d e f.", "g h i."], ["j k."], ["l m.", "n " * 9 + "o.", "p q."], ["r s t."]]
    assert list(texts.passages(paragraphs, least=4, most=7)) == ["a b c. d e f.", "g h i. j k.", "p q. r s t."]


def test_markup_of_articles_is_removed(texts: Any) -> None:
    markup = (
        "{{Infobox|a={{b}}}}\n[[File:x.png|thumb|A [[link]].]]\n'''Ants''' are [[insect|insects]]<ref name=\"a\">No. "
        "{{c}}</ref> of the [[family (biology)|family]] [http://a.b Formicidae]&nbsp;({{lang|x}}).<!-- no -->\n"
        "* an item.\n{| class=x\n| cell.\n|}\n== Life ==\nThey live<ref/> long.\n==References==\nNot this."
    )
    text = f"<revision><text>{html.escape(markup)}</text></revision>"
    pages = [f"<page><title>Ant</title>{text}</page>", f"<page><title>Old</title><redirect/>{text}</page>"]
    pages.append("<page><title>Two</title><revision><text>Ants. {{Disambig}}</text></revision></page>")
    found = list(texts.articles(f"<wiki xmlns='x'>{''.join(pages)}</wiki>".encode()))
    assert found == [("Ant", [["Ants are insects of the family Formicidae."], ["They live long."]])]


def test_brown_texts_lose_their_tags(texts: Any) -> None:
    tagged = (
        "\n\n\t``/`` All/ql right/rb ''/'' ,/, he/pps said/vbd ./.\nWhy/wrb (/( not/* )/) ?/. ?/.\n\n\n\t1/2/cd ;/. ;/."
    )
    assert texts.brown_paragraphs(tagged)[-2:] == [['"All right," he said.', "Why (not)?"], ["1/2;"]]


def test_each_pair_is_rated_once(texts: Any) -> None:
    pairs = texts.rated_pairs(["a", "b", "c"], [[1, 0.2, 0.3], [0, 1, 0.4], [0, 0, 1]])
    assert [tuple(pair.values()) for pair in pairs] == [("a", "b", 0.2), ("a", "c", 0.3), ("b", "c", 0.4)]


def test_titles_ask_for_summaries(texts: Any) -> None:
    rows = [{"title": "Ant", "text": "It is small."}, {"title": "Bee", "text": "It flies."}]
    assert texts.title_queries(rows, [False, True]) == [
        {"query": "", "document": "It is small."},
        {"query": "Bee", "document": "It flies."},
    ]


def test_a_last_sentence_asks_without_the_names_of_its_article(texts: Any) -> None:
    row = {
        "title": "Dung beetle",
        "text": "Beetles were studied by Fabre. Fabre's dung-beetle study in Paris lasted many cold years.",
    }
    short = {"title": "Bee", "text": "It flies. It eats in Rome."}
    single = {"title": "Ant", "text": "An ant is a very small animal."}
    rows = [row, row, short, single]
    assert texts.sentence_queries(rows, [True, False, True, True]) == [
        {"query": "study in Paris lasted many cold years.", "document": "Beetles were studied by Fabre."},
        {"query": "", "document": "Beetles were studied by Fabre."},
        {"query": "", "document": "It flies."},
        {"query": "", "document": single["text"]},
    ]


def test_reviews_are_labelled_and_each_is_kept_once(texts: Any) -> None:
    lines = ["category,text", "fresh,Good\u2028one", "plot,A man", 'rotten,"Bad, dull"', "rotten,Good one", "fresh,"]
    assert texts.reviews(lines) == [{"text": "Good one", "label": 0}, {"text": "Bad, dull", "label": 1}]
