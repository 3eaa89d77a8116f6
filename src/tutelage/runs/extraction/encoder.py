"""From the teacher to Arrow columns: what a shard's batches are written as.

Shapes: N positions that predict."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tutelage.core.chunked import chunk_positions
from tutelage.core.stages import Stage
from tutelage.core.topk import TopK, top_k
from tutelage.runs.extraction.schedule import Batches
from tutelage.targets import rows
from tutelage.targets.live import LiveTargets
from tutelage.targets.rows import RowFormat
from tutelage.targets.source import HiddenTarget
from tutelage.tasks.base import HeadTask, OutputTarget

Columns = dict[str, Any]


@dataclass(frozen=True)
class Encoder:
    """Runs the teacher over examples and encodes what comes out."""

    source: LiveTargets  # the teacher, with a curriculum attached and its target maps prepared
    data: Any  # training rows
    evaluation: Any  # evaluation rows
    collator: Any
    vocabulary: int  # ids of tokenizer and model
    dtype: str  # of stored states
    device: torch.device | str = "cpu"
    chunk_size: int | None = None  # positions whose logits are held at a time

    def batch(self, examples: Sequence[int]) -> dict[str, Any]:
        """Training examples as a batch on the device."""
        found = [self.data[int(example)] for example in examples]
        batch = self.collator([{k: v for k, v in row.items() if k in rows.INPUT_COLUMNS} for row in found])
        return {name: value.to(self.device) for name, value in batch.items()}

    def form(self, stage: Stage, example: dict[str, Any]) -> RowFormat:
        """How the rows of a stage are stored; `example` is a batch."""
        label, task = "none", self.source.task
        if "labels" in example and not (task.causal and "labels" not in self.data.column_names):
            label = "tokens" if example["labels"].dim() == 2 else "class"
        hidden = tuple("pooled" if task.pools(pair) else "states" for pair in stage.pairs)
        content = "top_k" if task.splits_head else "whole"
        if stage.output is None:
            (content,), hidden = hidden, ()
        return RowFormat(self.dtype, self.vocabulary, label, "token_type_ids" in example, content, hidden)

    def evaluation_form(self, form: RowFormat) -> RowFormat:
        """How the evaluation rows are stored, after the form of a stage."""
        label = "none"
        if "labels" in self.evaluation.column_names:
            label = "tokens" if isinstance(self.evaluation[0]["labels"], list) else "class"
        content = "inputs" if self.source.task.learns_from_labels else "whole"
        return dataclasses.replace(form, label=label, token_types=False, content=content, beside=())

    def stage_columns(self, index: int, form: RowFormat, batches: Batches) -> Iterator[Columns]:
        """Rows of stage `index`, batch by batch."""
        for examples in batches:
            batch = self.batch(examples)
            columns = rows.encode_inputs(batch, examples, form)
            hidden, output = self._targets(index, batch)
            for number, (states, keep) in enumerate(hidden):
                columns |= rows.encode_states(states, keep, rows.lengths_of(batch), form, number)
            if output is not None:
                columns |= self._output_columns(output, batch, form)
            yield columns

    def _targets(self, index: int, batch: dict[str, Any]) -> tuple[list[HiddenTarget], OutputTarget | None]:
        stage = self.source.stage(index)
        if stage.output is None:
            return [self.source.hidden(index, batch)], None
        return self.source.joint(index, batch) if stage.pairs else ([], self.source.output(batch))

    def evaluation_columns(self, form: RowFormat, batches: Batches) -> Iterator[Columns]:
        """Evaluation rows, one by one."""
        for example in (example for examples in batches for example in examples):
            row = self.evaluation[example]
            read = ("input_ids", "attention_mask", *(["labels"] if form.label != "none" else []))
            batch = {name: torch.tensor([row[name]]) for name in read if name in row}
            columns = rows.encode_inputs(batch, [example], form)
            if form.content == "whole":
                batch = {name: value.to(self.device) for name, value in batch.items()}
                columns |= self._output_columns(self.source.output(batch), batch, form)
            yield columns

    def _output_columns(self, target: OutputTarget, batch: dict[str, Any], form: RowFormat) -> Columns:
        if target.whole is not None:
            return rows.encode_whole(target.whole, form)
        kept, counts = self._largest(target, batch)
        return rows.encode_outputs(kept, counts, form)

    @torch.inference_mode()
    def _largest(self, target: OutputTarget, batch: dict[str, Any]) -> tuple[TopK, list[int]]:
        """The teacher's largest outputs at the positions that predict, and how many of these each row has."""
        task, head, curriculum = self.source.task, target.head, self.source.curriculum
        assert isinstance(task, HeadTask) and target.state is not None and head is not None
        assert curriculum is not None and curriculum.top_k is not None
        selected = task.select(target.state, batch)
        chunks = selected.state.split(self.chunk_size or chunk_positions(head))
        parts = [top_k(head(chunk), curriculum.top_k, curriculum.temperature) for chunk in chunks]
        names = ("ids", "log_probs", "log_rest")
        kept = TopK(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
        return kept, torch.bincount(selected.rows.cpu(), minlength=len(batch["input_ids"])).tolist()
