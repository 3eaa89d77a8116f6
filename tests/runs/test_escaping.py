"""Names of folders in model cards and plots are shown as they are."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from datasets import Dataset
from matplotlib.figure import Figure

from tests.conftest import POSITIONS, save_llama, sentences
from tutelage.runs import plots
from tutelage.runs.distill import distill
from tutelage.runs.escaping import as_code, as_markdown
from tutelage.runs.inputs import RunOptions
from tutelage.training.config import CurriculumConfig


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one_shot and layer_map=1:2", "one_shot and layer_map=1:2"),
        ("_mine_ or __x", r"\_mine\_ or \_\_x"),
        ("$a$ ~~b~~ `c` <i>", r"&#36;a&#36; \~\~b\~\~ \`c\` &lt;i>"),
        ("a|b [c](d) *e* &lt;", r"a\|b \[c\](d) \*e\* &amp;lt;"),
        ("# a\n- b\n12. c\n> d\n+ e", "&#35; a &#45; b &#49;&#50;. c &#62; d &#43; e"),
        ("0.12 and -", "0.12 and -"),
    ],
)
def test_markdown_shows_a_name_as_it_is(text: str, shown: str) -> None:
    assert as_markdown(text) == shown


def test_code_may_contain_backticks() -> None:
    assert as_code("tutelage compare own") == "`tutelage compare own`"
    assert as_code("echo ``a``\nb") == "``` echo ``a`` b ```"


@pytest.mark.figures
def test_a_name_is_no_formula_in_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def look(figure: Figure, path: Path, dpi: int = 130) -> None:
        texts = [figure.axes[0].title, *figure.axes[0].get_legend().get_texts()]
        drawn.extend(text.get_text() for text in texts)
        figure.savefig(path)  # fails for a formula that cannot be drawn
        plt.close(figure)

    monkeypatch.setattr(plots, "save_figure", look)
    records = [{"step": 1, "loss": 2.0, "stage": 1, "stage_name": "output /t/$a$"}]
    plots.plot_run(records, tmp_path / "loss.png", r"joint: $\frac{x}$ to my_$student$")
    assert drawn == [r"joint: \$\frac{x}\$ to my_\$student\$", r"stage 1: output /t/\$a\$"]


def test_a_card_shows_the_names_of_folders_as_they_are(tmp_path: Path) -> None:
    teacher = save_llama(tmp_path / "a|b_*c*$d$")
    Dataset.from_dict({"text": sentences(60)}).save_to_disk(tmp_path / "[x](y)")
    args = CurriculumConfig(output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, method="one_shot")
    args.teacher_model_name_or_path = str(teacher)
    data = {"dataset": str(tmp_path / "[x](y)"), "max_length": POSITIONS // 4, "max_samples": 4, "eval_fraction": 0.3}
    distill(RunOptions("layers=2,hidden_size=16", **data), args)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert r"| Teacher | a\|b\_\*c\*&#36;d&#36; |" in card
    assert r"| Data | \[x\](y) |" in card
    assert "| Student | `layers=2,hidden_size=16` |" in card
