"""How large a model is, and how fast on one CPU thread."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from tutelage.core.inputs import batch_size, count_tokens
from tutelage.runs.environment import quiet_unless_terminal
from tutelage.tasks.base import Batch, Task
from tutelage.tasks.loading import count_parameters, stored_bytes

SPEED_ROWS = 256  # that the speed is measured on, at most
_REPEATS = 5


def model_size(model: nn.Module, path: str) -> dict[str, float]:
    """`parameters`, and `megabytes` (10^6 bytes) of the weight files in a local folder, or of the parameters in memory."""
    parameters = count_parameters(model)
    loaded = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"parameters": parameters, "megabytes": (stored_bytes(path) or loaded) / 1e6}


@torch.inference_mode()
def measure_speed(
    models: Mapping[str, nn.Module], batches: Mapping[str, Sequence[Batch]], task: Task
) -> dict[str, float]:
    """Sequences (of sentence encoders: sentences) and tokens per second of each model on one CPU thread, with the prefixes
    that name the models, and the `speedup` of the first over the second, in sequences.

    A pass is every batch once, forward only; the median of several passes counts, after a batch to warm up. The models
    take turns, so that what slows the machine down slows them all down. They are on the CPU afterwards."""
    threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {prefix: [] for prefix in models}
    total = _REPEATS * sum(len(batches[prefix]) for prefix in models)
    torch.set_num_threads(1)
    try:
        with tqdm(total=total, desc="Measuring speed", unit="batch", disable=quiet_unless_terminal()) as bar:
            for prefix, model in models.items():
                task.whole_output(model.to("cpu").eval(), batches[prefix][0])
            for _ in range(_REPEATS):
                for prefix, model in models.items():
                    start = time.perf_counter()
                    for batch in batches[prefix]:
                        task.whole_output(model, batch)
                        bar.update()
                    seconds[prefix].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    metrics, rates = {}, []
    for prefix in models:
        median = statistics.median(seconds[prefix])
        rates.append(sum(map(batch_size, batches[prefix])) / median)
        metrics[f"{prefix}{'sentences' if task.embeds else 'sequences'}_per_second"] = rates[-1]
        if not task.embeds:
            metrics[f"{prefix}tokens_per_second"] = sum(int(count_tokens(batch)) for batch in batches[prefix]) / median
    return metrics if len(rates) < 2 else {**metrics, "speedup": rates[0] / rates[1]}
