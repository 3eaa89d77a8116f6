"""The live teacher, calibration, target maps on disk, and teacher checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BertModel, LlamaForCausalLM

from tests.conftest import VOCAB, bert_config, llama_config, save_llama
from tutelage.core.blocks import FINAL
from tutelage.core.curriculum import Curriculum, extraction
from tutelage.core.heads import OutputHead
from tutelage.core.projection import RANDOM_KINDS, RandomProjection
from tutelage.core.stages import HiddenStage
from tutelage.core.standardize import SINK_FACTOR
from tutelage.targets.checkpoints import check_checkpoint, load_checkpoint
from tutelage.targets.live import LiveTargets
from tutelage.targets.maps import Calibration, TargetMap, calibrate, load_target_maps, save_target_maps
from tutelage.tasks.embedding import EmbeddingModel, load_embedding_model
from tutelage.tasks.registry import get_task

WIDTH = 16


@pytest.fixture
def teacher(causal_teacher: Path) -> LiveTargets:
    return LiveTargets(AutoModelForCausalLM.from_pretrained(causal_teacher).train())


def batch(rows: int = 8, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens; row i is padded from position length - i."""
    ids = torch.randint(6, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < length - torch.arange(rows).unsqueeze(1)).long()
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def maps_of(
    teacher: LiveTargets, layer_map: Any = ((1, 2), (FINAL, FINAL)), moment: bool = False, **settings: Any
) -> tuple[Curriculum, Any]:
    curriculum = extraction(2, 4, 30, layer_map=list(layer_map), **settings)
    calibration = Calibration(WIDTH, keep_moment=moment, head=OutputHead.of(teacher.model))
    return curriculum, calibrate(teacher.stage_states, curriculum, [batch(seed=1), batch(seed=2)], 4, calibration)


# ---- The live teacher ----


def test_the_teacher_is_frozen_and_in_evaluation_mode(teacher: LiveTargets) -> None:
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.states(2, batch()).requires_grad


def test_hidden_states_are_the_models_own(teacher: LiveTargets) -> None:
    inputs = batch()
    with torch.no_grad():
        states = teacher.model(**inputs, output_hidden_states=True).hidden_states
    for place in range(4):  # the last entry of Llama's is after the final norm
        torch.testing.assert_close(teacher.states(place, inputs), states[place], rtol=0, atol=0)
    torch.testing.assert_close(teacher.states(FINAL, inputs), states[4], rtol=0, atol=0)


def test_an_encoders_stages_run_in_the_encoder() -> None:
    model = EmbeddingModel(BertModel(bert_config()), embedding_size=12)
    teacher, inputs = LiveTargets(model), batch()
    assert teacher.backbone is model.encoder
    assert teacher.block_names.names[0] == "encoder.layer.0"
    assert teacher.states(4, inputs).shape == (8, 12, 32)
    torch.testing.assert_close(teacher.whole_output(inputs), model(**inputs), rtol=0, atol=0)


# ---- Calibration ----


def test_statistics_are_those_of_the_positions_that_are_no_padding(teacher: LiveTargets) -> None:
    _, maps = maps_of(teacher)
    parts = [batch(seed=1), batch(seed=2)]
    states = torch.cat([teacher.states(2, part)[part["attention_mask"].bool()] for part in parts])
    assert len(states) == 2 * sum(range(5, 13))
    expected = states[states.norm(dim=-1) <= SINK_FACTOR * states.norm(dim=-1).median()]
    torch.testing.assert_close(maps[0].standardizer.mean, expected.mean(0))
    torch.testing.assert_close(maps[0].standardizer.scale, expected.std(0, correction=0))


def test_statistics_do_not_see_sinks(teacher: LiveTargets) -> None:
    """A token with a huge embedding makes sinks of its positions."""
    sink = VOCAB - 1
    parts = [batch(seed=1), batch(seed=2)]
    for part in parts:
        part["input_ids"][part["input_ids"] == sink] = sink - 1
    curriculum = extraction(2, 4, 30, layer_map=[(1, 1)])
    (before,) = calibrate(teacher.stage_states, curriculum, parts, 4, Calibration(WIDTH))
    teacher.model.model.embed_tokens.weight[sink] = 1000.0
    for part in parts:  # at the end of the first row, where no other position attends to it
        part["input_ids"] = torch.cat([part["input_ids"], torch.zeros(8, 1, dtype=torch.long)], dim=1)
        part["attention_mask"] = torch.cat([part["attention_mask"], torch.zeros(8, 1, dtype=torch.long)], dim=1)
        part["input_ids"][0, -1], part["attention_mask"][0, -1] = sink, 1
    (after,) = calibrate(teacher.stage_states, curriculum, parts, 4, Calibration(WIDTH))
    torch.testing.assert_close(after.standardizer.mean, before.standardizer.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.standardizer.scale, before.standardizer.scale, rtol=1e-5, atol=1e-6)
    keep = after.standardizer.keep(teacher.states(1, parts[0]))
    assert not keep[0, -1]
    assert keep[parts[0]["input_ids"] != sink].all()


def test_normalize_none_leaves_states_as_they_are(teacher: LiveTargets) -> None:
    curriculum, maps = maps_of(teacher, normalize="none")
    hidden = teacher.states(2, batch())
    matrix = RandomProjection(32, WIDTH, (curriculum.projection_seed, 2)).matrix()
    torch.testing.assert_close(maps[0](hidden), hidden @ matrix)
    assert maps[0].standardizer.keep(1e6 * hidden).all()


def test_each_place_has_its_own_random_projection(teacher: LiveTargets) -> None:
    for kind in RANDOM_KINDS:
        _, maps = maps_of(teacher, projection=kind, projection_seed=7)
        for target_map, number in zip(maps, (2, 5), strict=True):  # `final` is numbered L_T + 1
            expected = RandomProjection(32, WIDTH, (7, number), kind).matrix()
            torch.testing.assert_close(target_map.projection.matrix(), expected, rtol=0, atol=0)


def _unit_directions(target_map: TargetMap) -> torch.Tensor:
    """The subspace that a projection keeps, as an orthogonal projector, (D, D)."""
    q, _ = torch.linalg.qr(target_map.projection.matrix().double())
    return q @ q.T


def test_pca_keeps_the_principal_directions(teacher: LiveTargets) -> None:
    _, maps = maps_of(teacher, projection="pca", moment=True)
    parts = [batch(seed=1), batch(seed=2)]
    for target_map, place in zip(maps, (2, FINAL), strict=True):
        states = torch.cat([teacher.states(place, part)[part["attention_mask"].bool()] for part in parts])
        states = target_map.standardizer(states[target_map.standardizer.keep(states)]).double()
        _, _, v = torch.linalg.svd(states, full_matrices=False)
        torch.testing.assert_close(_unit_directions(target_map), v[:WIDTH].T @ v[:WIDTH], rtol=1e-4, atol=1e-5)
    matrix = maps[1].projection.matrix()
    torch.testing.assert_close(matrix.T @ maps[1].moment @ matrix, torch.eye(WIDTH), rtol=1e-4, atol=1e-4)


def test_the_head_projection_is_built_from_the_teachers_head(teacher: LiveTargets) -> None:
    """Of all codes of its width, it has the least squared error in the centred logits: that of a truncated SVD."""
    _, maps = maps_of(teacher, projection="logits", moment=True)
    _, by_variance = maps_of(teacher, projection="pca", moment=True)
    moment, weight = maps[1].moment.double(), teacher.model.lm_head.weight.double()
    weight = (weight - weight.mean(0)) * maps[1].standardizer.scale.double()

    def error(target_map: TargetMap) -> float:
        projection = target_map.projection
        lost = torch.eye(32).double() - projection.matrix().double() @ projection.decoder(moment).double()
        return (weight @ lost.T @ moment @ lost @ weight.T).trace().item()

    best = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment))[WIDTH:].square().sum().item()
    assert error(maps[1]) == pytest.approx(best, rel=1e-4)
    assert error(by_variance[1]) > 1.05 * best
    torch.testing.assert_close(_unit_directions(maps[0]), _unit_directions(by_variance[0]))  # a block has no head above


# ---- On disk ----


@pytest.mark.parametrize("projection", [*RANDOM_KINDS, "pca", "logits"])
@pytest.mark.parametrize("moment", [False, True])
@pytest.mark.parametrize("normalize", ["standardize", "none"])
def test_stored_maps_give_the_same_targets(
    teacher: LiveTargets, tmp_path: Path, projection: str, moment: bool, normalize: str
) -> None:
    curriculum, maps = maps_of(teacher, moment=moment, projection=projection, normalize=normalize)
    save_target_maps(maps, tmp_path / "target_stats.safetensors")
    loaded = load_target_maps(tmp_path / "target_stats.safetensors", curriculum, WIDTH, 4)
    assert len(loaded) == len(maps) == 2
    for stage, one, two in zip(curriculum.hidden_stages, maps, loaded, strict=True):
        hidden = teacher.states(stage.teacher_place, batch(seed=9))
        torch.testing.assert_close(two(hidden), one(hidden), rtol=0, atol=0)
        assert torch.equal(two.standardizer.keep(hidden), one.standardizer.keep(hidden))
        assert (one.moment is None) == (two.moment is None) == (not moment or stage.teacher_place != FINAL)
        if one.moment is not None:
            torch.testing.assert_close(two.moment, one.moment, rtol=0, atol=0)


@pytest.mark.parametrize("projection", [*RANDOM_KINDS, "pca", "logits"])
def test_a_random_projection_is_never_stored(teacher: LiveTargets, tmp_path: Path, projection: str) -> None:
    _, maps = maps_of(teacher, projection=projection)
    save_target_maps(maps, tmp_path / "target_stats.safetensors")
    stored = load_file(tmp_path / "target_stats.safetensors")
    matrices = [name for name, value in stored.items() if value.dim() == 2]
    assert matrices == ([] if projection in RANDOM_KINDS else ["0.projection", "1.projection"])
    assert [file.name for file in tmp_path.iterdir()] == ["target_stats.safetensors"]


# ---- Checkpoints ----


def test_another_checkpoint_is_loaded(teacher: LiveTargets, tmp_path: Path) -> None:
    early = save_llama(tmp_path / "early", seed=5)
    check_checkpoint(teacher.model, str(early))
    load_checkpoint(teacher.model, str(early))
    torch.testing.assert_close(dict(teacher.model.state_dict()), load_file(early / "model.safetensors"), rtol=0, atol=0)


def test_a_checkpoint_with_tied_embeddings(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "tied", seed=5, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    teacher = LiveTargets(LlamaForCausalLM(llama_config(tie_word_embeddings=True)))
    check_checkpoint(teacher.model, str(folder))
    load_checkpoint(teacher.model, str(folder))
    expected = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    torch.testing.assert_close(teacher.model.lm_head.weight, expected, rtol=0, atol=0)


@pytest.mark.parametrize("embedding_size", [None, 12])
def test_a_sentence_encoders_checkpoint(tmp_path: Path, embedding_size: int | None) -> None:
    for seed, name in enumerate(("early", "late")):
        torch.manual_seed(seed)
        EmbeddingModel(BertModel(bert_config()), embedding_size).save_pretrained(tmp_path / name)
    early, late = (load_embedding_model(str(tmp_path / name)) for name in ("early", "late"))
    teacher = LiveTargets(late)
    assert not torch.equal(teacher.whole_output(batch()), early.eval()(**batch()))
    check_checkpoint(late, str(tmp_path / "early"))
    load_checkpoint(teacher.model, str(tmp_path / "early"))
    torch.testing.assert_close(teacher.whole_output(batch()), early(**batch()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 3}, r"it lacks model.layers.3\.[a-z_.]+$"),
        ({"num_hidden_layers": 5}, r"the teacher lacks its model.layers.4\.[a-z_.]+$"),
        ({"hidden_size": 16}, r"model.embed_tokens.weight has shape \[102, 16\] there and \[102, 32\] in the teacher"),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
            "its num_attention_heads is 8, the teacher's is 4",
        ),
    ],
)
def test_a_checkpoint_of_another_architecture(
    teacher: LiveTargets, tmp_path: Path, fields: dict[str, int], message: str
) -> None:
    folder = save_llama(tmp_path / "other", **fields)
    for check in (check_checkpoint, load_checkpoint):
        with pytest.raises(ValueError, match=f"has a different architecture than the teacher: {message}"):
            check(teacher.model, str(folder))


def test_folders_that_are_no_checkpoint(teacher: LiveTargets, causal_teacher: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"is not a folder with model.safetensors in it"):
            check_checkpoint(teacher.model, str(folder))
    damaged = Path(shutil.copytree(causal_teacher, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        check_checkpoint(teacher.model, str(damaged))


def test_what_a_checkpoint_does_not_fit_is_named(teacher: LiveTargets, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student checkpoint .* is not a folder with model.safetensors in it"):
        load_checkpoint(teacher.model, str(tmp_path), what="student")
    folder = save_llama(tmp_path / "other", num_hidden_layers=5)
    with pytest.raises(
        ValueError, match=r"different architecture than the student: the student lacks its model.layers.4"
    ):
        load_checkpoint(teacher.model, str(folder), what="student")


class Copies(TorchDispatchMode):
    """Counts the bytes of the tensors that are copied into new ones, and where those are."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.devices = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy):
            self.bytes += result.numel() * result.element_size()
            self.devices.add((kwargs or {}).get("device"))
        return result


def test_a_checkpoint_leaves_one_copy_of_the_finished_teacher_on_the_cpu(tmp_path: Path) -> None:
    tied = llama_config(tie_word_embeddings=True)
    folders = [str(save_llama(tmp_path / name, seed, tie_word_embeddings=True)) for seed, name in ((5, "a"), (6, "b"))]
    teacher = LiveTargets(LlamaForCausalLM(tied))
    weights = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    size = sum(parameter.numel() * 4 for parameter in teacher.model.parameters())  # without the tied head

    def holds(expected: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(teacher.model.state_dict()[name], value) for name, value in expected.items())

    with Copies() as copies:
        for folder in folders:
            teacher.use_checkpoint(folder)
            assert holds(load_file(Path(folder) / "model.safetensors"))
            with teacher.finished():
                assert holds(weights)
            assert holds(load_file(Path(folder) / "model.safetensors"))
        teacher.use_checkpoint(None)
    assert holds(weights) and teacher._finished is None
    assert copies.bytes == size and copies.devices == {torch.device("cpu")}


def test_checkpoints_of_a_teacher_that_holds_its_weights_otherwise_are_refused(
    teacher: LiveTargets, causal_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher.model.hf_device_map = {"": "cpu"}
    check_checkpoint(teacher.model, str(causal_teacher))
    monkeypatch.setattr(type(teacher.model), "is_quantized", True, raising=False)
    with pytest.raises(ValueError, match="the teacher is quantised, so that no checkpoint can take the place"):
        check_checkpoint(teacher.model, str(causal_teacher))
    monkeypatch.undo()
    teacher.model.lm_head.to("meta")
    with pytest.raises(ValueError, match="teacher_device_map keeps a part of the teacher outside of the devices"):
        check_checkpoint(teacher.model, str(causal_teacher))


def test_a_plain_module_can_teach() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    source = LiveTargets(network, get_task("classification"))
    assert source.blocks == len(source.block_names) == 3


def test_the_head_map_is_not_centred_where_the_student_has_no_bias(teacher: LiveTargets) -> None:
    curriculum = Curriculum("mine", (HiddenStage(5, FINAL, FINAL), HiddenStage(5, 1, 2)))
    head, block = calibrate(teacher.stage_states, curriculum, [batch()], 4, Calibration(WIDTH, center_final=False))
    assert not head.standardizer.mean.any()
    assert block.standardizer.mean.any()
