"""`student_init=teacher`: the student's first weights, its hidden targets, and who gets them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.training.conftest import VOCAB, llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum, one_shot
from tutelage.core.errors import UserError
from tutelage.core.stages import HiddenStage, JointStage, OutputStage
from tutelage.targets.live import LiveTargets
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.tasks.registry import get_task
from tutelage.tasks.students import WEIGHTS, make_student, student_config, weights_of
from tutelage.training.preparation import decide_start

Make = Callable[..., CurriculumTrainer]
STILL = {"learning_rate": 0.0, "max_steps": 8, "student_init": "teacher"}  # trains nothing


def fresh(layers: int = 2, width: int = 16, **fields: Any) -> nn.Module:
    """A student whose attention heads have the size of the teacher's."""
    return llama(layers, width, seed=2, head_dim=12, **fields)


def ids(count: int = 4) -> torch.Tensor:
    return torch.tensor(token_rows(count, seed=5)["input_ids"])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits


@pytest.mark.parametrize("method", ["one_shot", "extraction", "joint"])
def test_every_method_starts_from_the_teacher(make_trainer: Make, method: str) -> None:
    teacher = llama(4, 24, seed=1)
    trainer = make_trainer(method=method, student=llama(4, 24, seed=2), teacher_model=copy.deepcopy(teacher), **STILL)
    assert trainer.curriculum.student_init == "teacher"
    trainer.train()
    torch.testing.assert_close(logits(trainer.model), logits(teacher))


def test_progressive_starts_from_the_finished_teacher(make_trainer: Make, tmp_path: Path) -> None:
    teacher = llama(4, 24, seed=1)
    llama(4, 24, seed=3).save_pretrained(tmp_path / "early")
    settings = {"method": "progressive", "teacher_checkpoints": [str(tmp_path / "early")], **STILL}
    trainer = make_trainer(student=llama(4, 24, seed=2), teacher_model=copy.deepcopy(teacher), **settings)
    trainer.train()
    torch.testing.assert_close(logits(trainer.model), logits(teacher))


def test_hidden_targets_are_what_the_initialised_student_gives(make_trainer: Make) -> None:
    """A square rotation: the student's states are the teacher's in other coordinates, so that every hidden loss is zero."""
    settings = {"method": "extraction", "layer_map": "2:2,4:4,final:final", "residual_basis": "pca", **STILL}
    trainer = make_trainer(student=llama(4, 24, seed=2), **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(losses[:3]) < 1e-8
    units = [target_map.unit for target_map in trainer.source.maps]
    assert len(set(units)) == 3
    batch = {"input_ids": ids()}
    hidden = trainer.source.states(2, batch)
    target, _ = trainer.source.hidden(0, batch)
    basis = trainer.source.started.basis_DR
    torch.testing.assert_close(target * units[0], hidden @ basis, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target.square().mean().sqrt(), torch.tensor(1.0), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("method", ["extraction", "joint"])
def test_a_resumed_run_keeps_basis_and_weights(make_trainer: Make, method: str) -> None:
    settings = {
        "method": method,
        "student_init": "teacher",
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 5,
    }
    whole = make_trainer("whole", student=fresh(), **settings)
    whole.train()
    part = make_trainer("part", student=fresh(), **settings)
    part.train()
    resumed = make_trainer("part", student=fresh(), **settings)
    resumed.train(resume_from_checkpoint=str(Path(part.args.output_dir or "") / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def encoder(layers: int, width: int, seed: int, embedding: int | None = None) -> EmbeddingModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "num_attention_heads": width // 8, "max_position_embeddings": 32}
    config = BertConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=32, **sizes)
    return EmbeddingModel(BertModel(config).eval(), embedding)


def test_a_sentence_encoder_starts_with_a_head_to_the_teachers_width() -> None:
    student = encoder(2, 8, seed=1, embedding=16)
    source = LiveTargets(encoder(4, 16, seed=0), get_task("embedding"))
    source.attach(one_shot(1, student_init="teacher"), student)
    batch = {"input_ids": ids(8)}
    source.start(student, lambda: [batch])
    assert source.started is not None and student.head is not None
    torch.testing.assert_close(student.head.weight, source.started.basis_DR)
    assert not student.head.bias.detach().any()
    with torch.no_grad():
        state = student.encoder(ids()).last_hidden_state.mean(1)
        expected = torch.nn.functional.normalize(state @ source.started.basis_DR.T, dim=-1)
        torch.testing.assert_close(student(ids()), expected)


@pytest.mark.parametrize("basis", ["pca", "random", "logits"])
def test_an_embedding_without_a_head_may_not_be_rotated(basis: str) -> None:
    source = LiveTargets(encoder(4, 16, seed=0), get_task("embedding"))
    with pytest.raises(UserError, match=f"residual_basis='{basis}' would rotate it .*: use residual_basis='identity'"):
        source.attach(one_shot(1, student_init="teacher", residual_basis=basis), encoder(2, 16, seed=1))
    source.attach(one_shot(1, student_init="teacher"), encoder(2, 16, seed=1))


@pytest.mark.parametrize(
    ("task", "kind"), [("masked_lm", BertForMaskedLM), ("sequence_classification", BertForSequenceClassification)]
)
def test_the_logits_basis_needs_a_head_that_reads_the_residual_stream(task: str, kind: Any) -> None:
    """These heads have a hidden layer of their own."""
    config = encoder(2, 16, seed=0).encoder.config
    config.tie_word_embeddings = False
    student, source = kind(config), LiveTargets(kind(config), get_task(task))
    message = f"{kind.__name__} has no output head that reads the residual stream: use residual_basis='pca'"
    with pytest.raises(UserError, match=f"residual_basis='logits' .*, but {message}"):
        source.attach(one_shot(1, student_init="teacher", residual_basis="logits"), student)
    source.attach(one_shot(1, student_init="teacher", residual_basis="pca"), student)


def test_the_logits_basis_needs_an_output_head() -> None:
    source = LiveTargets(encoder(4, 16, seed=0), get_task("embedding"))
    with pytest.raises(UserError, match="EmbeddingModel has no output head that reads the residual stream"):
        source.attach(one_shot(1, student_init="teacher", residual_basis="logits"), encoder(2, 8, seed=1, embedding=16))


@pytest.mark.parametrize(("width", "passes"), [(24, 1), (16, 2)])
def test_the_teachers_forwards_of_the_initialisation_are_counted(make_trainer: Make, width: int, passes: int) -> None:
    """One pass for heads, neurons and norms, and one before it where the basis is made of the states."""
    spent = {}
    for init in ("random", "teacher"):
        trainer = make_trainer(init, student=fresh(width=width), method="one_shot", max_steps=1, student_init=init)
        trainer.train()
        spent[init] = trainer.progress.teacher_flops
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        llama(4, 24, seed=1).model(input_ids=ids(1))
    assert spent["teacher"] - spent["random"] == pytest.approx(16 * passes * counter.get_total_flops(), rel=1e-9)
    trainer.args.overwrite_output_dir = True
    trainer.train()  # once more, from the weights that it has
    assert trainer.progress.teacher_flops == spent["random"]


# ---- Who is initialised ----


def test_a_model_that_is_passed_is_left_alone_unless_asked(make_trainer: Make) -> None:
    assert make_trainer(student=fresh()).curriculum.student_init == "random"
    assert make_trainer(student=fresh(), student_init="teacher").curriculum.student_init == "teacher"


def test_a_student_of_a_preset_starts_from_the_teacher_by_default(make_trainer: Make) -> None:
    student = fresh()
    student.__dict__[WEIGHTS] = "random"
    trainer = make_trainer(student=student)
    assert (trainer.curriculum.student_init, trainer.curriculum.projection) == ("teacher", "residual")
    assert make_trainer(student=student, preset="paper").curriculum.student_init == "random"
    assert make_trainer(student=student, student_init="random").curriculum.projection == "gaussian"


def test_a_student_with_weights_of_its_own_keeps_them(make_trainer: Make, tmp_path: Path) -> None:
    fresh().save_pretrained(tmp_path / "own")
    with pytest.warns(UserWarning, match="brings its own weights: student_init='teacher' leaves it alone"):
        trainer = make_trainer(student=str(tmp_path / "own"), method="one_shot", **STILL)
    before = fresh().state_dict()
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_student_that_cannot_be_initialised_falls_back_by_default_and_is_refused_if_asked(
    make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    student = llama(2, 16, seed=2)  # its heads have 8 values, the teacher's 12
    with pytest.raises(UserError, match="attention heads have 8 values, the teacher's 12"):
        make_trainer(student=student, student_init="teacher")
    student.__dict__[WEIGHTS] = "random"
    trainer = make_trainer(student=student)
    assert "starts from random weights: the student's attention heads have 8 values" in caplog.text
    assert trainer.curriculum.student_init == "random"


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"attention_bias": True}, {}, "the student has a bias in model.layers.0.self_attn.q_proj, the teacher none"),
        ({"tie_word_embeddings": True}, {}, "is tied to another module, the teacher's is not"),
    ],
)
def test_the_default_falls_back_before_the_teacher_runs(
    make_trainer: Make, caplog: pytest.LogCaptureFixture, fields: dict, settings: dict, message: str
) -> None:
    student = fresh(**fields)
    student.__dict__[WEIGHTS] = "random"
    assert make_trainer(student=student, **settings).curriculum.student_init == "random"
    assert "starts from random weights" in caplog.text
    assert message in caplog.text


def test_a_basis_that_cannot_work_is_refused_since_it_asks_for_the_start(make_trainer: Make) -> None:
    student = fresh()
    student.__dict__[WEIGHTS] = "random"
    with pytest.raises(UserError, match="residual_basis='identity' needs equal widths"):
        make_trainer(student=student, residual_basis="identity")


@pytest.mark.parametrize("method", ["one_shot", "extraction", "joint"])
@pytest.mark.parametrize(("given", "copied"), [(None, [1, 4]), ("uniform", [2, 4]), ("2,3", [2, 3])])
def test_a_student_starts_from_the_blocks_that_start_blocks_names(
    make_trainer: Make, method: str, given: str | None, copied: list[int]
) -> None:
    teacher = llama(4, 24, seed=1)
    student = llama(2, 24, seed=2)
    trainer = make_trainer(
        method=method, student=student, start_blocks=given, teacher_model=copy.deepcopy(teacher), **STILL
    )
    assert trainer.curriculum.start_blocks == tuple(copied)
    assert trainer.curriculum.places("teacher") == ([] if method == "one_shot" else copied)
    trainer.train()
    teacher.model.layers = nn.ModuleList([teacher.model.layers[theirs - 1] for theirs in copied])  # type: ignore[union-attr,index]
    torch.testing.assert_close(logits(trainer.model), logits(teacher))


def test_a_layer_map_that_is_given_says_which_blocks_a_student_starts_from(make_trainer: Make) -> None:
    trainer = make_trainer(method="joint", student=fresh(), layer_map="1:2,2:3", **STILL)
    assert trainer.curriculum.start_blocks is None
    assert trainer.curriculum.start_pairs == [(1, 2), (2, 3)]
    both = make_trainer(method="joint", student=fresh(), layer_map="1:2,2:3", start_blocks="1,4", **STILL)
    assert (both.curriculum.places("teacher"), both.curriculum.start_pairs) == ([2, 3], [(1, 1), (2, 4)])


def test_blocks_of_a_random_start_are_not_read(make_trainer: Make) -> None:
    with pytest.raises(
        ValueError, match="random weights does not read start_blocks: leave it out, or use student_init="
    ):
        make_trainer(method="one_shot", student_init="random", start_blocks="ends")


def test_the_default_blocks_are_the_uniform_ones_where_the_ends_do_something_else() -> None:
    source, student = smollm3()
    args = CurriculumConfig(use_cpu=True, student_init="teacher")
    assert decide_start(args, student, source).start_blocks is None
    with pytest.raises(UserError, match="block 1 of the student has no_rope_layers 0, block 1 of the teacher"):
        source.check_start(student, start_blocks="ends")


def smollm3() -> tuple[LiveTargets, nn.Module]:
    """A teacher whose blocks are of two kinds, and a student with the kinds of the uniform map."""
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 32, "pad_token_id": 0, "no_rope_layer_interval": 2}
    teacher, student = (SmolLM3ForCausalLM(SmolLM3Config(num_hidden_layers=layers, **sizes)) for layers in (4, 2))
    student.config.no_rope_layers = [0, 0]
    return LiveTargets(teacher), student


def test_the_default_checks_the_layer_map_that_is_given() -> None:
    source, student = smollm3()
    source.check_start(student)
    source.check_start(student, layer_map="1:2,2:4")
    with pytest.raises(UserError, match="block 1 of the student has no_rope_layers 0, block 1 of the teacher"):
        source.check_start(student, layer_map="1:1,2:4")


def test_a_curriculum_of_ones_own_does_not_write_over_weights_in_silence(make_trainer: Make, tmp_path: Path) -> None:
    fresh().save_pretrained(tmp_path / "own")
    stages = (OutputStage(4),)
    own = {"student": str(tmp_path / "own"), "curriculum": Curriculum("mine", stages, student_init="teacher")}
    with pytest.warns(
        UserWarning, match="the curriculum's student_init='teacher' writes over them: make the curriculum"
    ):
        make_trainer(**own)
    with pytest.warns(UserWarning, match="has student_init='random', which goes before student_init='teacher' of the"):
        make_trainer(student=fresh(), curriculum=Curriculum("mine", stages), student_init="teacher")


@pytest.mark.parametrize(("width", "basis"), [(16, "pca"), (24, "identity")])
def test_the_curriculum_names_the_basis_in_use(make_trainer: Make, width: int, basis: str) -> None:
    student = llama(2, width, seed=2, head_dim=12)
    assert make_trainer(student=student, student_init="teacher").curriculum.residual_basis == basis
    assert make_trainer(student=student).curriculum.residual_basis is None


def made() -> nn.Module:
    """A student of a preset, as the commands make it."""
    task, teacher = get_task("causal_lm"), llama(4, 24, seed=1)
    student = make_student("layers=2,hidden_size=24", task, student_config("layers=2,hidden_size=24", teacher.config))
    assert weights_of(student) == "random"
    return student


def test_a_second_run_keeps_what_the_first_one_taught(make_trainer: Make) -> None:
    student = made()
    first = make_trainer("first", student=student, overwrite_output_dir=True)
    first.train()
    assert first.curriculum.student_init == "teacher"
    learnt = copy.deepcopy(student.state_dict())
    second = make_trainer("second", student=student, learning_rate=0.0)
    assert second.curriculum.student_init == "random"
    second.train()
    assert all(torch.equal(value, learnt[name]) for name, value in student.state_dict().items())
    started = first.source.started
    first.train()
    assert first.source.started is started


def test_weights_that_are_loaded_into_a_new_student_are_its_own(make_trainer: Make) -> None:
    student = made()
    student.load_state_dict(llama(2, 24, seed=7).state_dict())
    assert weights_of(student) == "own"
    assert make_trainer(student=student).curriculum.student_init == "random"


def test_settings_that_nothing_reads_after_a_start_are_refused(make_trainer: Make) -> None:
    joint = {"student": fresh(), "method": "joint", "student_init": "teacher"}
    with pytest.raises(ValueError, match=r"projection='residual' does not read normalize: .* leave normalize out"):
        make_trainer(**joint, normalize="none")
    with pytest.raises(ValueError, match="starts from random weights does not read residual_basis: leave it out"):
        make_trainer(student=fresh(), residual_basis="pca")
    with pytest.warns(UserWarning, match="torch_compile does nothing in a joint stage"):
        make_trainer(**joint, torch_compile=True)


def test_a_curriculum_of_ones_own_may_start_from_the_teacher(make_trainer: Make) -> None:
    stages = (OutputStage(4),)
    trainer = make_trainer(
        student=llama(4, 24, seed=2),
        curriculum=Curriculum("mine", stages, student_init="teacher"),
        learning_rate=0.0,
        max_steps=4,
    )
    trainer.train()
    torch.testing.assert_close(logits(trainer.model), logits(llama(4, 24, seed=1)))


@pytest.mark.parametrize(
    "stages",
    [
        (HiddenStage(2, 2, 4), HiddenStage(2, 1, 2), OutputStage(1)),
        (HiddenStage(2, FINAL, FINAL), JointStage(3, ((1, 2), (FINAL, FINAL)))),
    ],
)
def test_the_stages_of_a_curriculum_of_ones_own_may_come_in_any_order(make_trainer: Make, stages: Any) -> None:
    curriculum = Curriculum("mine", stages, student_init="teacher", projection="residual")
    trainer = make_trainer(student=fresh(), curriculum=curriculum, max_steps=5)
    trainer.train()
    for number, stage in enumerate(curriculum.hidden_stages):
        assert trainer.source.maps[number].unit > 0, stage


def test_residual_targets_need_a_student_that_starts_from_the_teacher() -> None:
    with pytest.raises(UserError, match="projection='residual' needs a student that was initialised through it"):
        Curriculum("mine", (OutputStage(1),), projection="residual")
    with pytest.raises(UserError, match="unknown student_init 'both': use one of random, teacher"):
        Curriculum("mine", (OutputStage(1),), student_init="both")
    with pytest.raises(UserError, match="warm_start='head' would write over weights that student_init='teacher' gave"):
        Curriculum("mine", (OutputStage(1),), "residual", warm_start="head", student_init="teacher")
    with pytest.raises(UserError, match="unknown residual_basis 'svd'"):
        Curriculum("mine", (OutputStage(1),), residual_basis="svd")


def test_the_first_weights_do_not_depend_on_the_students_seed(make_trainer: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = []
        for seed in (2, 7):
            trainer = make_trainer(
                f"seed-{seed}", student=llama(2, 16, seed=seed, head_dim=12), method="one_shot", **STILL
            )
            trainer.train()
            found.append(trainer.model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_residual_targets_are_calibrated_by_one_forward_of_the_teacher(make_trainer: Make) -> None:
    settings = {"method": "joint", "student_init": "teacher", "layer_map": "1:1,2:3,final:final", "max_steps": 1}
    trainer = make_trainer(student=fresh(3), **settings)
    trainer.train()
    source, batch = trainer.source, {"input_ids": torch.tensor(token_rows()["input_ids"][:16])}  # calibration_samples
    assert isinstance(source, LiveTargets) and source.started is not None
    for pair, target_map in zip(trainer.curriculum.hidden_stages, source.maps, strict=True):
        states = source.states(pair.teacher_place, batch).flatten(0, 1)
        norms = states.norm(dim=-1)
        kept = states[norms <= 4 * norms.median()]
        encoded = kept @ source.started.matrix(pair.teacher_place)
        assert target_map.unit == pytest.approx(float(encoded.square().mean().sqrt()), rel=1e-5)
        assert target_map.standardizer.sink_norm == pytest.approx(float(4 * norms.median()), rel=1e-6)
    assert list(source.calibrated.values()) == [0, 0, 16 * 12]
