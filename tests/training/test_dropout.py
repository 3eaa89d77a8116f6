"""Students train without dropout, unless it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from tests.training.conftest import LENGTH, VOCAB, llama, token_rows
from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.core.errors import UserError

GPT2 = {"n_embd": 16, "n_head": 2, "vocab_size": VOCAB, "n_positions": 32}
BERT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": VOCAB, "pad_token_id": 0}


def models(kind: str) -> tuple[Any, Any]:
    """A student with dropout, and its teacher."""
    if kind == "gpt2":  # dropout modules, and attention that reads a module of its own
        made = [GPT2LMHeadModel(GPT2Config(**GPT2, n_layer=n, attn_pdrop=0.5, resid_pdrop=0.5)) for n in (1, 2)]
    elif kind == "bert":
        made = [BertForMaskedLM(BertConfig(**BERT, num_hidden_layers=n, hidden_dropout_prob=0.5)) for n in (1, 2)]
    else:  # a number that attention reads
        made = [llama(n, 16, n, attention_dropout=0.5) for n in (1, 2)]
    return made[0], made[1]


def trainer(kind: str, folder: Path, **fields: Any) -> CurriculumTrainer:
    student, teacher = models(kind)
    args = CurriculumConfig(str(folder), max_steps=2, method="one_shot", student_init="random", use_cpu=True, **fields)
    args.disable_tqdm = True
    return CurriculumTrainer(student, teacher, args, token_rows())


def outputs_differ(model: Any) -> bool:
    """Whether two forwards in training mode differ."""
    ids = torch.arange(1, LENGTH + 1)[None]
    model.train()
    with torch.no_grad():
        return not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_students_train_without_dropout_and_their_configuration_keeps_it(kind: str, tmp_path: Path) -> None:
    kept = models(kind)[0].config.to_dict()
    assert outputs_differ(trainer(kind, tmp_path, disable_dropout=False).model)
    assert not outputs_differ((run := trainer(kind, tmp_path)).model)
    assert {name: value for name, value in run.model.config.to_dict().items() if "drop" in name} == {
        name: value for name, value in kept.items() if "drop" in name
    }


def test_a_run_does_not_go_on_with_other_dropout(tmp_path: Path) -> None:
    trainer("llama", tmp_path, save_steps=1).train()
    with pytest.raises(UserError, match="a different dropout"):
        trainer("llama", tmp_path, save_steps=1, disable_dropout=False).train(resume_from_checkpoint=True)
