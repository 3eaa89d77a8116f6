"""A task that the package does not know is written here, registered, and used by every command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from tests.conftest import bert_config, make_tokenizer
from tutelage import (
    CurriculumConfig,
    ExtractOptions,
    RunOptions,
    UserError,
    detect_task,
    distill,
    extract,
    get_task,
    plan,
    register_task,
)
from tutelage.core.curriculum import Curriculum
from tutelage.core.heads import OutputHead
from tutelage.core.inputs import IGNORED_LABEL, at_positions, label_positions
from tutelage.runs.evaluate import EvaluateOptions, evaluate
from tutelage.runs.results import RESULT_FILE, RunResult
from tutelage.tasks.base import Batch, HeadTask, Selected
from tutelage.tasks.registry import TASKS
from tutelage.training.records import METRICS_FILE, MetricsFile

TAGS, SPECIAL_TOKENS = 5, 6


class TagCollator(DataCollatorWithPadding):
    """The tag of a token is its number modulo the number of tags."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__([{"input_ids": row["input_ids"]} for row in rows])
        ids = batch["input_ids"]
        return {**batch, "labels": torch.where(ids < SPECIAL_TOKENS, IGNORED_LABEL, ids % TAGS)}


@final
class Tagging(HeadTask):
    """One tag per token."""

    name = "tagging"
    auto_class = AutoModelForTokenClassification
    suffixes = ("ForTokenClassification",)
    warm_start = "head"
    metric, better = "accuracy", "higher"
    pipeline_tag = "token-classification"

    def collator(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.3) -> Any:
        return TagCollator(tokenizer)

    def example(self, length: int) -> Batch:
        return {**super().example(length), "labels": torch.zeros((1, length), dtype=torch.long)}

    def select(self, hidden: torch.Tensor, batch: Batch) -> Selected:
        mask, labels = label_positions(batch, causal=False)
        rows = torch.arange(len(mask), device=mask.device)[:, None].expand(mask.shape)
        return Selected(at_positions(hidden, mask), labels, at_positions(rows, mask))


@pytest.fixture(autouse=True)
def tagging() -> Iterator[Tagging]:
    task = Tagging()
    register_task(task)
    yield task
    del TASKS["tagging"]


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "bert-tagger"
    torch.manual_seed(0)
    BertForTokenClassification(bert_config(num_labels=TAGS)).save_pretrained(folder)
    make_tokenizer(encoder=True).save_pretrained(folder)
    return folder


def options(corpus: Path, **fields: Any) -> RunOptions:
    return RunOptions(student="layers=2,hidden_size=16", dataset=str(corpus / "text.jsonl"), max_length=16, **fields)


def settings(folder: Path, teacher: Path | None, **fields: Any) -> CurriculumConfig:
    defaults = {
        "max_steps": 8,
        "student_init": "random",
        "per_device_train_batch_size": 4,
        "calibration_samples": 16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    name = None if teacher is None else str(teacher)
    return CurriculumConfig(str(folder), teacher_model_name_or_path=name, **{**defaults, **fields})


def test_a_registered_task_is_found_by_name_and_from_a_model(tagging: Tagging, tagger: Path) -> None:
    assert get_task("tagging") is tagging
    assert detect_task(str(tagger)) is detect_task(BertForTokenClassification(bert_config())) is tagging
    with pytest.raises(UserError, match=r"unknown task 'parsing': use one of .*, tagging"):
        get_task("parsing")


def test_a_new_task_is_distilled(tagger: Path, corpus: Path, tmp_path: Path) -> None:
    result = distill(options(corpus), settings(tmp_path / "run", tagger, task="tagging"))
    assert (result.task, result.method) == ("tagging", "extraction")
    assert set(result.student.metrics) == {"loss", "accuracy", "kl", "agreement"}
    assert set(result.teacher.metrics) == {"loss", "accuracy"}
    assert all(value > 0 for value in result.student.metrics.values())
    assert RunResult.from_json((tmp_path / "run" / RESULT_FILE).read_text()) == result
    student = AutoModelForTokenClassification.from_pretrained(tmp_path / "run")
    assert (student.config.hidden_size, student.config.num_hidden_layers, student.num_labels) == (16, 2, TAGS)
    assert "pipeline_tag: token-classification" in (tmp_path / "run" / "README.md").read_text()
    curriculum = Curriculum.from_json((tmp_path / "run" / "curriculum.json").read_text())
    assert [stage.name for stage in curriculum.stages] == ["hidden final:final", "output"]
    assert curriculum.warm_start == "head"
    lines = [record for record in MetricsFile(tmp_path / "run" / METRICS_FILE).read() if "loss" in record]
    assert [record["stage"] for record in lines] == [1] * 4 + [2] * 4


@pytest.mark.parametrize("method", ["one_shot", "scratch"])
def test_other_methods_train_it_too(tagger: Path, corpus: Path, tmp_path: Path, method: str) -> None:
    teacher = None if method == "scratch" else tagger
    fields = {"student": str(tagger)} if method == "scratch" else {}
    run = RunOptions(**{**vars(options(corpus)), **fields})
    result = distill(run, settings(tmp_path / "run", teacher, method=method))
    assert (result.task, result.method) == ("tagging", method)
    assert ("kl" in result.student.metrics) == (method == "one_shot")


def test_its_models_are_planned_and_evaluated(tagger: Path, corpus: Path, tmp_path: Path) -> None:
    planned = plan(options(corpus), settings(tmp_path / "run", tagger))
    assert (planned.task, planned.outputs) == ("tagging", TAGS)
    assert [(stage.targets, stage.output) for stage in planned.stages] == [(1, False), (0, True)]
    assert all(stage.student_flops_per_token > 0 for stage in planned.stages)
    by_default = plan(options(corpus), settings(tmp_path / "run", tagger, student_init=None))
    assert (by_default.curriculum.student_init, by_default.curriculum.method) == ("teacher", "joint")
    measured = evaluate(EvaluateOptions(str(tagger), str(corpus / "text.jsonl"), str(tagger), max_samples=8))
    assert measured.metrics["agreement"] == 1.0
    assert measured.metrics["kl"] == pytest.approx(0, abs=1e-6)


def test_it_is_extracted_and_distilled_from_disk(tagger: Path, corpus: Path, tmp_path: Path) -> None:
    """Stored exactly, targets give the student that the live teacher gives."""
    args = settings(tmp_path / "extracted", tagger, top_k=TAGS)
    manifest = extract(options(corpus), args, ExtractOptions(dtype="float32"), log=lambda line: None)
    assert [split.name for split in manifest.splits] == ["stage_1", "stage_2", "calibration", "evaluation"]
    assert manifest.identity.task == "tagging"
    assert {name: form.content for name, form in manifest.identity.forms.items()} == {
        "stage_1": "states",
        "stage_2": "top_k",
        "calibration": "states",
    }
    stored = distill(None, settings(tmp_path / "stored", None, curriculum_dir=str(tmp_path / "extracted")))
    assert (stored.task, stored.names["student"]) == ("tagging", "layers=2,hidden_size=16")
    live = distill(options(corpus), settings(tmp_path / "live", tagger, top_k=TAGS))
    for name in ("loss", "accuracy"):
        assert stored.student.metrics[name] == pytest.approx(live.student.metrics[name], rel=1e-6)


@final
class Spans(Tagging):
    """Its head has a name that nothing looks for."""

    name = "spans"
    auto_class = AutoModelForQuestionAnswering
    suffixes = ("ForQuestionAnswering",)

    def output_head(self, model: nn.Module, outputs: int | None = None) -> OutputHead:
        return OutputHead(model.qa_outputs, outputs=outputs)

    def collator(self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.3) -> Any:
        tags = super().collator(tokenizer)
        return lambda rows: {**(batch := tags(rows)), "labels": batch["labels"].clamp_max(1)}


def test_a_task_may_say_where_its_head_is(corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertForQuestionAnswering(bert_config()).save_pretrained(tmp_path / "T")
    make_tokenizer(encoder=True).save_pretrained(tmp_path / "T")
    register_task(Spans())
    try:
        result = distill(options(corpus), settings(tmp_path / "run", tmp_path / "T"))
    finally:
        del TASKS["spans"]
    assert (result.task, result.method) == ("spans", "extraction")
    assert result.student.metrics["kl"] > 0


def test_the_default_count_is_that_of_the_positions_selected(tagging: Tagging) -> None:
    batch = {"input_ids": torch.tensor([[7, 8, 9], [7, 0, 0]]), "labels": torch.tensor([[1, -100, 2], [3, -100, -100]])}
    assert tagging.count_outputs(batch).item() == 3


def test_an_output_that_is_no_tensor_says_what_to_write() -> None:
    task = get_task("classification")
    model = BertModel(bert_config())
    with pytest.raises(UserError, match="has no logits: write the `whole_output` of the task"):
        task.whole_output(model, {"input_ids": torch.tensor([[2, 7, 3]])})
