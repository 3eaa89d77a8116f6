"""Students of several seeds that train side by side, each as it would alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import default_data_collator

from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.curriculum import Curriculum, extraction
from tutelage.core.projection import RandomProjection, StackedProjection
from tutelage.core.stages import HiddenStage, OutputStage
from tutelage.targets.live import LiveTargets
from tutelage.targets.maps import Calibration, calibrate, load_target_maps, random_projection, save_target_maps
from tutelage.tasks.base import EvaluationTools
from tutelage.tasks.parity import ParityData, ParityMLP, ParityMLPConfig
from tutelage.tasks.registry import get_task
from tutelage.training.objective import StageObjective

D, K, WIDTH, SEEDS, BATCH = 10, 3, 12, (0, 5, 9), 16
TASK = get_task("classification")


def student(seeds: Sequence[int]) -> ParityMLP:
    return ParityMLP(ParityMLPConfig(D, WIDTH, replica_seeds=seeds))


def teacher(seed: int = 1) -> ParityMLP:
    torch.manual_seed(seed)
    model = ParityMLP(ParityMLPConfig(D, 40))
    with torch.no_grad():
        model.head.weight.mul_(5)  # far from uniform
    return model


def batch_of(seeds: Sequence[int], count: int = BATCH) -> dict[str, torch.Tensor]:
    ids, labels = ParityData(D, K, count, seeds).arrays()
    return {"input_ids": ids, "labels": labels}


def hidden_then_output(pair: tuple[Any, Any] = (1, 2), label_weight: float = 0.0, **settings: Any) -> Curriculum:
    stages = (HiddenStage(6, *pair, learning_rate=1.0), OutputStage(6, label_weight=label_weight))
    return Curriculum("extraction", stages, **{"normalize": "none", **settings})


def gradients(seeds: Sequence[int], curriculum: Curriculum, stage: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch of the seeds' own data; calibrated on the same text for all."""
    model, live = student(seeds), LiveTargets(teacher(), TASK)
    live.attach(curriculum, model)
    live.maps = calibrate(live.stage_states, curriculum, [batch_of((77,), 64)], 2, Calibration(WIDTH, list(seeds)))
    objective = StageObjective(model, live)
    objective.stage_index = stage
    loss = objective(**batch_of(seeds))["loss"]
    loss.backward()
    trained = [*model.named_parameters(), *objective.learned.named_parameters()]
    return loss.item(), {name: p.grad for name, p in trained if p.grad is not None}


@pytest.mark.parametrize(
    ("stage", "curriculum"),
    [
        pytest.param(0, hidden_then_output((1, 2)), id="pre-activation"),
        pytest.param(0, hidden_then_output((2, 2)), id="post-activation"),
        pytest.param(0, hidden_then_output((1, 1), normalize="standardize"), id="standardised"),
        pytest.param(0, hidden_then_output((2, 2), projection="orthogonal"), id="orthogonal"),
        pytest.param(0, hidden_then_output((2, 2), projection="learned"), id="learned"),
        pytest.param(1, hidden_then_output(temperature=2.0), id="output"),
        pytest.param(1, hidden_then_output(output_loss="mse"), id="mean-squares"),
        pytest.param(1, hidden_then_output(label_weight=0.3), id="output-and-labels"),
        pytest.param(1, hidden_then_output(label_weight=1.0), id="labels"),
    ],
)
def test_each_replica_has_the_gradients_of_its_seed_alone(stage: int, curriculum: Curriculum) -> None:
    loss, together = gradients(SEEDS, curriculum, stage)
    losses = []
    for replica, seed in enumerate(SEEDS):
        own_loss, alone = gradients((seed,), curriculum, stage)
        losses.append(own_loss)
        assert alone.keys() == together.keys()
        for name, gradient in alone.items():
            assert gradient.abs().max() > 1e-4, name
            torch.testing.assert_close(together[name][replica], gradient[0], rtol=1e-5, atol=1e-7)
    assert loss == pytest.approx(sum(losses), rel=1e-6)  # the sum, not the mean: a replica's step is its own
    assert len({round(value, 6) for value in losses}) == len(SEEDS)


@pytest.mark.parametrize("stage", [0, 1])
def test_one_replica_has_the_gradients_of_a_plain_network(stage: int) -> None:
    """Against `nn.Linear` with the same weights and projection, in a few lines of plain PyTorch."""
    curriculum = hidden_then_output((2, 2), label_weight=0.25)
    _, mine = gradients((5,), curriculum, stage)
    replicated, model = student((5,)), teacher()
    weight, bias, head, head_bias = (
        value[0].detach().clone().requires_grad_()
        for value in (*replicated.blocks[0].parameters(), *replicated.head.parameters())
    )
    batch = batch_of((5,))
    signs, labels = batch["input_ids"][:, 0] * 2.0 - 1, batch["labels"][:, 0]
    hidden = torch.relu(signs @ weight + bias)
    with torch.no_grad():
        theirs = torch.relu(model.blocks[0](signs))
    if stage == 0:
        target = theirs @ RandomProjection(40, WIDTH, (0, 2, 5)).matrix()
        loss = (hidden - target).square().mean(-1).mean()
    else:
        log_q = (hidden @ head + head_bias).log_softmax(-1)
        log_p = model.head(theirs).detach().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss = 0.75 * divergence + 0.25 * torch.nn.functional.nll_loss(log_q, labels)
    loss.backward()
    for name, value in (("blocks.0.weight", weight), ("blocks.0.bias", bias), ("head.weight", head)):
        if value.grad is not None:
            torch.testing.assert_close(mine[name][0], value.grad, rtol=1e-5, atol=1e-7)


def trainer_of(folder: Path, seeds: Sequence[int], curriculum: Curriculum, **settings: Any) -> CurriculumTrainer:
    defaults = {
        "task": "classification",
        "optim": "sgd",
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    return CurriculumTrainer(
        model=student(seeds),
        teacher_model=teacher(),
        args=CurriculumConfig(output_dir=str(folder), **{**defaults, **settings}),
        train_dataset=ParityData(D, K, curriculum.total_steps * BATCH, seeds),
        eval_dataset=ParityData(D, K, 100, [seed + 1_000_003 for seed in seeds]),
        data_collator=default_data_collator,
        curriculum=curriculum,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_a_run_of_replicas_ends_as_their_single_runs(tmp_path: Path, optimizer: str) -> None:
    rate = {"learning_rate": 0.3} if optimizer == "sgd" else {"learning_rate": 1e-2}
    together = trainer_of(tmp_path / "together", SEEDS, hidden_then_output(), optim=optimizer, **rate)
    start = {name: value.clone() for name, value in together.model.state_dict().items()}
    together.train()
    metrics = together.evaluate()
    for replica, seed in enumerate(SEEDS):
        alone = trainer_of(tmp_path / str(seed), (seed,), hidden_then_output(), optim=optimizer, **rate)
        alone.train()
        for name, value in alone.model.state_dict().items():
            assert not torch.allclose(start[name][replica], value[0], atol=1e-3), name  # it moved
            torch.testing.assert_close(together.model.state_dict()[name][replica], value[0], rtol=1e-4, atol=1e-6)
        own = alone.evaluate()
        assert metrics[f"eval_accuracy_{replica}"] == own["eval_accuracy_0"] == own["eval_accuracy"]
        assert metrics[f"eval_loss_{replica}"] == pytest.approx(own["eval_loss_0"], rel=1e-5)


def test_progress_counts_rows_not_replicas(tmp_path: Path) -> None:
    """A row holds one example of every replica: samples are per replica, FLOPs of all."""
    together = trainer_of(tmp_path / "together", SEEDS, hidden_then_output())
    alone = trainer_of(tmp_path / "alone", SEEDS[:1], hidden_then_output())
    together.train()
    alone.train()
    assert together.progress.samples == alone.progress.samples == 12 * BATCH
    assert together.progress.student_flops == pytest.approx(len(SEEDS) * alone.progress.student_flops)
    assert together.progress.teacher_flops == pytest.approx(len(SEEDS) * alone.progress.teacher_flops)


def test_a_resumed_run_of_replicas_is_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 3, "seed": 3}
    whole = trainer_of(tmp_path / "whole", SEEDS, hidden_then_output(normalize="standardize"), **settings)
    whole.train()
    resumed = trainer_of(tmp_path / "whole", SEEDS, hidden_then_output(normalize="standardize"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_stacked_projection_is_its_parts() -> None:
    parts = [RandomProjection(7, 4, seed, "gaussian") for seed in (0, 3)]
    stacked = StackedProjection(parts)
    hidden = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(0))
    assert (stacked.in_features, stacked.out_features) == (7, 4)
    assert stacked.matrix().shape == (2, 7, 4)
    projected = stacked(hidden)
    assert projected.shape == (5, 2, 4)
    for replica, part in enumerate(parts):
        assert torch.equal(stacked.matrix()[replica], part.matrix())
        torch.testing.assert_close(projected[:, replica], part(hidden[:, replica]))
    assert stacked.to("cpu", torch.float64).dtype == torch.float64


def test_a_replicas_projection_is_drawn_from_its_own_seed() -> None:
    curriculum = hidden_then_output(projection_seed=4)
    stacked = random_projection(curriculum, HiddenStage(1, 2, 2), (40, WIDTH), 2, SEEDS)
    alone = random_projection(curriculum, HiddenStage(1, 2, 2), (40, WIDTH), 2, SEEDS[1:2])
    assert isinstance(stacked, StackedProjection)
    assert torch.equal(stacked.matrix()[1], alone.matrix()[0])
    assert torch.equal(stacked.matrix()[1], RandomProjection(40, WIDTH, (4, 2, 5)).matrix())
    assert len({tuple(part.matrix().flatten().tolist()) for part in stacked.parts}) == len(SEEDS)


def test_stored_maps_of_replicas_are_read_back(tmp_path: Path) -> None:
    curriculum = hidden_then_output(normalize="standardize")
    live = LiveTargets(teacher(), TASK)
    maps = calibrate(live.stage_states, curriculum, [batch_of((77,), 64)], 2, Calibration(WIDTH, list(SEEDS)))
    save_target_maps(maps, tmp_path / "target_stats.safetensors")
    again = load_target_maps(tmp_path / "target_stats.safetensors", curriculum, WIDTH, 2, list(SEEDS))
    hidden = torch.randn(6, len(SEEDS), 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(maps[0](hidden), again[0](hidden))
    assert len(again) == 1


@pytest.mark.parametrize("with_teacher", [False, True])
def test_evaluation_is_the_average_and_each_replicas_own(with_teacher: bool) -> None:
    model, targets = student(SEEDS), LiveTargets(teacher(), TASK).output if with_teacher else lambda batch: None
    data = batch_of(SEEDS, 50)
    batches = [{key: value[start : start + 16] for key, value in data.items()} for start in range(0, 50, 16)]
    metrics = TASK.evaluate(model, batches, targets, EvaluationTools())
    logits = model(data["input_ids"]).detach()
    for replica in range(len(SEEDS)):
        mine, labels = logits[:, replica], data["labels"][:, replica]
        right = (mine.argmax(-1) == labels).double().mean().item()
        assert metrics[f"accuracy_{replica}"] == pytest.approx(right)
        loss = torch.nn.functional.cross_entropy(mine, labels).item()
        assert metrics[f"loss_{replica}"] == pytest.approx(loss, rel=1e-5)
    for name in ("accuracy", "loss"):
        each = [metrics[f"{name}_{replica}"] for replica in range(len(SEEDS))]
        assert metrics[name] == pytest.approx(sum(each) / len(SEEDS))
    wanted = {"loss", "accuracy", *(f"{name}_{r}" for name in ("loss", "accuracy") for r in range(len(SEEDS)))}
    if with_teacher:
        wanted |= {"kl", "agreement", "teacher_loss", "teacher_accuracy"}
        theirs = teacher()(data["input_ids"]).detach()
        assert metrics["teacher_accuracy"] == pytest.approx(
            (theirs.argmax(-1) == data["labels"]).double().mean().item()
        )
        divergence = torch.nn.functional.kl_div(
            logits.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True
        )
        assert metrics["kl"] == pytest.approx(divergence.sum(-1).mean().item(), rel=1e-4)
    assert set(metrics) == wanted


def test_evaluation_of_a_plain_network_has_no_replicas() -> None:
    torch.manual_seed(0)
    model = ParityMLP(ParityMLPConfig(D, WIDTH))
    data = {key: value[:, 0] for key, value in batch_of((3,), 50).items()}
    metrics = TASK.evaluate(model, [data], lambda batch: None, EvaluationTools())
    assert set(metrics) == {"loss", "accuracy"}
    right = model(data["input_ids"]).argmax(-1) == data["labels"]
    assert metrics["accuracy"] == pytest.approx(right.double().mean().item())


def test_a_head_cannot_be_transplanted_into_replicas(tmp_path: Path) -> None:
    curriculum = extraction(2, 2, 10, layer_map=[("final", "final")], warm_start="head")
    with pytest.raises(ValueError, match="warm_start='head' cannot be made for replicated students: use 'none'"):
        trainer_of(tmp_path, SEEDS, curriculum)
    assert not list(tmp_path.iterdir())


def test_the_head_place_of_a_replicated_student_is_what_enters_its_head(tmp_path: Path) -> None:
    """As of a plain network, where the state before the head is block 2's."""
    curriculum = extraction(2, 2, 4, layer_map=[("final", "final")], normalize="none")
    together = trainer_of(tmp_path, SEEDS, curriculum)
    together.train()
    losses = [json.loads(line).get("loss") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len([value for value in losses if value is not None]) == 4
