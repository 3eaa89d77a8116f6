"""The check of teacher and student that every run begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from datasets import Dataset
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from tests.conftest import bert_config
from tests.training.conftest import VOCAB, llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer, UserError
from tutelage.core.blocks import FINAL
from tutelage.tasks.registry import get_task
from tutelage.training.self_check import check_precision, run_probe

Make = Callable[..., CurriculumTrainer]


def positions_of(model: nn.Module, run: Callable[[], Any]) -> list[int]:
    """Positions of each forward of a whole model while `run` runs."""
    seen: list[int] = []

    def count(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["input_ids"]).numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("settings", [{}, {"warm_start": "head"}, {"method": "one_shot"}])
def test_a_run_is_prepared_with_one_forward_of_16_positions_of_each_model(
    make_trainer: Make, settings: dict[str, Any]
) -> None:
    teacher, student = llama(4, 24, seed=1), llama(2, 16, seed=2)
    seen: list[int] = []

    def make() -> None:
        seen.extend(positions_of(student, lambda: make_trainer(teacher_model=teacher, student=student, **settings)))

    assert positions_of(teacher, make) == seen == [16]


def changed(model: LlamaForCausalLM, change: Callable[[Any], None]) -> LlamaForCausalLM:
    """A model whose output is changed by hand after its forward."""
    forward = type(model).forward

    class Changed(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            output = forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            change(output)
            return output

    model.__class__ = Changed
    return model


def halve_logits(output: Any) -> None:
    output.logits = output.logits / 2


def swap_states(output: Any) -> None:
    states = output.hidden_states
    if states is not None:
        output.hidden_states = (states[0], states[2], states[1], *states[3:])


def cap_logits(output: Any) -> None:
    output.logits = 30 * torch.tanh(output.logits / 30)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (halve_logits, "changes the output of its head"),
        (cap_logits, "changes the output of its head"),
        (swap_states, r"the state at block 1 is not the model's own hidden_states\[1\]: name other places"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(
    make_trainer: Make, who: str, change: Callable[[Any], None], message: str
) -> None:
    models = {"teacher_model": llama(4, 24, seed=1), "student": llama(3, 16, seed=2)}
    name = "teacher_model" if who == "teacher" else who
    models[name] = changed(models[name], change)
    with pytest.raises(UserError, match=f"the {who} Changed: {message}"):
        make_trainer(layer_map="1:1,2:3", **models)


def with_a_massive_activation() -> LlamaForCausalLM:
    """A model with one entry of its states a thousand times as large as the others, as in many trained models."""
    model = llama(4, 24, seed=1, initializer_range=0.08)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = 3000.0
    return model


def test_a_massive_activation_hides_no_other_difference(make_trainer: Make) -> None:
    make_trainer(teacher_model=with_a_massive_activation(), layer_map="1:1,2:2")
    with pytest.raises(UserError, match=r"the state at block 1 is not the model's own hidden_states\[1\]"):
        make_trainer(teacher_model=changed(with_a_massive_activation(), swap_states), layer_map="1:1,2:2")


def test_a_first_block_that_changes_its_state_little_is_no_embedding() -> None:
    model = llama(4, 24, seed=1, initializer_range=1e-3)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    seen = run_probe("teacher", model, get_task("causal_lm"))
    assert seen is not None and seen.hidden_states is not None
    assert len(seen.hidden_states) == 5
    seen.check([1, 2, 3])


def test_states_that_are_not_compared_are_not_checked(make_trainer: Make) -> None:
    make_trainer(student=changed(llama(3, 16, seed=2), swap_states), layer_map="3:4")


def test_a_classifier_that_changes_its_logits_is_refused(tmp_path: Path) -> None:
    class Doubled(BertForSequenceClassification):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            output = super().forward(input_ids, attention_mask, **kwargs)
            output.logits = 2 * output.logits
            return output

    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]] * 8, "labels": [0] * 8})
    args = CurriculumConfig(output_dir=str(tmp_path / "o"), max_steps=8, use_cpu=True, task="sequence_classification")
    plain = BertForSequenceClassification(bert_config(num_hidden_layers=2, num_labels=2))
    with pytest.raises(UserError, match="the student Doubled: changes the output of its head"):
        CurriculumTrainer(Doubled(bert_config(num_hidden_layers=2, num_labels=2)), plain, args, rows)


def test_a_width_other_than_that_of_the_configuration_is_refused(make_trainer: Make) -> None:
    teacher = llama(4, 24, seed=1)
    teacher.config.hidden_size = 20
    with pytest.raises(UserError, match=r"block 2 has the shape \(1, 16, 24\), but \(1, 16, 20\) was expected"):
        make_trainer(teacher_model=teacher, layer_map="1:2")


class Streams(nn.Module):
    """A language model whose blocks pass on several states per position."""

    def __init__(self) -> None:
        super().__init__()
        self.config = llama(1, 16, seed=0).config
        self.embed = nn.Embedding(VOCAB, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.lm_head = nn.Linear(16, VOCAB)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        state = self.embed(input_ids)[:, :, None].expand(-1, -1, 3, -1)
        for block in self.blocks:
            state = block(state)
        return CausalLMOutput(logits=self.lm_head(state.mean(2)))


def test_several_states_per_position_are_refused_where_they_are_compared(make_trainer: Make) -> None:
    with pytest.raises(UserError, match=r"block 1 has the shape \(1, 16, 3, 16\), but \(1, 16, 16\) was expected"):
        make_trainer(teacher_model=Streams(), layer_map="1:1", task="causal_lm")
    make_trainer(teacher_model=Streams(), layer_map="final:final", task="causal_lm")


def test_a_head_that_never_runs_is_refused(make_trainer: Make) -> None:
    class Silent(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            state = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return CausalLMOutput(logits=state @ self.lm_head.weight.T)

    student = llama(2, 16, seed=2)
    student.__class__ = Silent
    with pytest.raises(UserError, match="the student Silent: does not run its output head"):
        make_trainer(student=student)


def test_a_block_that_is_run_without_its_hooks_is_refused(make_trainer: Make) -> None:
    class Bare(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block = block

        def __call__(self, *args: Any, **kwargs: Any) -> Any:  # as SqueezeBERT runs its blocks
            return self.block(*args, **kwargs)

    student = llama(2, 16, seed=2)
    student.model.layers = nn.ModuleList(Bare(layer) for layer in student.model.layers)
    with pytest.raises(UserError, match="the state at block 1 was never computed: name other places"):
        make_trainer(student=student, layer_map="1:2")
    make_trainer(student=student, layer_map="final:final")


def test_a_model_that_cannot_run_is_refused(make_trainer: Make) -> None:
    student = llama(2, 16, seed=2)
    student.model.layers[1] = nn.Linear(3, 3)
    with pytest.raises(UserError, match="the student LlamaForCausalLM cannot run 16 tokens"):
        make_trainer(student=student)


def test_a_student_that_would_train_in_low_precision_is_refused() -> None:
    student = llama(1, 16, seed=2).bfloat16()
    with pytest.raises(UserError, match=r"parameters that train in bfloat16: .* student_dtype='stored'"):
        check_precision(student, stored=False)
    check_precision(student, stored=True)
    check_precision(student.requires_grad_(False), stored=False)


def test_the_check_leaves_modes_buffers_and_the_random_state_as_they_were(make_trainer: Make) -> None:
    student = llama(2, 16, seed=2, attention_dropout=0.5).train()
    student.model.layers[1].eval()
    norm = nn.BatchNorm1d(16)
    student.model.layers[0].register_forward_hook(lambda _m, _a, out: norm(out[0])[None])
    student.model.norm_of_states = norm
    modes = [module.training for module in student.modules()]
    buffers = {name: value.clone() for name, value in student.named_buffers()}
    state = torch.get_rng_state()
    assert run_probe("student", student, get_task("causal_lm")) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in student.modules()] == modes
    for name, value in student.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=0, atol=0)
    assert all(not module._forward_hooks for module in student.modules() if module is not student.model.layers[0])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's own
def test_a_student_with_adapters_is_checked(make_trainer: Make) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(2, 16, seed=2), peft.LoraConfig(target_modules=["q_proj"], r=2))
    seen = run_probe("student", adapted, get_task("causal_lm"))
    assert seen is not None and seen.hidden_states is not None
    seen.check([1, 2, FINAL])
    make_trainer(student=adapted, layer_map="1:2")


def test_a_student_with_frozen_parts_in_half_precision_is_checked_under_autocast(make_trainer: Make) -> None:
    student = llama(2, 16, seed=2)
    student.model.layers[0].bfloat16().requires_grad_(False)
    make_trainer(student=student, layer_map="2:2")


def test_an_offloaded_teacher_is_checked(make_trainer: Make, tmp_path: Path) -> None:
    teacher = changed(llama(4, 24, seed=1), halve_logits)
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    devices |= {f"model.layers.{number}": "disk" for number in range(4)}
    offloaded = dispatch_model(teacher, devices, main_device="cpu", offload_dir=str(tmp_path / "offload"))
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    with pytest.raises(UserError, match="the teacher Changed: changes the output of its head"):
        make_trainer(teacher_model=offloaded)


def test_models_without_tokens_or_values_are_not_checked() -> None:
    assert run_probe("student", nn.Sequential(nn.Linear(2, 2)), get_task("classification")) is None
    with torch.device("meta"):
        assert run_probe("student", llama(1, 16, seed=2), get_task("causal_lm")) is None


def test_labels_alone_check_the_student(make_trainer: Make) -> None:
    student = changed(llama(2, 16, seed=2), halve_logits)
    with pytest.raises(UserError, match="the student Changed: changes the output"):
        make_trainer(method="scratch", student=student, train_dataset=token_rows())
