"""The interface of a task: how its models are loaded, run, compared, measured and saved.

A new task is a subclass of `Task`, or of `HeadTask` if its output comes from one linear output head; register it with
`tutelage.tasks.registry.register_task` (docs/new_task.md). The losses themselves are in `tutelage.core.losses`.
Shapes: B batch, T positions, D width, E teacher width, N positions that predict, V outputs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import AutoModel, DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase

from tutelage.core.blocks import FINAL, Blocks, Place
from tutelage.core.errors import UserError, as_user_error
from tutelage.core.forward import forward_to, make_view, watched
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import (
    batch_size,
    count_on_device,
    count_tokens,
    last_token,
    model_inputs,
    output_tensor,
    text_config,
)
from tutelage.core.losses import METRIC_COLUMNS, OutputSettings, output_loss, output_metrics
from tutelage.core.router import state_and_balance
from tutelage.core.stages import HiddenStage, Stage
from tutelage.core.topk import TopK
from tutelage.core.views import view_of
from tutelage.tasks.loading import load_config, load_model

Batch = dict[str, Any]


@dataclass(frozen=True)
class OutputTarget:
    """The teacher's output for a batch, in one of three forms."""

    state: Tensor | None = None  # the input of `head`, (B, T, E) or pooled (B, E)
    head: OutputHead | None = None  # the teacher's
    top_k: TopK | None = None  # the largest outputs at the N positions that predict
    whole: Tensor | None = None  # the complete output: an embedding (B, E), or logits (..., V)


@dataclass(frozen=True)
class Selected:
    """Hidden states at the positions that predict."""

    state: Tensor  # (N, D)
    labels: Tensor | None  # (N,); None if the batch has no labels
    rows: Tensor  # index of the example that each position belongs to, (N,)


@dataclass(frozen=True)
class EvaluationTools:
    """What an evaluation needs in addition to models and batches."""

    outputs: int | None = None  # number that student and teacher share, if a vocabulary is padded; None for all
    chunk_size: int | None = None  # positions whose logits are held at a time; None chooses it
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor  # collects the rows of a tensor from all devices
    on_step: Callable[[], None] = lambda: None  # called after each batch


Targets = Callable[[Batch], OutputTarget | None]


@dataclass(frozen=True)
class Clues:
    """What is known about a model whose task is to be detected."""

    names: tuple[str, ...]  # of its class and base classes, or `architectures`; SentenceTransformer for such a folder
    model: nn.Module | None = None
    config: Any = None


class Task(ABC):
    """How the models of a task are loaded, run, compared, measured and saved."""

    name: ClassVar[str]  # value of the `task` setting
    auto_class: ClassVar[Any] = AutoModel  # the transformers auto class with the task's head
    suffixes: ClassVar[tuple[str, ...]] = ()  # endings of the class names of this task's models
    columns: ClassVar[tuple[str, ...]] = ("text",)  # columns that a dataset needs before it is tokenised
    tokenized: ClassVar[bool] = True  # whether the data are token ids; otherwise any tensors, without a tokenizer
    per_position: ClassVar[bool] = False  # whether outputs belong to positions and text is packed into blocks
    causal: ClassVar[bool] = False  # whether position t predicts token t + 1
    pools_final: ClassVar[bool] = False  # whether a hidden stage at `final` compares only the last token's state
    splits_head: ClassVar[bool] = False  # whether the head runs over final states in chunks, or whole outputs compare
    embeds: ClassVar[bool] = False  # whether the output is one vector per text, to be compared by cosine similarity
    learns_from_labels: ClassVar[bool] = True  # whether the task can be trained on labels without a teacher
    warm_start: ClassVar[str] = "none"  # default of the `warm_start` setting for extraction
    metric: ClassVar[str] = "loss"  # the metric by which runs are compared
    better: ClassVar[str] = "lower"  # which values of `metric` are better: `lower` or `higher`
    pipeline_tag: ClassVar[str] = "text-classification"  # pipeline tag of model cards
    library: ClassVar[str] = "transformers"  # library that loads a student, for model cards

    # ---- Models ----
    def recognizes(self, clues: Clues) -> bool:
        """Whether a model belongs to this task."""
        return any(name.endswith(self.suffixes) for name in clues.names)

    def load(self, path: str, *, what: str = "teacher", **kwargs: Any) -> nn.Module:
        """Load a whole model from a folder or the Hub; `kwargs` as in `tutelage.tasks.loading.load_model`."""
        config = load_config(path, what=what, trust_remote_code=bool(kwargs.get("trust_remote_code")))
        return load_model(path, self.class_for(config), what=what, **kwargs)

    def class_for(self, config: PreTrainedConfig) -> Any:
        """The auto class that builds and loads models of a configuration."""
        return self.auto_class

    def build(self, config: PreTrainedConfig, shape: Mapping[str, Any] | None = None) -> nn.Module:
        """A randomly initialised model; `shape` is the `teacher_shape` of the teacher, None without a teacher."""
        kinds = (KeyError, ValueError, TypeError, RuntimeError, MemoryError, OverflowError)
        with as_user_error(f"could not build the {config.model_type} student", *kinds):
            return self.class_for(config).from_config(config)

    def teacher_shape(self, teacher: nn.Module) -> dict[str, Any] | None:
        """What a student must know about its teacher in addition to the configuration, as JSON values."""
        return None

    def fit_to_teacher(self, student: nn.Module, shape: Mapping[str, Any] | None) -> None:
        """Add what a student that was loaded with weights lacks to be compared with the teacher."""

    def check_model(self, model: nn.Module) -> None:
        """Raise UserError for a model that cannot be distilled."""

    def backbone(self, model: nn.Module) -> nn.Module:
        """The part of a model that hidden stages run."""
        return model

    def width(self, model: nn.Module, place: Place | None = None) -> int:
        """Width of the hidden state at `place`; None is any block. A masked model's transform may end in a different one."""
        if place == FINAL and self.splits_head and (head := self.output_head(model)) is not None:
            return head.linear.in_features
        config: Any = self.backbone(model).config
        return int(text_config(config).hidden_size)

    def widths(self, model: nn.Module, places: Iterable[Place]) -> dict[Place, int]:
        """Widths at several places."""
        return {place: self.width(model, place) for place in places}

    def state_at(
        self, model: nn.Module, place: Place, batch: Mapping[str, Any], blocks: Blocks | None = None
    ) -> Tensor:
        """Hidden state of a model at `place`, (B, T, D) or pooled (B, D); nothing deeper is run."""
        network, head = self._network(model, place)
        return forward_to(network, place, blocks=blocks, head=head, **model_inputs(network, batch))

    def output_state(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The state that a model's output head is applied to: at `final`, (B, T, D) or pooled (B, D)."""
        return self.state_at(model, FINAL, batch)

    def watched(
        self, model: nn.Module, places: Iterable[Place], blocks: Blocks | None = None
    ) -> AbstractContextManager[dict[Place, Tensor]]:
        """Gives the states at `places`, as of `state_at`, of the forward that is run inside for the model's output."""
        network, head = self._network(model, FINAL)
        return watched(network, places, blocks, head)

    def make_view(self, model: nn.Module, place: Place, batch: Mapping[str, Any], blocks: Blocks | None = None) -> bool:
        """Let `state_at` run without hooks from now on, where the model allows it (`tutelage.core.forward.make_view`)."""
        network, head = self._network(model, place)
        if view_of(network, place, head) is not None:
            return True
        return make_view(network, place, model_inputs(network, batch), blocks, head)

    def _network(self, model: nn.Module, place: Place) -> tuple[nn.Module, nn.Module | None]:
        """What `state_at` runs, and the output head that it ends before."""
        head = self.output_head(model) if place == FINAL and self.splits_head else None
        return self.backbone(model), None if head is None else head.linear

    def whole_output(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The output of a whole model as one tensor, where the head is not split off: an embedding (B, E), or logits."""
        return output_tensor(model(**model_inputs(model, batch)))

    def replica_seeds(self, model: nn.Module) -> list[int] | None:
        """Seeds of the networks that a replicated model trains side by side; None for an ordinary model."""
        return getattr(self.backbone(model).config, "replica_seeds", None)

    def output_head(self, model: nn.Module, outputs: int | None = None) -> OutputHead | None:
        """The linear map from the final state to the output; None if the output is the state itself."""
        return OutputHead.of(model, outputs)

    def head_has_bias(self, model: nn.Module) -> bool:
        head = self.output_head(model)
        return head is not None and head.linear.bias is not None

    def router_coefficient(self, model: nn.Module) -> float:
        """Weight of the load-balancing loss that output stages add for a mixture of experts; 0 for none."""
        return 0.0

    def output_count(self, model: nn.Module) -> int | None:
        """Number of outputs of the head; student and teacher must have the same. None if the head is not split off."""
        head = self.output_head(model) if self.splits_head else None
        return None if head is None else head.linear.out_features

    def output_names(self, config: Any) -> tuple[str, ...] | None:
        """Names of the outputs that a configuration gives; None where they have none of their own."""
        return None

    def save(self, model: nn.Module, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)  # type: ignore[operator]
        else:
            save_model(model, str(folder / "model.safetensors"))

    def restore(self, model: nn.Module, folder: Path, standard: Callable[[], None]) -> None:
        """Load what `save` wrote into `model`; `standard()` is the default of the trainer."""
        standard()

    # ---- Data ----
    def collator(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.3) -> Any:
        """The data collator; default: padding."""
        return DataCollatorWithPadding(tokenizer)

    def example(self, length: int) -> Batch:
        """A batch with one sequence of zeros, used to count operations."""
        return {"input_ids": torch.zeros((1, length), dtype=torch.long)}

    def outputs_per_token(self, length: int, mlm_probability: float) -> float:
        """Fraction of the tokens at which the teacher's output is stored, for sequences of `length` tokens."""
        return 1 / length

    # ---- Hidden stages ----
    def pools(self, stage: Stage) -> bool:
        """Whether a hidden stage compares one pooled state per sequence."""
        return self.pools_final and isinstance(stage, HiddenStage) and stage.student_place == FINAL

    def stage_state(self, stage: Stage, hidden: Tensor, batch: Batch) -> Tensor:
        """The states that a hidden stage compares: `hidden`, or only the state of the last token."""
        return last_token(hidden, batch) if self.pools(stage) else hidden

    def count_items(self, stage: Stage, batch: Batch) -> Tensor:
        """Number of items that the loss of a stage is averaged over: positions, labelled positions, or sequences."""
        if not isinstance(stage, HiddenStage):
            return self.count_outputs(batch)
        ids = batch.get("input_ids")
        if ids is None or not self.tokenized or self.pools(stage):
            return Task.count_outputs(self, batch)
        return count_tokens(batch)

    # ---- Output stages ----
    def count_outputs(self, batch: Batch) -> Tensor:
        """Number of outputs that are compared in a batch; default: one per example."""
        return count_on_device(batch, batch_size(batch))

    @abstractmethod
    def output_loss(
        self, student: nn.Module, batch: Batch, target: OutputTarget | None, settings: OutputSettings
    ) -> Tensor:
        """Loss of an output stage, summed over the items that `count_outputs` counts; no `target` means labels alone."""

    def teacher_outputs(self, target: OutputTarget, batch: Batch) -> Tensor:
        """The teacher's outputs that `output_loss` compares: logits (N, V), stored log-probabilities (N, K), or whole."""
        assert target.whole is not None
        return target.whole

    # ---- Evaluation ----
    @torch.inference_mode()
    def evaluate(
        self, student: nn.Module, batches: Iterable[Batch], targets: Targets, tools: EvaluationTools
    ) -> dict[str, float]:
        """Metrics of `student` over `batches`; `targets` gives the teacher's output for a batch, or None."""
        student.eval()
        parts, with_teacher = [], False
        for batch in batches:
            target = targets(batch)
            with_teacher = target is not None
            parts.append(tools.gather(self.measure(student, batch, target, tools)).cpu())
            tools.on_step()
        return self.summarize(parts, with_teacher)

    @abstractmethod
    def measure(self, student: nn.Module, batch: Batch, target: OutputTarget | None, tools: EvaluationTools) -> Tensor:
        """What `summarize` needs from a batch, (B, ...): one row per example, so that `tools.gather` can drop repeated ones."""

    @abstractmethod
    def summarize(self, parts: list[Tensor], with_teacher: bool) -> dict[str, float]:
        """Metrics by name from the results of `measure` for all batches."""


def name_metrics(means: Tensor, with_teacher: bool) -> dict[str, float]:
    """The columns of `tutelage.core.losses.output_metrics` by name; without a teacher, only the first two."""
    return dict(zip(METRIC_COLUMNS if with_teacher else METRIC_COLUMNS[:2], means.tolist(), strict=False))


class HeadTask(Task):
    """A task whose output head runs over the final states at the positions that predict, in chunks."""

    splits_head = True

    @abstractmethod
    def select(self, hidden: Tensor, batch: Batch) -> Selected:
        """The final states (N, D) of `hidden`, (B, T, D), at the positions that predict, and their labels."""

    def count_outputs(self, batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        return count_on_device(batch, len(self.select(ids[..., None], batch).state))

    def output_loss(
        self, student: nn.Module, batch: Batch, target: OutputTarget | None, settings: OutputSettings
    ) -> Tensor:
        teacher, head = self._teacher(target, batch), self.output_head(student, settings.outputs)
        assert head is not None
        balance = None
        if settings.router_coefficient:
            state, balance = state_and_balance(student, head.linear, model_inputs(student, batch))
        else:
            state = self.output_state(student, batch)
        selected = self.select(state, batch)
        top_k = None if target is None else target.top_k
        loss = output_loss(selected.state, head, *teacher, selected.labels, settings=settings, targets=top_k)
        if balance is None:
            return loss
        # a mean over this batch's positions: a step of several batches gets their mean, weighed as their losses are
        return loss + settings.router_coefficient * len(selected.state) * balance.to(loss.device)

    def teacher_outputs(self, target: OutputTarget, batch: Batch) -> Tensor:
        if target.top_k is not None:
            return target.top_k.log_probs
        state, head = self._teacher(target, batch)
        assert state is not None and head is not None
        return head(state)

    def measure(self, student: nn.Module, batch: Batch, target: OutputTarget | None, tools: EvaluationTools) -> Tensor:
        """Sums over the positions of each example: the columns of `output_metrics`, then the number of positions, (B, 7)."""
        selected = self.select(self.output_state(student, batch), batch)
        if selected.labels is None:
            raise UserError("evaluation needs labels, but the evaluation set has none: give one with a labels column")
        teacher, head = self._teacher(target, batch), self.output_head(student, tools.outputs)
        assert head is not None
        values = output_metrics(selected.state, head, selected.labels, *teacher, chunk_size=tools.chunk_size)
        values = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
        sums = torch.zeros(len(batch["input_ids"]), values.shape[1], device=values.device)
        return sums.index_add_(0, selected.rows, values)

    def summarize(self, parts: list[Tensor], with_teacher: bool) -> dict[str, float]:
        """Means over positions: `loss` (nats) and `accuracy` (top 1); with a teacher also `kl` (teacher || student, nats),
        `agreement` (top 1), and the teacher's own `teacher_loss` and `teacher_accuracy`."""
        totals, count = torch.zeros(6, dtype=torch.float64), 0.0
        for part in parts:
            totals += part.double()[:, :-1].sum(0)
            count += float(part.double()[:, -1].sum())
        if count == 0:
            raise UserError("nothing to evaluate: the evaluation set has no labelled position; give one with labels")
        return name_metrics(totals / count, with_teacher)

    def _teacher(self, target: OutputTarget | None, batch: Batch) -> tuple[Tensor | None, OutputHead | None]:
        """The teacher's final states (N, E) at the positions that predict, and its head; None if not in the target."""
        if target is None or target.state is None:
            return None, None
        return self.select(target.state, batch).state, target.head
