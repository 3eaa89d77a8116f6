"""Training steps under `torch.compile`."""

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from tutelage.core import views
from tutelage.training.objective import StageObjective

_VARIANTS = 8  # graphs of a stage: lengths of its rows, modes, precisions


def whole_graphs(accelerator: Accelerator, objective: StageObjective) -> AbstractContextManager[object]:
    """What a training step runs in: where it is compiled, one graph for each stage."""
    plugin = accelerator.state.dynamo_plugin
    if plugin is None or plugin.backend == DynamoBackend.NO:
        return nullcontext()
    for model in (objective.student, *objective.source.models):
        views.follow(objective.task.backbone(model))
    # Positions that predict are picked by a mask, so their number is known only when a graph runs. The compiler would give up
    # where one function has more graphs than its limit, and there are some for each stage.
    limit = max(torch._dynamo.config.recompile_limit, _VARIANTS * len(objective.curriculum.stages))
    return torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, recompile_limit=limit)
