"""Sampling with transformers, each completion from a random stream of its own."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..network import causal_lm, scoring_mode
from ..prompts import Prompt
from .engines import Sample, Sampling, encode_prompts, template_digest


logger = logging.getLogger(__name__)


class TransformersEngine:
    """
    Samples with `generate` of transformers.

    Each completion draws from a random stream of its own, made from its problem's seed and its number. So it is the
    same (up to the rounding of another batch's shape) whatever the batch size, the order of the problems and the number
    of processes are, and the random state of the process is neither read nor changed.

    Args:
        model: A causal language model, or the name or folder of one. A folder may hold an adapter, if PEFT is
            installed.
        tokenizer: The tokenizer, or its name; by default that of the model's name.
        batch_size: Completions generated at once. If they don't fit in memory, it is halved until they do.
        device: Where the model is loaded to, by default the accelerator if there is one; leave it out with `device_map`.
        **model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained` if `model` is a name; `dtype` is `"auto"` unless
            given.

    Raises:
        ValueError: If `batch_size` is below 1, or a model comes without a tokenizer.
    """

    collective = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 64,
        device: str | torch.device | None = None,
        **model_kwargs: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        if isinstance(model, str):
            tokenizer = model if tokenizer is None else tokenizer
            model = _load(model, device, model_kwargs)
        elif tokenizer is None:
            raise ValueError("tokenizer is needed where model is not a name.")
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.batch_size = batch_size
        self.chat_template: str | None = None

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "transformers",
            "model": self.model.config.name_or_path,
            "weights": weights_digest(self.model),
            "dtype": str(self.model.dtype),
            "chat_template": template_digest(self.tokenizer),
        }

    def generate(
        self, prompts: Sequence[Prompt], *, k: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        prompt_ids = encode_prompts(self.tokenizer, prompts, sampling, chat_template=self.chat_template)
        samples = [[Sample("", [], False)] * k for _ in prompts]
        limits = [self._room(ids, sampling) for ids in prompt_ids]
        for i, limit in enumerate(limits):
            if limit < 1:  # something short in its place: processes that work together need equally many rows
                prompt_ids[i] = prompt_ids[i][-1:]
        # Prompts of like length together are padded least; the longest come first, so memory is short at once or never
        order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]), reverse=True)
        rows = [(i, j) for i in order for j in range(k)]
        with self._live_model() as model, scoring_mode(model), _own_generation_config(model):
            while rows:
                batch = rows[: self.batch_size]
                completions = self._fitting(
                    model,
                    [prompt_ids[i] for i, _ in batch],
                    [max(1, limits[i]) for i, _ in batch],
                    [(seeds[i], j) for i, j in batch],
                    sampling,
                )
                if completions is None:
                    self.batch_size = max(1, len(batch) // 2)
                    continue
                for (i, j), (ids, finished) in zip(batch, completions, strict=True):
                    if limits[i] > 0:
                        text = self.tokenizer.decode(ids, skip_special_tokens=True)
                        samples[i][j] = Sample(text, ids, finished)
                rows = rows[len(batch) :]
        return samples

    @contextmanager
    def _live_model(self) -> Iterator[Any]:
        """The model as it can generate."""
        yield self.model

    def _room(self, prompt_ids: list[int], sampling: Sampling) -> int:
        """The longest completion of a prompt in tokens; below 1 if there is none."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(prompt_ids))

    def _fitting(self, model: Any, *batch: Any) -> list[tuple[list[int], bool]] | None:
        """The completions of a batch, or `None` if it is too large for the memory."""
        try:
            return self._complete(model, *batch)
        except RuntimeError as error:
            # Where processes work together, one alone must not repeat anything
            if self.collective or len(batch[0]) == 1 or not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)  # outside the handler, whose traceback holds tensors
        logger.warning(f"{len(batch[0])} completions at once don't fit in memory; going on with half as many.")
        return None

    def _complete(
        self,
        model: Any,
        prompt_ids: list[list[int]],
        limits: list[int],
        streams: list[tuple[int, int]],
        sampling: Sampling,
    ) -> list[tuple[list[int], bool]]:
        """The ids of one completion per prompt (B), and whether the model ended it."""
        ends, pad = end_tokens(model, self.tokenizer), self.tokenizer.pad_token_id
        width, length = max(map(len, prompt_ids)), max(limits)
        pad = next(iter(ends), 0) if pad is None else pad
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompt_ids])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids])
        config = GenerationConfig(
            do_sample=False,  # the last processor has drawn already: it leaves one token
            max_new_tokens=length,
            repetition_penalty=sampling.repetition_penalty,
            pad_token_id=pad,
            eos_token_id=ends or None,
            disable_compile=True,
        )
        device = model.device
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=_processors(sampling, streams, width, length, device),
            stopping_criteria=StoppingCriteriaList([_Limits(width, torch.tensor(limits, device=device))]),
        )
        completions = output[:, width:].tolist()
        return [_cut(ids[:limit], ends) for ids, limit in zip(completions, limits, strict=True)]


def _processors(
    sampling: Sampling, streams: list[tuple[int, int]], width: int, length: int, device: torch.device
) -> LogitsProcessorList | None:
    """What turns logits into one token that is drawn, at most `length` times; `None` for the most likely token."""
    if sampling.temperature == 0:
        return None
    processors = LogitsProcessorList()
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    draws = np.stack([np.random.default_rng(stream).random(length) for stream in streams])
    # A running sum over 100,000 tokens in float32 shifts probabilities, but Apple's devices have no float64
    uniform = torch.from_numpy(draws).to(torch.float32 if device.type == "mps" else torch.float64)
    processors.append(_Draw(width, uniform.to(device)))
    return processors


class _Draw(LogitsProcessor):
    """
    Draws the next token of each row and leaves it alone, so that what follows can only take that one.

    Args:
        width: Tokens before the completion.
        uniform: (B, T) numbers in [0, 1), one for each token to be drawn, in the precision to work in.
    """

    def __init__(self, width: int, uniform: torch.Tensor) -> None:
        self.width = width
        self.uniform = uniform

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        cumulative = scores.softmax(dim=-1, dtype=self.uniform.dtype).cumsum(dim=-1)
        uniform = self.uniform[:, input_ids.size(1) - self.width, None]
        total = cumulative[:, -1:].contiguous()  # 1, up to rounding
        # The first token whose running sum is above the number, and at most the last one that has a probability
        tokens = torch.searchsorted(cumulative, uniform * total, right=True)
        tokens = torch.minimum(tokens, torch.searchsorted(cumulative, total))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


class _Limits(StoppingCriteria):
    """Stops each row at a length of its own."""

    def __init__(self, width: int, limits: torch.Tensor) -> None:
        self.width = width
        self.limits = limits

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.limits <= input_ids.size(1) - self.width


def _cut(ids: list[int], ends: list[int]) -> tuple[list[int], bool]:
    """A completion up to its first end-of-sequence token, and whether it has one."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1], True
    return ids, False


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation config."""
    configured = causal_lm(model).generation_config.eos_token_id
    ends = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    return ends


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """
    The model's generation config has no say but for the ends of completions.

    `generate` fills what it is not told with it: a penalty, a minimal length, suppressed tokens.
    """
    model = causal_lm(model)
    theirs = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=theirs.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = theirs


def weights_digest(model: Any) -> str:
    """
    A digest of a few values of each weight, which tells one model from the same model after some training.

    The whole of the weights would take minutes for a large model; an update changes nearly every value.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":  # a weight that is kept on disk
            flat = parameter.detach().flatten()
            some = flat[:: max(1, flat.numel() // 64)].cpu().contiguous()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _load(name: str, device: Any, model_kwargs: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", **model_kwargs})
    if "device_map" in model_kwargs:
        return model
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device)
