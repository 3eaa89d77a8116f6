"""A student that is sharded over two processes (FSDP2) ends with the parameters that one process gives it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import DistributedType, DynamoBackend, FullyShardedDataParallelPlugin
from packaging.version import Version
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.launch import launch
from tests.training.conftest import llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.curriculum import Curriculum, joint, one_shot
from tutelage.core.errors import UserError
from tutelage.core.stages import HiddenStage, JointStage, OutputStage
from tutelage.core.views import view_of
from tutelage.targets.live import LiveTargets
from tutelage.targets.source import StatisticsFile
from tutelage.tasks.language import CausalCollator
from tutelage.training import sharding
from tutelage.training.feed import StageFeed
from tutelage.training.objective import StageObjective
from tutelage.training.transition import StageTransition

STAGES = (
    HiddenStage(steps=2, student_place=1, teacher_place=2),  # block 2 and the head are frozen
    HiddenStage(steps=2, student_place="final", teacher_place="final"),
    OutputStage(steps=2),  # begins with a transplanted head, unless embeddings are tied
    JointStage(steps=1, layer_map=[(1, 2), ("final", "final")]),
)
STEPS, STOP = 7, 5
is_old = Version(transformers.__version__) < Version("5.24")
needs_fsdp2 = pytest.mark.skipif(is_old, reason="FSDP2 is refused with this version of transformers")
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def train_by_hand(folder: Path, first: int, tied: bool, rank: int = 0, processes: int = 1) -> None:
    """Train a curriculum from step `first` on with plain PyTorch, saving at step `STOP` and at the end."""
    student, rows, collate = llama(2, 16, seed=2, tie_word_embeddings=tied), token_rows(ragged=True), CausalCollator()
    source = LiveTargets(llama(4, 24, seed=1))
    source.attach(Curriculum("extraction", STAGES, warm_start="head"), student)
    if first:
        student.load_state_dict(torch.load(folder / "student.pt"))
    objective = StageObjective(student, source)
    transition = StageTransition(objective)
    feed = StageFeed(source, rows, collate, samples=16, batch_size=4)
    if not tied:  # otherwise hooks stop the forwards
        transition.make_views(feed)
    source.prepare(StatisticsFile(folder / "statistics.safetensors", bool(first), rank == 0), feed.calibration, "cpu")
    for index in range(len(STAGES)):
        transition.measure(index, feed)
    transition.enter(objective.curriculum.stage_at(first)[0], first == 0, feed)
    transition.set_trainable(transition.all)
    if processes > 1:
        for block in (1, 2):
            fully_shard(objective.blocks.module(student, block))
        fully_shard(objective)
        assert all(isinstance(parameter, DTensor) for parameter in student.parameters())
        assert (view_of(student, 1, None) is None) == tied
    optimizer: Any = None
    for step in range(first, STEPS):
        index, local = objective.curriculum.stage_at(step)
        if index != transition.entered:
            transition.enter(index, True, feed)
        if local == 0 or optimizer is None:
            transition.set_trainable(transition.trainable)
            trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3)
            if local > 0:
                state = torch.load(folder / "optimizer.pt")
                set_optimizer_state_dict(student, optimizer, state, options=WHOLE)
        batch = collate([rows[index] for index in range(4 * step, 4 * step + 4)])
        mine = {name: value[rank::processes] for name, value in batch.items()}
        loss = objective(num_items=objective.count_items(batch), **mine)["loss"]
        (loss * processes).backward()  # gradients are averaged over processes
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == STOP:
            states = [get_model_state_dict(student, options=WHOLE)]
            states.append(get_optimizer_state_dict(student, optimizer, options=WHOLE))
            if rank == 0:
                for name, state in zip(("student", "optimizer"), states, strict=True):
                    torch.save(state, folder / f"{name}.pt")
    with sharding.whole_parameters(student, wanted=rank == 0):
        if rank == 0:
            student.save_pretrained(folder / "plain")


def train_in_shards(root: Path, first: int) -> None:
    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for tied in (False, True):
        train_by_hand(root / str(tied), first, tied, rank, processes)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_sharded_curriculum_equals_one_process_and_resumes_in_new_processes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one / "False", one / "True", two / "False", two / "True"):
        folder.mkdir(parents=True)
    for tied in (False, True):
        train_by_hand(one / str(tied), 0, tied)
    expected = {tied: load_file(one / str(tied) / "plain/model.safetensors") for tied in (False, True)}
    for first in (0, STOP):
        launch(2, train_in_shards, two, first)
        for tied in (False, True):
            assert_same(load_file(two / str(tied) / "plain/model.safetensors"), expected[tied])


def trainer(
    folder: Path,
    batch: int,
    on_gpus: bool = False,
    head_dim: int | None = None,
    warm_start: str = "head",
    **settings: Any,
) -> CurriculumTrainer:
    args = CurriculumConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        max_grad_norm=0.5,
        disable_tqdm=True,
        use_cpu=True,
        calibration_samples=16,
        layer_map="1:2,final:final",
        stage_steps=[2, 2],
        warm_start=warm_start,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=10,
        eval_strategy="steps",
        eval_steps=3,
        eval_on_start=True,
        eval_with_teacher=True,
        **settings,
    )
    # accelerate shards on GPUs only: told that these processes have some, it runs the same code here
    if args.world_size > 1:
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU if on_gpus else DistributedType.MULTI_CPU
    return CurriculumTrainer(
        model=llama(2, 16, seed=2 + args.process_index, head_dim=head_dim),  # the first process's is trained
        teacher_model=llama(4, 24, seed=1),
        args=args,
        train_dataset=token_rows(ragged=True),
        eval_dataset=token_rows(7, seed=9),
        data_collator=CausalCollator(),
    )


def train_through_accelerate(folder: Path) -> None:
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    with pytest.raises(UserError, match="accelerate shards on GPUs only"):
        trainer(folder, 2, **fsdp)
    for resume in (False, str(folder / "checkpoint-2"), str(folder / "checkpoint-6"), True):
        run = trainer(folder, 2, on_gpus=True, **fsdp)
        run.train(resume_from_checkpoint=resume)
        torch.save(run.evaluate(), folder / f"metrics-{run.args.process_index}.pt")
        run.save_model(str(folder / f"resumed-{Path(str(resume)).name}"))
    with pytest.raises(UserError, match="a student must be trained before it makes predictions"):
        trainer(folder, 2, on_gpus=True, **fsdp).predict(token_rows(7, seed=9))
    with pytest.raises(UserError, match="was created with a different sharding"):
        trainer(folder, 2).train(resume_from_checkpoint=True)
    for name, settings in (("ddp", {}), ("fsdp", {"on_gpus": True, **fsdp})):
        starts = {"student_init": "teacher", "warm_start": "none", "head_dim": 12}
        for what, fields in (("", {"bf16": True}), ("-started", starts)):
            run = trainer(folder / f"{name}{what}", 2, **fields, **settings)
            run.train()
            run.save_model()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@needs_fsdp2
def test_the_trainer_shards_through_accelerate(tmp_path: Path) -> None:
    one, two = trainer(tmp_path / "one", 4), tmp_path / "two"
    one.train()
    one.save_model()
    metrics = one.evaluate()
    launch(2, train_through_accelerate, two)
    expected = load_file(tmp_path / "one/model.safetensors")
    for resumed in ("False", "checkpoint-2", "checkpoint-6", "True"):  # not, twice within, and at the end
        assert_same(load_file(two / f"resumed-{resumed}/model.safetensors"), expected)
    assert torch.load(two / "metrics-0.pt")["eval_kl"] == pytest.approx(metrics["eval_kl"], rel=1e-5)
    for what in ("", "-started"):
        sharded, replicated = (load_file(two / f"{name}{what}/model.safetensors") for name in ("fsdp", "ddp"))
        assert_same(sharded, replicated)


@needs_fsdp2
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "FSDP1 cannot .* use FSDP2"),
        ({"cpu_offload": CPUOffloadPolicy()}, "not tested with: cpu_offload"),
        ({"activation_checkpointing": True}, "not tested with: activation_checkpointing"),
        ({"cpu_ram_efficient_loading": True}, "not tested with: cpu_ram_efficient_loading"),
        ({"transformer_cls_names_to_wrap": ["LlamaMLP"]}, "not tested with: this transformer_layer_cls_to_wrap"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "not tested with: a state_dict_type other than FULL_STATE_DICT"),
    ],
)
def test_sharding_that_was_not_tested_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(settings)


@needs_fsdp2
def test_sharding_is_refused_with_an_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.3.0")
    with pytest.raises(ValueError, match=r"not tested with: transformers 5\.3\.0 \(5\.24 was\)"):
        configure({})


@needs_fsdp2
def test_sharding_is_refused_with_compilation_and_float16() -> None:
    with pytest.raises(ValueError, match="not tested with: float16, torch_compile"):
        configure({}, mixed_precision="fp16", backend=DynamoBackend.INDUCTOR)


@needs_fsdp2
def test_sharding_is_refused_where_blocks_are_not_told_from_other_modules() -> None:
    student = llama(2, 16, seed=2)
    student.extra = type(student.model.layers[0])(student.config, 0)
    with pytest.raises(ValueError, match="not tested with: blocks of the same class as other modules"):
        configure({}, student)


@needs_fsdp2
def test_sharding_is_refused_with_learned_maps() -> None:
    with pytest.raises(ValueError, match=r"not tested with: projection='learned'\. Change this, or use DDP"):
        configure({}, curriculum=joint(2, 4, 1, projection="learned"))


def configure(
    settings: dict[str, Any],
    student: Any = None,
    mixed_precision: str = "no",
    backend: Any = None,
    curriculum: Any = None,
) -> None:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    for name, value in settings.items():
        setattr(plugin, name, value)
    dynamo = SimpleNamespace(backend=backend or DynamoBackend.NO)
    state = SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=dynamo)
    accelerator = SimpleNamespace(state=state, mixed_precision=mixed_precision)
    student, source = student or llama(2, 16, seed=2), LiveTargets(llama(4, 24, seed=1))
    source.attach(curriculum or one_shot(1), student)
    objective = StageObjective(student, source)
    assert sharding.configure(accelerator, objective, wanted=True)


def test_deepspeed_is_refused() -> None:
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=object()))
    objective = StageObjective(llama(2, 16, seed=2), LiveTargets(llama(4, 24, seed=1)))
    with pytest.raises(
        ValueError, match=r"DeepSpeed keeps one optimiser, but each stage has its own: use DDP, or FSDP2"
    ):
        sharding.configure(accelerator, objective, wanted=False)


@needs_fsdp2
@pytest.mark.parametrize("given", ["true", True])
def test_fsdp_is_switched_on_as_other_options_are(tmp_path: Path, given: Any) -> None:
    assert CurriculumConfig(output_dir=str(tmp_path), fsdp=given, use_cpu=True).fsdp is True
