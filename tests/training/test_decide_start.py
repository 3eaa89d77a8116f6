"""What a student starts from and by which method it is trained, where the settings leave it open."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForSequenceClassification

from tests.training.conftest import llama
from tutelage import CurriculumConfig
from tutelage.core.errors import UserError
from tutelage.runs.inputs import DEFAULT_RATE, RunOptions, with_defaults
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import TargetSource
from tutelage.tasks.initialization.families import usual_blocks
from tutelage.tasks.registry import get_task
from tutelage.tasks.students import WEIGHTS, make_student, student_config
from tutelage.training.preparation import decide_start, default_warm_start
from tutelage.training.resolution import build_curriculum

RANDOM, OWN, PASSED, STORED = "random", "own", None, "teacher"  # weights that a student comes with


def decided(weights: str | None, source: TargetSource, head_dim: int = 12, **fields: Any) -> tuple[str | None, str]:
    student = llama(2, 16, seed=2, head_dim=head_dim)
    if weights is not None:
        student.__dict__[WEIGHTS] = weights
    given = CurriculumConfig(use_cpu=True, **fields)
    before = (given.student_init, given.method)
    args = decide_start(given, student, source)
    assert (given.student_init, given.method) == before
    assert args.method is not None
    return args.student_init, args.method


@pytest.mark.parametrize(
    ("weights", "fields", "expected"),
    [
        (RANDOM, {}, ("teacher", "joint")),
        *((RANDOM, {"method": method}, ("teacher", method)) for method in ("extraction", "joint", "one_shot")),
        (RANDOM, {"method": "scratch"}, (None, "scratch")),
        *((RANDOM, {name: 0.25}, ("teacher", "extraction")) for name in ("stage_fraction", "stage_learning_rate")),
        (RANDOM, {"stage_steps": [3]}, ("teacher", "extraction")),
        (RANDOM, {"stage_trains": "new"}, ("teacher", "extraction")),
        (RANDOM, {"warm_start": "head"}, ("random", "extraction")),
        *((RANDOM, given, ("teacher", "joint")) for given in ({"warm_start": "none"}, {"stage_trains": "up_to"})),
        (RANDOM, {"layer_map": "1:2"}, ("teacher", "joint")),
        (RANDOM, {"num_stages": 1}, ("teacher", "joint")),
        (RANDOM, {"student_init": "random"}, ("random", "extraction")),
        (RANDOM, {"preset": "paper"}, (None, "extraction")),
        (RANDOM, {"preset": "paper", "student_init": "teacher"}, ("teacher", "extraction")),
        (OWN, {}, ("random", "one_shot")),  # hidden stages would undo what its blocks have learnt
        (OWN, {"label_weight": 0.5}, ("random", "one_shot")),
        *((OWN, given, ("random", "extraction")) for given in ({"num_stages": 1}, {"stage_fraction": 0.2})),
        (OWN, {"hidden_weight": 1.0}, ("random", "joint")),
        (OWN, {"normalize": "standardize", "projection_seed": 0}, ("random", "one_shot")),  # as without them
        (OWN, {"preset": "paper"}, (None, "extraction")),
        (PASSED, {}, ("random", "extraction")),
        (PASSED, {"student_init": "teacher"}, ("teacher", "joint")),
    ],
)
def test_start_and_method_under_a_live_teacher(
    weights: str | None, fields: dict[str, Any], expected: tuple[str | None, str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decided(weights, LiveTargets(llama(4, 24, seed=1)), **fields) == expected


def test_weights_of_its_own_stay_with_a_warning_where_others_are_asked_for() -> None:
    with pytest.warns(UserWarning, match="the student brings its own weights: student_init='teacher' leaves it alone"):
        assert decided(OWN, LiveTargets(llama(4, 24, seed=1)), student_init="teacher") == ("random", "one_shot")


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("student_init", "random, teacher"),
        ("stage_trains", "up_to, new"),
        ("residual_basis", "pca, logits, random, identity"),
    ],
)
def test_a_misspelt_choice_is_refused(name: str, choices: str) -> None:
    message = f"unknown {name} 'techer': use one of {choices}"
    with pytest.raises(UserError, match=message):
        CurriculumConfig(use_cpu=True, **{name: "techer"})
    args = CurriculumConfig(use_cpu=True)
    setattr(args, name, "techer")
    with pytest.raises(UserError, match=message):
        decide_start(args, llama(2, 16, seed=2), LiveTargets(llama(4, 24, seed=1)))


def test_settings_that_are_set_or_replaced_later_count_as_those_of_the_construction() -> None:
    student, source = llama(2, 16, seed=2, head_dim=12), LiveTargets(llama(4, 24, seed=1))
    student.__dict__[WEIGHTS] = RANDOM
    args = CurriculumConfig(use_cpu=True)
    replaced = dataclasses.replace(args, max_steps=8)
    assert decide_start(replaced, student, source).method == "joint"
    assert dataclasses.replace(args, preset="paper").value("warmup_steps") == 0.06
    _, plain = with_defaults(RunOptions(), replaced)
    assert plain.learning_rate == DEFAULT_RATE
    args.method = "one_shot"
    assert decide_start(args, student, source).method == "one_shot"


def test_a_student_with_weights_of_its_own_keeps_its_head() -> None:
    task, student = get_task("causal_lm"), llama(2, 16, seed=2)
    assert default_warm_start(task, student) == "head"
    student.__dict__[WEIGHTS] = OWN
    assert default_warm_start(task, student) == "none"


def test_a_student_that_does_not_fit_falls_back_with_a_message(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decided(RANDOM, LiveTargets(llama(4, 24, seed=1)), head_dim=8) == ("random", "extraction")
    assert "The student starts from random weights: the student's attention heads have 8 values" in caplog.text


def test_blocks_of_several_kinds_start_from_their_like_where_no_layer_map_is_given() -> None:
    """Gemma 3 has full attention in every sixth block; a preset gives each block the kind of the teacher's that it is
    copied from."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 8}
    config = Gemma3TextConfig(num_hidden_layers=26, num_key_value_heads=1, sliding_window=8, **sizes)
    source, task = LiveTargets(Gemma3ForCausalLM(config)), get_task("causal_lm")
    student = make_student("layers=10", task, student_config("layers=10", config))
    args = decide_start(CurriculumConfig(use_cpu=True, num_stages=4), student, source)
    assert args.student_init == "teacher"
    source.attach(build_curriculum(args, (10, 26), 40), student)


@pytest.mark.parametrize(
    ("weights", "fields", "expected"),
    [
        (RANDOM, {}, (None, "joint")),  # the extracted curriculum decides
        (RANDOM, {"student_init": "random", "method": "one_shot"}, ("random", "one_shot")),
        (RANDOM, {"stage_fraction": 0.25}, (None, "joint")),
        (STORED, {}, ("teacher", "joint")),
        (STORED, {"method": "extraction"}, ("teacher", "extraction")),
        (OWN, {"student_init": "teacher"}, ("teacher", "joint")),
    ],
)
def test_start_and_method_from_disk(
    weights: str | None, fields: dict[str, Any], expected: tuple[str | None, str]
) -> None:
    source = TargetSource(get_task("causal_lm"))
    source.method = "joint"
    assert decided(weights, source, **fields) == expected


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("llama", "ends"), ("gemma2", "ends"), ("gpt2", "ends"), ("bert", "uniform"), ("t5", "uniform")],
)
def test_decoders_start_from_the_ends_of_their_teacher(model_type: str, expected: str) -> None:
    assert usual_blocks(model_type) == expected


def test_a_classifier_that_is_a_decoder_starts_from_the_ends_too() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=4
    )
    assert LiveTargets(LlamaForSequenceClassification(config)).start_blocks == "ends"
