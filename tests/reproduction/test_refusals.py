"""What cannot be compared is refused before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.reproduction.comparing import METHODS, TRAINED, made, silent, tiny
from tutelage.reproduction.compare import compare
from tutelage.reproduction.recipes import resolve
from tutelage.reproduction.results import COMPARISON_FILE
from tutelage.reproduction.variants import Variant, parse_variant


def test_a_folder_of_a_different_comparison_is_refused(tmp_path: Path) -> None:
    made(tiny(), tmp_path / "o", ["scratch"])
    before = (tmp_path / "o" / COMPARISON_FILE).read_bytes()
    refused = (
        r"contains a comparison with a different {}: give the original settings, or choose a different --output_dir"
    )
    with pytest.raises(ValueError, match=refused.format("d")):
        compare(tiny(d=9), tmp_path / "o", ["scratch"], log=silent)
    with pytest.raises(ValueError, match=refused.format("match")):
        compare(tiny(), tmp_path / "o", ["scratch"], match="flops", log=silent)
    assert (tmp_path / "o" / COMPARISON_FILE).read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="is not empty and does not contain a comparison: choose a different --output_dir"
    ):
        compare(tiny(), tmp_path / "notes", ["scratch"], log=silent)
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("fields", "methods", "message"),
    [
        ({"seeds": (0, 1, 0)}, METHODS, "seeds are repeated: 0, 1, 0"),
        ({"seeds": ()}, METHODS, "seeds are empty"),
        ({"seeds": (0, 1000)}, METHODS, r"seeds \[1000\] are tuning seeds too"),
        (
            {"tuning_seeds": (), "learning_rates": (0.1, 0.3), "trials": 2},
            METHODS,
            "tuning_seeds are empty: give some, or trials=1 and a single learning rate",
        ),
        ({"learning_rates": ()}, METHODS, "learning_rates are empty"),
        ({}, ("scratch", "one_shot", "scratch"), "methods are repeated: scratch, one_shot, scratch"),
        ({}, ("distil",), "unknown method 'distil'"),
        ({}, (), "methods are empty"),
        (
            {},
            ("extraction", "progressive"),
            "planted: computes the parity by construction, not trained.*: leave progressive",
        ),
        ({}, ("one_shot", parse_variant("long:stage_steps=60")), "budget too small for the stages"),
        ({}, ("one_shot", parse_variant("deep:layer_map=3:2")), "the student has blocks 1 to 2"),
        (
            {},
            ("one_shot", parse_variant("final-state:layer_map=final:final,warm_start=head")),
            "cannot be made for replicated students",
        ),
        ({"stage_samples": 960}, METHODS, "budget too small for the stages"),
    ],
)
def test_what_cannot_work_is_refused_before_any_run(
    tmp_path: Path,
    trainers: list[dict[str, Any]],
    fields: dict[str, Any],
    methods: Sequence[str | Variant],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(tiny(**fields), tmp_path / "o", methods, log=silent)
    assert not trainers


def test_an_unknown_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown match 'steps': use one of samples, flops, seconds"):
        compare(tiny(), tmp_path / "o", match="steps", log=silent)
    assert not (tmp_path / "o").exists()


def test_a_refused_comparison_leaves_its_folder_free(tmp_path: Path, given_teacher: str) -> None:
    fields: dict[str, Any] = {"teacher": given_teacher, "eval_samples": 1024}
    with pytest.raises(ValueError, match="is beyond the teacher"):
        compare(tiny(target=1.01, **fields), tmp_path / "o", ["scratch"], log=silent)
    made(tiny(target=0.6, **fields), tmp_path / "o", ["scratch"])


def test_a_method_that_cannot_work_is_refused_before_the_teacher_is_trained(
    tmp_path: Path, trainers: list[dict[str, Any]]
) -> None:
    recipe = resolve("parity-mlp/smoke", TRAINED)
    with pytest.raises(ValueError, match="layer_map: the student has blocks 1 to 2"):
        compare(recipe, tmp_path / "o", [parse_variant("deep:layer_map=9:9")], log=silent)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "o").exists()
