"""Students whose parameters are sharded over processes (FSDP2, `torch.distributed.fsdp.fully_shard`).

Each block is a unit of its own. The rest (embedding, final norm, output head) belongs to the unit of the stage objective, so
its parameters are whole while the objective's forward runs, and the loss may use the head's weight. Outside of a forward every
parameter is a `DTensor`, of which each process holds a part."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import transformers
from accelerate.utils import DynamoBackend
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from tutelage.core.errors import UserError
from tutelage.training.objective import StageObjective

Result = TypeVar("Result")


def configure(accelerator: Any, objective: StageObjective, wanted: bool) -> bool:
    """Have accelerate's FSDP2, where it is switched on, shard as this module says; False where it is not.

    UserError for what was not seen to be right, and for a machine where accelerate does not shard although it is `wanted`."""
    state, student = accelerator.state, objective.student
    plugin = getattr(state, "fsdp_plugin", None)
    if getattr(state, "deepspeed_plugin", None) is not None:
        raise UserError("DeepSpeed keeps one optimiser, but each stage has its own: use DDP, or FSDP2 (--fsdp true)")
    if plugin is None and wanted:
        raise UserError("accelerate shards on GPUs only: leave fsdp out on this machine")
    if plugin is None:
        return False
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise UserError("FSDP1 cannot change the trainable set between stages: use FSDP2, fsdp_config={'version': 2}")
    backbone = objective.task.backbone(student)
    blocks = {objective.blocks.module(backbone, 1 + index) for index in range(len(objective.blocks))}
    kinds = {type(block) for block in blocks}
    names = sorted(kind.__name__ for kind in kinds)
    found = {
        f"transformers {transformers.__version__} (5.24 was)": Version(transformers.__version__) < Version("5.24"),
        "float16": accelerator.mixed_precision == "fp16",
        "torch_compile": state.dynamo_plugin.backend != DynamoBackend.NO,
        "parallelism_config": getattr(accelerator, "parallelism_config", None) is not None,
        "cpu_offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "activation_checkpointing in fsdp_config (use --gradient_checkpointing)": plugin.activation_checkpointing,
        "cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "min_num_params": bool(plugin.min_num_params),
        "this transformer_layer_cls_to_wrap": sorted(plugin.transformer_cls_names_to_wrap or names) != names,
        "a state_dict_type other than FULL_STATE_DICT": "FULL" not in str(plugin.state_dict_type),
        "an adapter (peft)": hasattr(student, "peft_config"),
        "projection='learned'": bool(objective.learned),
        "blocks of the same class as other modules": any(
            type(module) in kinds and module not in blocks for module in student.modules()
        ),
    }
    if any(found.values()):
        refused = ", ".join(name for name, given in found.items() if given)
        raise UserError(f"sharding the student (FSDP2) was not tested with: {refused}. Change this, or use DDP")
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, names
    plugin.mixed_precision_policy = None  # autocast decides what runs in half precision, as without sharding
    return True


def is_sharded(objective: StageObjective) -> bool:
    """Whether the objective was sharded by FSDP2."""
    return isinstance(objective, FSDPModule)


def check_predicts(objective: StageObjective, wanted: bool) -> None:
    """Refuse predictions of transformers before training, where accelerate would shard the student for them."""
    if wanted and not is_sharded(objective):
        raise UserError("under FSDP2 a student must be trained before it makes predictions: call train() first")


def broadcast(objective: StageObjective) -> None:
    """Give every process the parameters of process 0; where they are sharded they are one set already."""
    for parameter in () if is_sharded(objective) else objective.student.parameters():
        torch.distributed.broadcast(parameter.data, 0)


def run_student(objective: StageObjective, function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, which runs the student outside of the objective's forward; every process must call this alike."""
    if not is_sharded(objective):
        return function(*args)
    sharded: Any = objective
    if "call" not in objective.__dict__:
        register_fsdp_forward_method(objective, "call")
        for module in objective.modules():  # what parameters are gathered into must not be made in inference mode
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()
    try:
        return sharded.call(function, *args)
    finally:
        sharded.reshard()  # the root unit stays whole after a forward without a backward


@torch.no_grad()
def write_rows(parameter: torch.Tensor, rows: slice, values: torch.Tensor) -> None:
    """`parameter[rows] = values`; of a sharded parameter each process writes its part, of the values of process 0."""
    if not isinstance(parameter, DTensor):
        parameter[rows] = values.to(parameter)
        return
    whole = parameter.full_tensor()
    whole[rows] = values.to(whole)
    parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))


@contextmanager
def whole_parameters(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Whole parameters, in CPU memory, in place of sharded ones, e.g. to save the model. Every process must enter this, also
    where they are not `wanted`."""
    whole: dict[nn.Parameter, nn.Parameter] = {}
    shards = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for module, name, parameter in shards:
        if parameter not in whole:  # a tied parameter stays one
            full = parameter.full_tensor().detach()
            whole[parameter] = nn.Parameter(full.cpu(), parameter.requires_grad) if wanted else parameter
        setattr(module, name, whole[parameter])
    try:
        yield
    finally:
        for module, name, parameter in shards:
            setattr(module, name, parameter)


def are_finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether all values are finite; of sharded parameters, those that this process has."""
    values = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    return all(bool(torch.isfinite(value).all()) for value in values)
