"""Train the tokenizer of the embedded teacher and write it with the teacher's configuration.

    python scripts/train_tokenizer.py [--output_dir DIR]

The tokenizer is a byte-level BPE of 2,048 entries, learnt from the training part of the embedded Jane
Austen text. As in GPT-2, one token `<|endoftext|>` serves as start, end and padding. The folder holds no
weights: it is the starting point from which `make teacher` trains the embedded teacher.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "src" / "tutelage" / "data" / "austen"
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
CONTEXT = 256  # positions


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded teacher's tokenizer.")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "configs" / "austen_teacher")
    args = parser.parse_args()

    train = (TEXT / "train.txt").read_text(encoding="utf-8")
    heldout = (TEXT / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(train)
    config = teacher_config(tokenizer)
    tokenizer.save_pretrained(args.output_dir)
    config.save_pretrained(args.output_dir)

    for name, text in (("train.txt", train), ("heldout.txt", heldout)):
        ids = tokenizer.backend_tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text, f"{name} does not survive encoding and decoding"
        print(f"{name}: {len(ids):,d} tokens, {len(text) / len(ids):.2f} characters a token")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    print(f"{len(tokenizer):,d} entries; {parameters:,d} parameters, {4 * parameters / 1e6:.2f} MB in float32")


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from `text`, wrapped for transformers."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture of the embedded teacher: small enough to ship its float32 weights in under 8 MB."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


if __name__ == "__main__":
    main()
