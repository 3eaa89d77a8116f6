"""Views that end at a place, against the forward that is stopped there by a hook."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from tests.core.test_blocks import BASE, MODELS
from tutelage.core import views
from tutelage.core.blocks import FINAL, Place, find_blocks, head_module
from tutelage.core.forward import forward_to, make_view

PLACES = (0, 1, 2, 3, FINAL)
IDS = torch.arange(5, 27).view(2, 11)


def fresh(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    return model, {"input_ids": IDS, "attention_mask": mask}


def state_and_gradients(model: nn.Module, place: Place, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[Any]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)  # for dropout
    state = forward_to(model, place, **inputs)
    weight = torch.randn(state.shape, generator=torch.Generator().manual_seed(2))
    (state * weight).sum().backward()
    return state, [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def viewed(model: nn.Module, place: Place, inputs: dict[str, Any]) -> bool:
    return make_view(model, place, inputs, head=head_module(model) if place == FINAL else None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "t5_encoder"])
def test_a_view_gives_the_states_and_gradients_of_the_hook(name: str, training: bool) -> None:
    model, inputs = fresh(name)
    model.train()
    for place in PLACES:
        model.train(training)
        expected, gradients = state_and_gradients(model, place, inputs)
        model.train()
        assert viewed(model, place, inputs), place
        model.train(training)
        state, mine = state_and_gradients(model, place, inputs)
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
        for left, right in zip(mine, gradients, strict=True):
            assert (left is None) == (right is None)
            if left is not None:
                torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_view_runs_nothing_deeper_and_needs_no_hook(name: str, place: Place) -> None:
    model, inputs = fresh(name)
    assert viewed(model, place, inputs)
    ran: list[str] = []
    for module_name, module in model.named_modules():
        module.register_forward_hook(lambda *_, n=module_name: ran.append(n))
        assert len(module._forward_pre_hooks) == 0
    forward_to(model, place, **inputs)
    blocks = find_blocks(model).names
    deepest = len(blocks) if place == FINAL else int(place)
    assert [block in ran for block in blocks] == [number < deepest for number in range(len(blocks))]
    head = next(n for n, module in model.named_modules() if module is head_module(model))
    assert head not in ran
    norm = MODELS[name][1]
    assert norm is None or (norm in ran) == (place == FINAL)


@pytest.mark.parametrize("place", [1, 3, FINAL])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_the_compiler_sees_one_graph(name: str, place: Place) -> None:
    model, inputs = fresh(name)
    model.train()
    assert viewed(model, place, inputs)
    model.eval()  # what dropout draws is not compared here
    expected, gradients = state_and_gradients(model, place, inputs)
    model.zero_grad(set_to_none=True)

    def run(**inputs: Any) -> torch.Tensor:
        return forward_to(model, place, **inputs)

    torch._dynamo.reset()
    state = torch.compile(run, fullgraph=True, backend="eager")(**inputs)  # fullgraph: an error where the graph breaks
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    (state * torch.randn(state.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_view_is_used_only_where_it_gives_the_same_state() -> None:
    """A state that is changed after the last block by no module cannot be left out."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 2)
            self.parts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for part in self.parts:
                x = part(x)
            return self.head(F.dropout(x, 0.5, self.training))

    torch.manual_seed(0)
    model, x = Dropped(), torch.randn(4, 5)
    assert not make_view(model, 2, {"x": x})
    expected = model.parts[1](model.parts[0](model.stem(x)))
    torch.testing.assert_close(forward_to(model, 2, x=x), expected, rtol=0, atol=0)
    assert make_view(model, FINAL, {"x": x}, head=model.head)
    torch.manual_seed(3)
    state = forward_to(model, FINAL, x=x)
    torch.manual_seed(3)
    torch.testing.assert_close(model.head(state), model(x=x), rtol=0, atol=0)


def test_a_module_that_runs_before_and_after_the_blocks_is_not_left_out() -> None:
    model, inputs = fresh("t5_encoder")  # its dropout does
    assert not any(make_view(model, place, inputs) for place in (0, 1, 2, 3))


def test_a_view_follows_the_mode_of_the_model() -> None:
    model = BertForMaskedLM(BertConfig(**BASE, hidden_dropout_prob=0.5)).train()
    assert viewed(model, 2, {"input_ids": IDS})
    draws = [forward_to(model, 2, input_ids=IDS) for _ in range(2)]
    assert not torch.equal(*draws)
    model.eval()
    first, second = (forward_to(model, 2, input_ids=IDS) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, model(input_ids=IDS, output_hidden_states=True).hidden_states[2], rtol=0, atol=0)


def test_a_model_that_was_changed_is_run_whole_again() -> None:
    model = LlamaForCausalLM(LlamaConfig(**BASE)).eval()
    assert viewed(model, 2, {"input_ids": IDS})
    assert views.view_of(model, 2, None) is not None
    model.model.embed_tokens = nn.Embedding(99, 32)
    states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(forward_to(model, 2, input_ids=IDS), states[2], rtol=0, atol=0)
    assert views.view_of(model, 2, None) is None


def test_making_a_view_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, state = torch.randn(3, 4), torch.get_rng_state()
    assert make_view(model, 2, {"input": x})
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("place", [1, 3, FINAL])
def test_gradient_checkpointing_reaches_a_view(place: Place) -> None:
    model, inputs = fresh("llama")
    model.train()
    _, expected = state_and_gradients(model, place, inputs)
    assert viewed(model, place, inputs)
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    runs: list[int] = []
    model.get_submodule("model.layers.0.self_attn").register_forward_hook(lambda *_: runs.append(1))
    _, mine = state_and_gradients(model, place, inputs)
    assert len(runs) == 2  # once forward, once again for the backward pass
    for left, right in zip(mine, expected, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right)


def test_a_copy_of_a_model_has_no_views() -> None:
    model = LlamaForCausalLM(LlamaConfig(**BASE)).eval()
    assert viewed(model, 2, {"input_ids": IDS})
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert views.view_of(copied, 2, None) is None
        torch.testing.assert_close(forward_to(copied, 2, input_ids=IDS), forward_to(model, 2, input_ids=IDS))
    assert all("view" not in name for name in model.state_dict())
