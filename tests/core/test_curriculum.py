"""Curricula, the standardiser, and what a batch's positions are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tutelage import (
    Curriculum,
    HiddenStage,
    JointStage,
    OutputStage,
    Standardizer,
    extraction,
    joint,
    one_shot,
    progressive,
    scratch,
)
from tutelage.core.errors import UserError
from tutelage.core.inputs import label_positions, last_token
from tutelage.core.stages import choose_blocks, parse_layer_map, uniform_layer_map


def test_builders_divide_the_budget() -> None:
    made = extraction(3, 6, 100, stage_steps=0.5, stage_learning_rate=0.1)
    assert made.stages == (
        HiddenStage(16, 1, 2, learning_rate=0.1),
        HiddenStage(16, 2, 4, learning_rate=0.1),
        HiddenStage(18, 3, 6, learning_rate=0.1),
        OutputStage(50),
    )
    assert [stage.learning_rate for stage in made.stages] == [0.1, 0.1, 0.1, None]
    assert [stage.steps for stage in extraction(3, 6, 100, stage_steps=[1, 2, 3]).stages] == [1, 2, 3, 94]
    assert [stage.steps for stage in progressive(10, ["a", "b"]).stages] == [3, 3, 4]
    assert [stage.teacher_checkpoint for stage in progressive(10, ["a", "b"]).stages] == ["a", "b", None]
    assert [s.label_weight for s in progressive(10, ["a"], label_weight=0.2).stages] == [0.2, 0.2]
    assert extraction(3, 6, 100, label_weight=0.2).stages[-1].label_weight == 0.2
    assert [(s.student_place, s.teacher_place) for s in extraction(4, 8, 9, layer_map=2).stages[:-1]] == [
        (2, 4),
        (4, 8),
    ]
    assert scratch(5).stages[0].name == "labels"
    assert progressive(10, ["a"]).stages[0].name == "output a"
    assert not scratch(5).stages[0].needs_teacher
    assert one_shot(5).total_steps == made.total_steps - 95 == 5


def test_a_joint_stage_has_all_pairs_and_the_output() -> None:
    made = joint(2, 4, 10, hidden_weight=0.5, label_weight=0.25)
    assert made.stages == (JointStage(10, ((1, 2), (2, 4)), hidden_weight=0.5, label_weight=0.25),)
    assert made.stages[0].name == "joint 1:2,2:4"
    assert made.stages[0].output == OutputStage(10, label_weight=0.25)
    assert (made.places("student"), made.places("teacher")) == ([1, 2], [2, 4])
    own = Curriculum("own", (OutputStage(1), HiddenStage(2, 1, 1), made.stages[0]))
    assert own.hidden_stages == [HiddenStage(2, 1, 1), HiddenStage(10, 1, 2), HiddenStage(10, 2, 4)]
    assert own.pair_numbers == [[], [0], [1, 2]]
    assert joint(2, 4, 10, layer_map=1).places("teacher") == [4]


@pytest.mark.parametrize(
    ("blocks", "stages", "expected"),
    [
        ((3, 6), None, [(1, 2), (2, 4), (3, 6)]),
        ((4, 30), None, [(1, 8), (2, 15), (3, 22), (4, 30)]),
        ((4, 12), 2, [(2, 6), (4, 12)]),
        ((2, 2), 1, [(2, 2)]),
    ],
)
def test_uniform_layer_map(blocks: tuple[int, int], stages: int | None, expected: list) -> None:
    assert uniform_layer_map(*blocks, stages) == expected


@pytest.mark.parametrize(
    ("choice", "blocks", "expected"),
    [
        ("uniform", (3, 7), (2, 5, 7)),
        ("ends", (1, 4), (4,)),
        ("ends", (2, 4), (1, 4)),
        ("ends", (3, 12), (1, 11, 12)),
        ("ends", (6, 12), (1, 2, 9, 10, 11, 12)),
        ("ends", (4, 4), (1, 2, 3, 4)),
        ("1, 2,12", (3, 12), (1, 2, 12)),
        ((1, 2, 12), (3, 12), (1, 2, 12)),
    ],
)
def test_the_blocks_that_a_student_starts_from(choice: Any, blocks: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert choose_blocks(choice, *blocks) == expected


@pytest.mark.parametrize("choice", ["1,2", "1,2,13", "0,1,2", "1,2,last", "first", "1,-2,3", ""])
def test_start_blocks_that_the_teacher_does_not_have_are_refused(choice: str) -> None:
    message = rf"start_blocks='{choice}' does not name 3 blocks of the teacher, 1 to 12, one for each of the student's"
    with pytest.raises(UserError, match=message):
        choose_blocks(choice, 3, 12)


def test_a_student_deeper_than_its_teacher_has_no_ends() -> None:
    with pytest.raises(UserError, match="the student has 5 blocks, the teacher 4"):
        choose_blocks("ends", 5, 4)


def test_steps_belong_to_stages_and_values_survive_json() -> None:
    made = extraction(2, 4, 10, layer_map=parse_layer_map("1:2, final:final"), stage_steps=3, warm_start="head")
    assert [made.stage_at(step) for step in (0, 2, 3, 6, 9, 10)] == [(0, 0), (0, 2), (1, 0), (2, 0), (2, 3), (2, 4)]
    assert Curriculum.from_json(made.to_json()) == made
    assert [stage.name for stage in made.stages] == ["hidden 1:2", "hidden final:final", "output"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: extraction(4, 2, 10), "student has 4 blocks, the teacher 2"),
        (lambda: extraction(2, 4, 10, layer_map=[(2, 2), (1, 4)]), "2:2,1:4 is not strictly increasing"),
        (lambda: extraction(2, 4, 10, layer_map=[(1, 3), (2, 3)]), "not strictly increasing"),
        (lambda: extraction(2, 4, 10, layer_map=[(1, 9)]), "the teacher has blocks 1 to 4 and 'final', not 9"),
        (lambda: extraction(2, 4, 10, layer_map=[(0, 1)]), "the student has blocks 1 to 2"),
        (lambda: extraction(2, 4, 10, layer_map=[]), "layer_map is empty: give pairs such as"),
        (
            lambda: extraction(2, 4, 10, layer_map=[("final", 4), (1, "final")]),
            "final:4,1:final is not strictly increasing",
        ),
        (lambda: extraction(2, 4, 10, layer_map=3), "num_stages must be from 1 to"),
        (lambda: extraction(2, 4, 10, stage_steps=1.0), "stage_fraction must be a fraction"),
        (lambda: extraction(2, 4, 10, stage_steps=0.0), "stage_fraction must be a fraction"),
        (lambda: extraction(2, 4, 10, layer_map=0), "num_stages must be from 1 to the student's 2 blocks, got 0"),
        (lambda: extraction(2, 4, 10, stage_steps=[1]), "1 entries for 2 hidden stages"),
        (lambda: extraction(2, 4, 10, stage_steps=5), "budget too small for the stages"),
        (lambda: extraction(2, 4, 1), "budget too small for the stages"),
        (lambda: progressive(10, []), "needs the teacher's intermediate checkpoints"),
        (lambda: one_shot(10, projection="sparse"), "unknown projection 'sparse'"),
        (lambda: one_shot(10, normalize="l2"), "unknown normalize 'l2'"),
        (lambda: one_shot(10, warm_start="tail"), "unknown warm_start 'tail'"),
        (lambda: one_shot(10, temperature=0.0), "temperature must be positive"),
        (lambda: one_shot(10, output_positions="first"), "unknown output_positions 'first': use one of labelled, all"),
        (lambda: one_shot(10, output_positions="all", label_weight=0.1), "there is no label loss: use label_weight=0"),
        (lambda: one_shot(10, output_loss="mae"), "unknown output_loss 'mae': use one of kl, mse"),
        (lambda: one_shot(10, output_loss="mse", temperature=2.0), "has no temperature .2.: leave temperature out"),
        (lambda: one_shot(10, output_loss="mse", top_k=4), "compares all logits, but top_k=4 .* leave top_k out"),
        (lambda: one_shot(10, label_weight=2.0), "label_weight must be a fraction"),
        (lambda: one_shot(10, label_weight=-0.1), "label_weight must be a fraction"),
        (lambda: joint(2, 4, 10, layer_map=[(3, 3)]), "the student has blocks 1 to 2"),
        (lambda: joint(2, 4, 10, layer_map=[]), "layer_map is empty"),
        (lambda: joint(2, 4, 10, label_weight=2.0), "label_weight must be a fraction"),
        (lambda: Curriculum("mine", (JointStage(5, [(1, 2), (2, 2)]),)), "1:2,2:2 is not strictly increasing"),
        (lambda: joint(2, 4, 10, hidden_weight=-0.5), "hidden_weight must not be negative, got -0.5"),
        (lambda: Curriculum("mine", ()), "at least one stage"),
        (
            lambda: Curriculum.from_dict({"method": "mine", "stages": [{"kind": "middle", "steps": 1}]}),
            "unknown kind 'middle'",
        ),
        (lambda: parse_layer_map("1-2"), "not a student:teacher pair"),
        (lambda: parse_layer_map("a:2"), "neither a block number nor 'final'"),
    ],
)
def test_mistakes_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_curricula_that_are_older_than_a_setting_still_read() -> None:
    fields = one_shot(3, temperature=2.0).to_dict()
    for name in ("output_loss", "output_positions"):
        del fields[name]
    assert Curriculum.from_dict(fields) == one_shot(3, temperature=2.0)


def test_standardizer_gives_unit_states_and_finds_sinks() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(500, 6, generator=generator) * torch.tensor([1, 100, 1, 5, 1, 0.1]) + 3
    sink = torch.full((1, 6), 5000.0)
    fitted = Standardizer.fit(torch.cat([sink, states]))
    assert not fitted.keep(sink).any()
    kept = states[fitted.keep(states)]
    assert fitted.keep(states).float().mean() > 0.97
    torch.testing.assert_close(fitted(kept).mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(fitted(kept).std(0, correction=0), torch.ones(6), rtol=1e-4, atol=0)
    raw = Standardizer.fit(states, center=False)
    assert torch.equal(raw.mean, torch.zeros(6))
    torch.testing.assert_close(raw(kept).square().mean(0), torch.ones(6), rtol=1e-4, atol=0)
    same = Standardizer.identity(6)
    assert torch.equal(same(states), states)
    assert same.keep(sink).all()


def test_standardizer_refuses_what_it_cannot_fit() -> None:
    with pytest.raises(ValueError, match="at least 2 calibration positions, got 1"):
        Standardizer.fit(torch.ones(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        Standardizer.fit(torch.full((4, 3), float("inf")))
    constant = Standardizer.fit(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    assert torch.isfinite(constant(torch.ones(1, 2))).all()


def test_label_positions() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    mask, labels = label_positions(batch, causal=True)
    assert mask.tolist() == [[True, True, False, False]]
    assert labels is None
    batch["labels"] = torch.tensor([[5, 6, 7, -100]])
    mask, labels = label_positions(batch, causal=True)
    assert mask.tolist() == [[True, True, False, False]]
    assert labels.tolist() == [6, 7]
    mask, labels = label_positions(batch, causal=False)
    assert labels.tolist() == [5, 6, 7]


def test_last_token_under_either_padding() -> None:
    hidden = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    assert last_token(hidden, {"attention_mask": mask}).flatten().tolist() == [1.0, 7.0]
    assert last_token(hidden, {}).flatten().tolist() == [3.0, 7.0]
