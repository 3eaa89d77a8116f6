"""What a task is: how its models are loaded, fed, compared, measured and saved.

Public names: `Task`, `HeadTask`, `Clues`.

A new task is a subclass of `Task` (or of `HeadTask`, whose output head is split off) that is registered with
`tutelage.tasks.registry.register_task`; nothing else needs to know of it.

Shapes: B batch, T positions, D width, N positions that predict, V outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_model
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedTokenizerBase

from tutelage.core.blocks import FINAL, forward_to
from tutelage.core.curriculum import HiddenStage, Stage
from tutelage.core.errors import UserError
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import batch_size, last_token, model_inputs
from tutelage.core.losses import OutputSettings, output_loss, output_metrics
from tutelage.tasks.loading import load_model
from tutelage.tasks.metrics import name_metrics
from tutelage.tasks.outputs import EvaluationTools, OutputTarget, Selected

Batch = dict[str, Any]
Targets = Callable[[Batch], OutputTarget | None]


@dataclass(frozen=True)
class Clues:
    """What tells the task of a model."""

    names: tuple[str, ...]
    """Class names: of the model and its bases, or those under `architectures` in a configuration, or
    `SentenceTransformer` for a folder of that library."""
    model: nn.Module | None = None


class Task(ABC):
    """How the models of a task are loaded, fed, compared, measured and saved."""

    name: ClassVar[str]
    """Value of the `task` setting."""
    auto_class: ClassVar[Any] = AutoModel
    """The transformers auto class with the task's head."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """How class names of models of this task end."""
    columns: ClassVar[tuple[str, ...]] = ("text",)
    """Dataset columns needed, where the dataset is not tokenised yet."""
    tokenized: ClassVar[bool] = True
    """Whether data are token ids; otherwise models and data are any module and any tensors, without a tokenizer."""
    per_position: ClassVar[bool] = False
    """Whether outputs belong to positions (language models) and text is packed into blocks."""
    causal: ClassVar[bool] = False
    """Whether position t predicts token t + 1."""
    pools_final: ClassVar[bool] = False
    """Whether only the last token's state counts at the place `final`."""
    splits_head: ClassVar[bool] = False
    """Whether the output stage compares logits that the output head makes of the final states, in chunks; otherwise it
    compares whole outputs."""
    learns_from_labels: ClassVar[bool] = True
    """Whether there are labels to learn from without a teacher."""
    warm_start: ClassVar[str] = "none"
    """`warm_start` of extraction where nothing is given."""
    metric: ClassVar[str] = "loss"
    """The metric by which runs are compared."""
    better: ClassVar[str] = "lower"
    """`lower` or `higher`."""
    pipeline_tag: ClassVar[str] = "text-classification"
    """Of model cards."""
    library: ClassVar[str] = "transformers"
    """Library that loads a student, for model cards."""

    # ---- Models ----

    def recognizes(self, clues: Clues) -> bool:
        """Whether a model is of this task."""
        return any(name.endswith(self.suffixes) for name in clues.names)

    def load(self, path: str, *, what: str = "teacher", **kwargs: Any) -> nn.Module:
        """Load a whole model from a folder or the Hub; `kwargs` as in `tutelage.tasks.loading.load_model`."""
        return load_model(path, self.auto_class, what=what, **kwargs)

    def build(self, config: PreTrainedConfig, shape: Mapping[str, Any] | None = None) -> nn.Module:
        """A randomly initialised model.

        Args:
            config: its configuration.
            shape: `teacher_shape` of the teacher; None without one.
        """
        try:
            return self.auto_class.from_config(config)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"could not build the {config.model_type} student: {error}") from error

    def teacher_shape(self, teacher: nn.Module) -> dict[str, Any] | None:
        """What a student must know of its teacher beside the configuration, as JSON values."""
        return None

    def fit_to_teacher(self, student: nn.Module, shape: Mapping[str, Any] | None) -> None:
        """Give a student with weights of its own what it lacks to be compared with the teacher."""

    def check_model(self, model: nn.Module) -> None:
        """Raise UserError for a model that cannot be distilled."""

    def backbone(self, model: nn.Module) -> nn.Module:
        """The part of a model that hidden stages run in."""
        return model

    def width(self, model: nn.Module) -> int:
        """Width of a model's hidden states."""
        config: Any = self.backbone(model).config
        return int(config.hidden_size)

    def replica_seeds(self, model: nn.Module) -> list[int] | None:
        """Seeds of the networks that train side by side in a replicated model; None for an ordinary one."""
        return getattr(self.backbone(model).config, "replica_seeds", None)

    def output_head(self, model: nn.Module, outputs: int | None = None) -> OutputHead | None:
        """The linear map from the final state to the output; None where the output is the state itself."""
        return OutputHead.of(model, outputs)

    def head_has_bias(self, model: nn.Module) -> bool:
        """Whether a model's output head has a bias."""
        head = self.output_head(model)
        return head is not None and head.linear.bias is not None

    def output_count(self, model: nn.Module) -> int | None:
        """Outputs of a head that student and teacher must share; None where there is nothing to share."""
        head = self.output_head(model) if self.splits_head else None
        return None if head is None else head.linear.out_features

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a plain model."""
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)  # type: ignore[operator]
        else:
            save_model(model, str(folder / "model.safetensors"))

    def restore(self, model: nn.Module, folder: Path, standard: Callable[[], None]) -> None:
        """Load what `save` wrote into `model`; `standard` is the trainer's own way."""
        standard()

    # ---- Data ----

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.3) -> Any:
        """The data collator."""

    def check_rows(self, rows: Any, config: PreTrainedConfig) -> None:
        """Raise UserError for training rows that do not fit the teacher."""

    def example(self, length: int) -> Batch:
        """A batch of one sequence of zeros, to count operations on."""
        return {"input_ids": torch.zeros((1, length), dtype=torch.long)}

    def outputs_per_token(self, length: int, mlm_probability: float) -> float:
        """Fraction of the tokens of a sequence of `length` at which the teacher's output is stored."""
        return 1 / length

    # ---- Hidden stages ----

    def pools(self, stage: Stage) -> bool:
        """Whether a hidden stage compares one pooled state per sequence."""
        return self.pools_final and isinstance(stage, HiddenStage) and stage.student_place == FINAL

    def stage_state(self, stage: Stage, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The states that a hidden stage compares: `hidden`, or the last token's."""
        return last_token(hidden, batch) if self.pools(stage) else hidden

    def count_items(self, stage: Stage, batch: Batch) -> torch.Tensor:
        """What the loss of a stage is a mean over: positions, labelled positions, or sequences."""
        if not isinstance(stage, HiddenStage):
            return self.count_outputs(batch)
        ids = batch.get("input_ids")
        if ids is None or not self.tokenized or self.pools(stage):
            return self._count_examples(batch)
        mask = batch.get("attention_mask")
        return torch.tensor(ids.numel(), device=ids.device) if mask is None else mask.sum()

    # ---- Output stages ----

    def count_outputs(self, batch: Batch) -> torch.Tensor:
        """Outputs that are compared in a batch: one per sequence unless a task says otherwise."""
        return self._count_examples(batch)

    @abstractmethod
    def output_loss(
        self,
        student: nn.Module,
        batch: Batch,
        target: OutputTarget | None,
        settings: OutputSettings,
        outputs: int | None,
    ) -> torch.Tensor:
        """Loss of an output stage, summed over what `count_outputs` counts.

        Args:
            student: the student.
            batch: model inputs, labels and stored targets.
            target: the teacher's output; None where the stage learns from labels alone.
            settings: temperature, label weight and so on.
            outputs: outputs that student and teacher share; None for all.
        """

    @abstractmethod
    def teacher_outputs(self, target: OutputTarget, batch: Batch) -> torch.Tensor:
        """The teacher's outputs that `output_loss` compares: logits (N, V), stored log-probabilities (N, K), or whole."""

    @abstractmethod
    def evaluate(
        self, student: nn.Module, batches: Iterable[Batch], targets: Targets, tools: EvaluationTools
    ) -> dict[str, float]:
        """Metrics of `student` over `batches`, means over outputs; `targets` gives the teacher's output, or None."""

    @staticmethod
    def _count_examples(batch: Batch) -> torch.Tensor:
        ids = batch.get("input_ids")
        return torch.tensor(batch_size(batch), device=None if ids is None else ids.device)


class HeadTask(Task):
    """A task whose output head is run in chunks over the final states at the positions that predict."""

    splits_head = True

    @abstractmethod
    def select(self, hidden: torch.Tensor, batch: Batch) -> Selected:
        """The final states (N, D) of `hidden`, (B, T, D), at the positions that predict, and their labels."""

    def output_loss(
        self,
        student: nn.Module,
        batch: Batch,
        target: OutputTarget | None,
        settings: OutputSettings,
        outputs: int | None,
    ) -> torch.Tensor:
        selected = self.select(forward_to(student, FINAL, **model_inputs(student, batch)), batch)
        teacher_state = teacher_head = top_k = None
        if target is not None:
            teacher_head, top_k = target.head, target.top_k
            teacher_state = None if target.state is None else self.select(target.state, batch).state
        head = OutputHead.of(student, outputs)
        return output_loss(
            selected.state, head, teacher_state, teacher_head, selected.labels, settings=settings, targets=top_k
        )

    def teacher_outputs(self, target: OutputTarget, batch: Batch) -> torch.Tensor:
        if target.top_k is not None:
            return target.top_k.log_probs
        assert target.state is not None and target.head is not None
        return target.head(self.select(target.state, batch).state)

    @torch.inference_mode()
    def evaluate(
        self, student: nn.Module, batches: Iterable[Batch], targets: Targets, tools: EvaluationTools
    ) -> dict[str, float]:
        """`loss` (nats), `accuracy` (top 1), and with a teacher `kl` (teacher || student, nats), `agreement` (top 1), and the
        teacher's own `teacher_loss` and `teacher_accuracy`."""
        student.eval()
        totals, count, with_teacher = torch.zeros(6, dtype=torch.float64), 0.0, False
        for batch in batches:
            target = targets(batch)
            with_teacher = target is not None
            per_example = tools.gather(self._per_example(student, batch, target, tools)).double().cpu()
            totals += per_example[:, :-1].sum(0)
            count += float(per_example[:, -1].sum())
            tools.on_step()
        if count == 0:
            raise UserError("nothing to evaluate: the evaluation set has no labelled position; give one with labels")
        return name_metrics(totals / count, with_teacher)

    def _per_example(
        self, student: nn.Module, batch: Batch, target: OutputTarget | None, tools: EvaluationTools
    ) -> torch.Tensor:
        """Sums of the columns of `output_metrics` and the number of positions, for each example, (B, 7).

        Kept by example so that gathering over devices can drop the rows that only fill up the last batch.
        """
        mine = self.select(forward_to(student, FINAL, **model_inputs(student, batch)), batch)
        if mine.labels is None:
            raise UserError("evaluation needs labels: the evaluation set has none; give one with a labels column")
        teacher_state = teacher_head = None
        if target is not None and target.state is not None:
            teacher_state, teacher_head = self.select(target.state, batch).state, target.head
        head = OutputHead.of(student, tools.outputs)
        values = output_metrics(mine.state, head, mine.labels, teacher_state, teacher_head, tools.chunk_size)
        values = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
        examples = len(batch["input_ids"])
        return torch.zeros(examples, values.shape[1], device=values.device).index_add_(0, mine.rows, values)
