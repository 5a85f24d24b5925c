"""Sampling with vLLM."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..prompts import Prompt
from .engines import Sample, Sampling, encode_prompts, template_digest


class VLLMEngine:
    """
    Samples with vLLM's offline `LLM`. Needs vLLM (`pip install 'vpd-trl[vllm]'`).

    Each problem has a seed of its own, so its samples don't depend on the others'.

    Args:
        model: Name or folder of a model. For an adapter, merge it first.
        batch_size: Completions that vLLM is given at a time, which it batches as its memory allows. Results are saved
            after each such portion.
        **llm_kwargs: Passed to `vllm.LLM`, such as `tensor_parallel_size`, `max_model_len`, `dtype` or `revision`.

    Raises:
        ImportError: If vLLM is not installed.
        ValueError: If `batch_size` is below 1.
    """

    collective = False

    def __init__(self, model: str, *, batch_size: int = 4096, **llm_kwargs: Any) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError("VLLMEngine needs vLLM. Install it with: pip install 'vpd-trl[vllm]'") from error
        self.name = model
        self.batch_size = batch_size
        self.llm_kwargs = llm_kwargs
        # The model's generation config stays in use for one thing, its end-of-sequence tokens: sampling parameters
        # that are given, as here, replace what else it says
        self.llm = LLM(model=model, **llm_kwargs)
        self.tokenizer = self.llm.get_tokenizer()

    def describe(self) -> dict[str, Any]:
        # How the work is spread over devices is no part of it
        named = {key: self.llm_kwargs[key] for key in ("revision", "dtype", "quantization") if key in self.llm_kwargs}
        return {
            "engine": "vllm",
            "model": self.name,
            "weights": files_digest(self.name),
            **{key: str(value) for key, value in named.items()},
            "chat_template": template_digest(self.tokenizer),
        }

    def generate(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        from vllm import SamplingParams

        prompt_ids = encode_prompts(self.tokenizer, prompts, sampling)
        context = self.llm.llm_engine.model_config.max_model_len
        samples = [[Sample("", [], False)] * k for _ in prompts]
        asked = [i for i, ids in enumerate(prompt_ids) if len(ids) < context]
        if not asked:
            return samples
        # The most likely tokens are the same each time, and vLLM refuses to find them more than once
        n = 1 if sampling.temperature == 0 else k
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt_ids[i]} for i in asked],
            # vLLM gives the samples of a request the seeds seed, seed + 1, …
            [SamplingParams(n=n, seed=seeds[i], **sampling_arguments(sampling)) for i in asked],
            use_tqdm=False,
        )
        for i, output in zip(asked, outputs, strict=True):
            samples[i] = [
                Sample(
                    self.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True),
                    list(answer.token_ids),
                    answer.finish_reason == "stop",
                )
                for answer in output.outputs
            ] * (k // n)
        return samples


def sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    """The settings under the names of vLLM's `SamplingParams`."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
    }


def files_digest(model: str) -> str | None:
    """
    A digest of some bytes of each weight file in a model's folder; `None` for a name on the Hub.

    It tells a model from what another training run has put in the same folder.
    """
    if not os.path.isdir(model):
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(model).iterdir() if p.suffix in (".safetensors", ".bin", ".gguf", ".pt")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(1, size // 256)):
                file.seek(start)
                digest.update(file.read(64))
    return digest.hexdigest()[:16]
