"""Convert SmolLM2 from GGUF to a plain Hugging Face model folder, once.

    python scripts/convert_smollm2.py [--dir DIR] [--dtype float32]

Reads `DIR/smollm2-gguf/` (see `fetch_assets.py`) and writes `DIR/smollm2/`. DIR is `$TUTELAGE_ASSETS`, or
`.assets`. Needs the extra `gguf`. The dequantised weights are copied into a fresh `LlamaForCausalLM`, so
the folder carries no `quantization_config` and loads like any checkpoint. They are kept in float32 (540
MB): that is what dequantising yields, so nothing is rounded twice, and what CPUs compute in. `--dtype
bfloat16` halves the folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert SmolLM2 from GGUF to a Hugging Face model folder.")
    parser.add_argument("--dir", type=Path, default=Path(os.environ.get("TUTELAGE_ASSETS") or ".assets"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    args = parser.parse_args()

    source, target = args.dir / "smollm2-gguf", args.dir / "smollm2"
    if not (source / GGUF).is_file():
        parser.error(f"no {source / GGUF}: run `python scripts/fetch_assets.py --dir {args.dir} smollm2-gguf`")
    dtype: torch.dtype = getattr(torch, args.dtype)
    if (target / "config.json").is_file() and LlamaConfig.from_pretrained(target).dtype == dtype:
        print(f"{target}: already there")
        return
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=args.dir) as temporary:
        converted = Path(temporary) / "smollm2"
        convert(source, dtype).save_pretrained(converted)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(converted)
        if target.exists():
            shutil.rmtree(target)
        converted.rename(target)
    print(f"{target}: converted in {args.dtype}")


def convert(source: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """A fresh model that holds the dequantised weights."""
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model.to(dtype)  # type: ignore[arg-type]  # transformers wraps `to` without its types


if __name__ == "__main__":
    main()
