"""Methods by name, and their settings."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.reproduction.variants import Candidate, Variant, parse_variant, plain_variant, read_methods


@pytest.mark.parametrize("method", ["extraction", "one_shot", "progressive", "scratch"])
def test_a_bare_method_changes_nothing(method: str) -> None:
    variant = plain_variant(method)
    assert (variant.name, variant.method, variant.overrides, variant.budget_fraction) == (method, method, {}, 1.0)
    assert variant.settings == ""


def test_overrides_are_typed_and_the_name_is_kept() -> None:
    text = "mine:projection=logits,warm_start=head,num_stages=2,stage_fraction=0.3,stage_steps=5,eval_with_teacher=true"
    variant = parse_variant(text)
    assert (variant.name, variant.method, variant.budget_fraction) == ("mine", "extraction", 1.0)
    assert variant.overrides == {
        "projection": "logits",
        "warm_start": "head",
        "num_stages": 2,
        "stage_fraction": 0.3,
        "stage_steps": [5],
        "eval_with_teacher": True,
    }
    assert variant.settings == text.removeprefix("mine:").replace(",", ", ")


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("mine:layer_map=1:1,2:2", {"layer_map": "1:1,2:2"}),
        (
            "mine:layer_map=1:1,2:4,final:final,warm_start=head",
            {"layer_map": "1:1,2:4,final:final", "warm_start": "head"},
        ),
        ("mine:normalize=none,layer_map=1:2,2:4", {"normalize": "none", "layer_map": "1:2,2:4"}),
        ("mine:layer_map=1:1,2:2,stage_steps=10,20,30", {"layer_map": "1:1,2:2", "stage_steps": [10, 20, 30]}),
        ("mine:stage_learning_rate=1e-3", {"stage_learning_rate": 1e-3}),
        ("soft:method=one_shot,label_weight=0.5,temperature=2", {"label_weight": 0.5, "temperature": 2.0}),
        ("one_shot:temperature=2", {"temperature": 2.0}),
    ],
)
def test_a_value_may_hold_commas_and_colons(text: str, overrides: dict[str, Any]) -> None:
    assert parse_variant(text).overrides == overrides


def test_a_name_that_is_a_method_needs_no_method() -> None:
    assert parse_variant("one_shot:temperature=2").method == "one_shot"
    assert parse_variant("soft:method=one_shot,temperature=2").method == "one_shot"
    with pytest.raises(ValueError, match="one_shot is a method: choose a different name"):
        parse_variant("one_shot:method=scratch")


def test_budget_is_in_units_of_the_comparisons_and_no_field() -> None:
    variant = parse_variant("short:budget=0.6,normalize=none")
    assert (variant.budget_fraction, variant.overrides) == (0.6, {"normalize": "none"})
    assert variant.settings == "normalize=none, budget=0.6"
    assert parse_variant("all:method=one_shot,budget=1").budget_fraction == 1.0
    assert parse_variant("long:method=one_shot,budget=4").budget_fraction == 4.0
    assert parse_variant("long:method=one_shot,budget=4").settings == "budget=4.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine", "the variant 'mine' has no settings: write NAME:key=value"),
        ("", "the variant '' has no settings"),
        (":normalize=none", "'' cannot name a variant: use letters"),
        ("a/b:normalize=none", "'a/b' cannot name a variant"),
        (
            "mine:method=extract",
            "variant 'mine' has the unknown method 'extract': use one of extraction, joint, one_shot",
        ),
        ("mine:colour=red", "variant 'mine' has the unknown field 'colour'"),
        ("mine:head", "cannot read 'head' in the variant 'mine:head': write NAME:key=value"),
        ("mine:budget=0", "variant 'mine': budget is in units of the comparison's, above 0 and at most 16, got 0"),
        ("mine:budget=16.5", "at most 16, got 16.5"),
        ("mine:budget=nan", "at most 16, got nan"),
        ("mine:budget=1|2", r"cannot read budget='1\|2'"),
        ("mine:budget=half", "cannot read budget='half'"),
        ("mine:num_stages=two", "cannot read num_stages='two'"),
        ("mine:stage_fraction=much", "stage_fraction"),
        ("mine:stage_steps=1,x", "stage_steps"),
        (
            "mine:method=progressive,schedule=pace-3",
            "variant 'mine': schedule=pace-3 is not one of two, pace-4, pace-2, pace-1",
        ),
        ("mine:method=progressive,schedule=two|pace-3", r"schedule=two\|pace-3 is not one of two"),
        ("mine:schedule=two", "variant 'mine': schedule is for progressive, not for extraction"),
        ("mine:phase_samples=5", "phase_samples is for progressive, not for extraction"),
        ("one_shot:checkpoint=1", "checkpoint is for progressive, not for one_shot"),
        ("mine:method=progressive,phase_samples=x", "cannot read phase_samples='x'"),
        ("mine:method=progressive,checkpoint=0.5", "cannot read checkpoint='0.5'"),
        ("mine:num_stages=1|two", "variant 'mine': cannot read num_stages='two'"),
        ("mine:num_stages=1|", "cannot read num_stages=''"),
        ("mine:match=steps", "match=steps must be one of samples, flops, seconds, for extraction, joint and scratch"),
        ("one_shot:match=flops", "match=flops must be one of .*, for extraction, joint and scratch, whose last stage"),
        ("mine:method=progressive,match=flops", "variant 'mine': match=flops must be one of"),
    ],
)
def test_what_is_no_variant_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_variant(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("extract", "unknown method 'extract': use one of extraction, joint, one_shot, progressive, scratch"),
        ("", "unknown method ''"),
        (
            "extraction:projection=logits",
            "not the name of a method.*--variant NAME:method=extraction,projection=logits, or in a comparison file",
        ),
    ],
)
def test_what_is_no_method_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain_variant(name)


def test_methods_of_a_file_are_a_mapping_or_a_list() -> None:
    given = {"one_shot": {}, "extraction": None, "final-state": {"layer_map": "final:final", "stage_steps": ["5", "6"]}}
    one_shot, plain, named = read_methods(given)
    assert (one_shot, plain) == (Variant("one_shot", "one_shot"), Variant("extraction", "extraction"))
    assert named == Variant("final-state", "extraction", {"layer_map": "final:final", "stage_steps": [5, 6]})
    assert read_methods(["extraction", "one_shot"]) == (plain, one_shot)
    assert read_methods("extraction one_shot") == (plain, one_shot)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "methods must be a mapping of names to settings"),
        (5, "methods must be a mapping of names to settings"),
        ({"mine": {}}, "unknown method 'mine'.* with --variant"),
        ({"mine": "head"}, "variant 'mine' needs a mapping"),
        ({"mine": {"colour": "red"}}, "unknown field 'colour'"),
        (["mine"], "unknown method 'mine'"),
    ],
)
def test_methods_of_a_file_that_cannot_be_read(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_methods(value)


@pytest.mark.parametrize(
    "field", ["task=causal_lm", "max_steps=5", "gradient_accumulation_steps=2", "seed=3", "output_dir=x"]
)
def test_no_variant_changes_what_the_comparison_sets(field: str) -> None:
    with pytest.raises(ValueError, match="the comparison sets it, the same for every method"):
        parse_variant(f"mine:{field}")


def test_settings_of_a_schedule_are_typed() -> None:
    variant = parse_variant("paced:method=progressive,schedule=two,phase_samples=1e3,checkpoint=-2")
    assert variant.overrides == {"schedule": "two", "phase_samples": 1000, "checkpoint": -2}


def test_values_with_a_bar_between_them_are_searched() -> None:
    text = "mine:method=joint,hidden_weight=0.3|1|3,projection=pca|logits,temperature=2"
    variant = parse_variant(text)
    assert variant.search == {"hidden_weight": [0.3, 1.0, 3.0], "projection": ["pca", "logits"]}
    assert variant.overrides == {"temperature": 2.0}
    assert variant.settings == "temperature=2.0, hidden_weight=0.3|1.0|3.0, projection=pca|logits"
    assert read_methods({"mine": {"method": "joint", "hidden_weight": "0.3|1|3"}})[0].search == {
        "hidden_weight": [0.3, 1.0, 3.0]
    }
    assert parse_variant("mine:layer_map=1:1,2:2|2:2,stage_steps=5,6|7,8").search == {
        "layer_map": ["1:1,2:2", "2:2"],
        "stage_steps": [[5, 6], [7, 8]],
    }


def test_a_variant_may_have_a_rate_and_an_equal_cost_of_its_own() -> None:
    variant = parse_variant("labels:method=scratch,match=flops,learning_rate=1e-3,budget=2")
    assert (variant.match, variant.overrides, variant.budget_fraction) == ("flops", {"learning_rate": 1e-3}, 2.0)
    assert variant.settings == "learning_rate=0.001, budget=2.0, match=flops"
    assert Variant.from_json(variant.to_json()) == variant


def test_a_candidates_label_names_its_folder() -> None:
    assert Candidate(3e-4).label == "0.0003"
    assert Candidate(0.1, {"schedule": "two", "phase_samples": 640}).label == "0.1 schedule=two phase_samples=640"
    assert Candidate(0.1, {"stage_steps": [5, 6], "eval_with_teacher": True}).label == (
        "0.1 stage_steps=5,6 eval_with_teacher=true"
    )


@pytest.mark.parametrize("fraction", [0.0, -1.0, 16.5, float("nan")])
def test_a_budget_that_no_variant_can_have_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="budget_fraction must be above 0 and at most 16"):
        Variant("mine", "one_shot", budget_fraction=fraction)
    with pytest.raises(ValueError, match="match must be one of samples, flops, seconds"):
        Variant("mine", "scratch", match="steps")
