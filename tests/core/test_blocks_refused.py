"""Networks whose blocks cannot be addressed individually."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AlbertConfig, AlbertModel

from tutelage import find_blocks


def test_blocks_that_share_weights_are_refused() -> None:
    config = AlbertConfig(
        vocab_size=20, embedding_size=8, hidden_size=8, num_hidden_layers=6, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(ValueError, match="6 times over: blocks that share weights cannot be addressed individually"):
        find_blocks(AlbertModel(config))


def test_a_pipeline_of_modules_is_refused() -> None:
    class SentenceTransformer(nn.Sequential):
        def _first_module(self) -> nn.Module:
            return self[0]

    with pytest.raises(ValueError, match="pipeline of modules, not a network of blocks: pass its folder"):
        find_blocks(SentenceTransformer(nn.Linear(2, 2), nn.Linear(2, 2)))
