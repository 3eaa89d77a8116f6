"""The head transplant and the embedding warm start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from tests.training.conftest import VOCAB, llama
from tutelage import CurriculumTrainer, forward_to
from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum
from tutelage.core.heads import OutputHead
from tutelage.core.projection import RandomProjection
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.core.standardize import Standardizer
from tutelage.targets.live import LiveTargets
from tutelage.targets.maps import Calibration, TargetMap, calibrate
from tutelage.tasks.base import Task
from tutelage.tasks.embedding import EmbeddingModel
from tutelage.training import warm_start
from tutelage.training.objective import StageObjective
from tutelage.training.warm_start import apply_before_output, apply_before_training, is_tied

Make = Callable[..., CurriculumTrainer]
STAGES = (HiddenStage(1, FINAL, FINAL), OutputStage(1))


def bert(width: int, seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    fields = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForMaskedLM(
        BertConfig(vocab_size=VOCAB, initializer_range=0.3, tie_word_embeddings=False, **fields)
    ).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(1, VOCAB, (8, 12), generator=generator)} for _ in range(4)]


def target_map_of(teacher: LiveTargets, curriculum: Curriculum, width: int, center: bool) -> TargetMap:
    head = None if isinstance(teacher.model, EmbeddingModel) else OutputHead.of(teacher.model)
    calibration = Calibration(width, center_final=center, keep_moment=True, head=head)
    target_map = calibrate(teacher.stage_states, curriculum, batches(), teacher.blocks, calibration)[0]
    assert target_map is not None
    return target_map


def objective_of(
    student: nn.Module,
    teacher: LiveTargets,
    curriculum: Curriculum,
    target_map: TargetMap | None = None,
    outputs: int | None = None,
) -> StageObjective:
    teacher.attach(curriculum, student, outputs)
    teacher.maps = [target_map]
    return StageObjective(student, teacher)


@pytest.fixture
def perfect_student(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the student's state at `final` be its target, plus noise if asked for."""

    def perfect(teacher: LiveTargets, target_map: TargetMap, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(7)

        states = type(teacher.task).state_at

        def state(task: Task, model: nn.Module, place: Any, batch: Any, blocks: Any = None) -> torch.Tensor:
            if model is teacher.model:
                return states(task, model, place, batch, blocks)
            assert place == FINAL
            target = target_map(teacher.states(FINAL, batch))
            return target + noise * target.std() * torch.randn(target.shape, generator=generator)

        monkeypatch.setattr(type(teacher.task), "state_at", state)

    return perfect


@pytest.mark.parametrize("projection", ["gaussian", "orthogonal", "rademacher", "pca", "logits"])
@pytest.mark.parametrize("normalize", ["standardize", "none"])
@pytest.mark.parametrize("kind", ["llama without bias", "bert with bias"])
def test_full_width_transplant_gives_the_teachers_logits(
    projection: str, normalize: str, kind: str, perfect_student: Callable[..., None]
) -> None:
    """With r = d_T and a student state equal to its target, the transplanted logits equal the teacher's."""
    if kind == "bert with bias":
        teacher_model, student, center = bert(24, 1), bert(24, 2), True
        teacher_model.cls.predictions.bias.data.normal_()
    else:
        teacher_model, student, center = llama(3, 24, seed=1).eval(), llama(2, 24, seed=2), False
    curriculum = Curriculum("extraction", STAGES, projection, normalize=normalize, warm_start="head")
    teacher = LiveTargets(teacher_model.double())
    target_map = target_map_of(teacher, curriculum, 24, center)
    perfect_student(teacher, target_map)
    apply_before_output(objective_of(student.double(), teacher, curriculum, target_map), batches)
    ids = batches()[0]["input_ids"]
    state = target_map(teacher.states(FINAL, {"input_ids": ids}))
    mine = OutputHead.of(student)(state.double())
    theirs = teacher_model(input_ids=ids).logits
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-3 * theirs.abs().max().item())


def test_narrow_transplant_is_the_least_squares_head(perfect_student: Callable[..., None]) -> None:
    """With r < d_T no other linear head is expected to predict the logits better from the targets."""
    teacher_model, student = llama(3, 24, seed=1).eval(), llama(2, 12, seed=2)
    curriculum = Curriculum("extraction", STAGES, warm_start="head")
    teacher = LiveTargets(teacher_model)
    target_map = target_map_of(teacher, curriculum, 12, center=False)
    perfect_student(teacher, target_map)
    apply_before_output(objective_of(student, teacher, curriculum, target_map), batches)
    assert target_map.moment is not None
    root = torch.linalg.cholesky(target_map.moment.double())  # states whose second moment is that of the calibration
    codes = root.T @ target_map.projection.matrix().double()
    logits = root.T @ (teacher_model.lm_head.weight.double() * target_map.standardizer.scale.double()).T
    best = torch.linalg.lstsq(codes, logits).solution
    torch.testing.assert_close(student.lm_head.weight.double(), best.T, rtol=1e-3, atol=1e-4)


def test_noise_within_bounds_leaves_the_transplant_as_it_is(perfect_student: Callable[..., None]) -> None:
    """A narrow projection's way back magnifies little, so a student that has learnt half is treated like a perfect one."""
    teacher_model, curriculum = llama(3, 24, seed=1).eval(), Curriculum("extraction", STAGES, warm_start="head")
    teacher, heads = LiveTargets(teacher_model), []
    target_map = target_map_of(teacher, curriculum, 6, center=False)
    for noise in (0.0, 0.7):
        student = llama(2, 6, seed=2, num_attention_heads=1, num_key_value_heads=1)
        perfect_student(teacher, target_map, noise)
        apply_before_output(objective_of(student, teacher, curriculum, target_map), batches)
        heads.append(student.lm_head.weight)
    torch.testing.assert_close(heads[1], heads[0])


def test_noise_in_a_student_of_full_width_is_not_magnified(perfect_student: Callable[..., None]) -> None:
    """The pseudo-inverse of a square gaussian matrix magnifies what the student has not learnt a hundredfold."""
    teacher_model, student = llama(3, 24, seed=1).eval(), llama(2, 24, seed=2)
    curriculum = Curriculum("extraction", STAGES, "gaussian", warm_start="head")
    teacher = LiveTargets(teacher_model)
    target_map = target_map_of(teacher, curriculum, 24, center=False)
    perfect_student(teacher, target_map, noise=0.5)
    apply_before_output(objective_of(student, teacher, curriculum, target_map), batches)
    batch = batches()[0]
    theirs = teacher_model(**batch).logits
    mine = student.lm_head(teacher.task.state_at(student, FINAL, batch))
    naive = target_map.projection.decoder() * target_map.standardizer.scale
    inverted = teacher.task.state_at(student, FINAL, batch) @ naive @ teacher_model.lm_head.weight.T
    assert (mine - theirs).square().mean() < 2 * theirs.square().mean()
    assert (inverted - theirs).square().mean() > 10 * theirs.square().mean()


def test_a_decoder_bounds_its_noise_only_where_it_must() -> None:
    square = RandomProjection(24, 24, 0)
    decode = square.decoder(max_gain=4.0)
    size = square.matrix().square().sum() / 24
    assert decode.square().sum() * size <= 4.0 * 24
    assert square.decoder().square().sum() * size > 4.0 * 24
    narrow = RandomProjection(24, 8, 0)
    torch.testing.assert_close(narrow.decoder(max_gain=4.0), narrow.decoder())


def test_embedding_head_is_the_way_back_to_the_teachers_width(perfect_student: Callable[..., None]) -> None:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    teacher_model = EmbeddingModel(BertModel(config)).eval()
    student = EmbeddingModel(BertModel(config), embedding_size=24)
    curriculum = Curriculum("extraction", STAGES, warm_start="head")
    teacher = LiveTargets(teacher_model)
    target_map = target_map_of(teacher, curriculum, 24, center=True)
    perfect_student(teacher, target_map)
    apply_before_output(objective_of(student, teacher, curriculum, target_map), batches)
    batch = batches()[0]
    pooled_target = target_map(teacher.states(FINAL, batch)).mean(1)
    assert student.head is not None
    embedding = torch.nn.functional.normalize(student.head(pooled_target), dim=-1)
    torch.testing.assert_close(embedding, teacher.whole_output(batch), rtol=0, atol=1e-3)


def test_tied_student_keeps_its_shared_matrix_through_the_hidden_stage(make_trainer: Make) -> None:
    student = llama(2, 16, seed=2, tie_word_embeddings=True)
    assert is_tied(student)
    before = student.lm_head.weight.clone()
    trainer = make_trainer(student=student, layer_map="final:final", stage_steps=[6], warm_start="head", max_steps=9)
    shared = []
    original = trainer.training_step

    def spy(*args):
        shared.append(student.lm_head.weight.detach().clone())
        return original(*args)

    trainer.training_step = spy  # type: ignore[method-assign]
    trainer.train()
    assert not torch.equal(shared[0], before)
    assert all(torch.equal(matrix, shared[0]) for matrix in shared[:7])
    assert not torch.equal(student.lm_head.weight, shared[0])  # the output stage trains it
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_untied_head_is_transplanted_when_the_output_stage_begins(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(layer_map="final:final", stage_steps=[6], warm_start="head", max_steps=7)
    heads = []
    original = trainer.training_step

    def spy(*args):
        heads.append(trainer.model.lm_head.weight.detach().clone())
        return original(*args)

    trainer.training_step = spy  # type: ignore[method-assign]
    initial = trainer.model.lm_head.weight.detach().clone()
    seen = []
    decode = RandomProjection.decoder
    monkeypatch.setattr(
        RandomProjection, "decoder", lambda *args, **kwargs: seen.append(decode(*args, **kwargs)) or seen[-1]
    )
    trainer.train()
    assert all(torch.equal(head, initial) for head in heads[:6])
    target_map = trainer.source.maps[0]
    assert target_map is not None
    (decoder,) = seen
    assert isinstance(trainer.source, LiveTargets)
    weight = trainer.source.model.lm_head.weight.double()
    expected = weight * target_map.standardizer.scale.double() @ decoder.T.double()
    torch.testing.assert_close(heads[6].double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(target_map.standardizer.mean, torch.zeros(24))  # no bias, so nothing to carry a mean


def test_none_leaves_the_students_own_start(make_trainer: Make) -> None:
    trainer = make_trainer(layer_map="final:final", stage_steps=[6], max_steps=7)
    heads = []
    original = trainer.training_step
    trainer.training_step = lambda *a: (heads.append(trainer.model.lm_head.weight.clone()), original(*a))[1]  # type: ignore[method-assign]
    trainer.train()
    assert torch.equal(heads[0], heads[6])


def test_embedding_starts_as_a_projection_of_the_teachers() -> None:
    teacher_model, student = llama(3, 24, seed=1), llama(2, 16, seed=2)
    deviation = student.model.embed_tokens.weight.std()
    curriculum = Curriculum("extraction", STAGES, warm_start="embedding")
    apply_before_training(objective_of(student, LiveTargets(teacher_model), curriculum))
    mine = student.model.embed_tokens.weight
    torch.testing.assert_close(mine.std(), deviation)
    coefficients = torch.linalg.lstsq(teacher_model.model.embed_tokens.weight, mine)
    residual = teacher_model.model.embed_tokens.weight @ coefficients.solution - mine
    assert residual.abs().max() < 1e-4 * mine.abs().max()


def test_an_embedding_that_is_the_output_head_too_is_not_projected_without_saying_so(make_trainer: Make) -> None:
    tied = llama(2, 16, seed=2, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"warm_start='embedding': .*tied.*; use 'head' or 'none'"):
        make_trainer(student=tied, layer_map="final:final", warm_start="embedding")
    with pytest.warns(UserWarning, match="the transplanted head is used for both"):
        make_trainer(student=tied, layer_map="final:final", warm_start="head+embedding")
    make_trainer(student=llama(2, 16, seed=2), layer_map="final:final", warm_start="embedding")


def test_warm_start_needs_a_head_stage(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="final:final"):
        make_trainer(layer_map="1:2", warm_start="head")


def test_different_soft_caps_are_refused() -> None:
    def gemma(cap: float | None) -> Gemma2ForCausalLM:
        fields = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": cap}
        config = Gemma2Config(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, **fields)
        config.tie_word_embeddings = False
        return Gemma2ForCausalLM(config)

    curriculum = Curriculum("extraction", STAGES, warm_start="head")
    teacher = LiveTargets(gemma(30.0))
    with pytest.raises(ValueError, match="soft-caps"):
        warm_start.check(objective_of(gemma(None), teacher, curriculum))


def test_padded_vocabulary_rows_are_left_alone(perfect_student: Callable[..., None]) -> None:
    teacher_model = llama(3, 24, seed=1)
    student: LlamaForCausalLM = llama(2, 24, seed=2)
    student.resize_token_embeddings(VOCAB + 3)
    before = student.lm_head.weight.detach().clone()
    curriculum = Curriculum("extraction", STAGES, warm_start="head")
    teacher = LiveTargets(teacher_model)
    target_map = target_map_of(teacher, curriculum, 24, center=False)
    perfect_student(teacher, target_map)
    apply_before_output(objective_of(student, teacher, curriculum, target_map, VOCAB), batches)
    assert torch.equal(student.lm_head.weight[VOCAB:], before[VOCAB:])
    ids = batches()[0]["input_ids"]
    state = target_map(forward_to(teacher_model, FINAL, input_ids=ids))
    theirs = teacher_model(input_ids=ids).logits
    torch.testing.assert_close(OutputHead.of(student, VOCAB)(state), theirs, rtol=0, atol=1e-2)


def test_a_transplanted_head_is_finite_where_the_teacher_rules_outputs_out() -> None:
    teacher, student = nn.Linear(6, 9), nn.Linear(6, 9)
    with torch.no_grad():
        teacher.bias[:4] = -torch.inf
    warm_start.transplant_head(OutputHead(student), Standardizer.identity(6), torch.eye(6), OutputHead(teacher))
    states = torch.randn(5, 6)
    assert torch.isfinite(student.bias).all()
    torch.testing.assert_close(student(states).softmax(-1), teacher(states).softmax(-1))
