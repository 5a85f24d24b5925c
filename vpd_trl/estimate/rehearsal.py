"""Passes of a network through the library's own losses on tensors without data, to count what they would take."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import addmm_flop, flop_registry
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, PretrainedConfig

from ..distillation import GPU_TILES, Comparison, distill
from ..losses import Head, bco_loss
from ..network import causal_lm, head_of, hidden_states


_log = logging.getLogger("torch._subclasses.fake_tensor")

# torch leaves out the product that is added in place, which gradients of a head are made with
flop_registry.setdefault(torch.ops.aten.addmm_, addmm_flop)


@dataclass(frozen=True)
class Cost:
    """
    What a pass takes.

    Attributes:
        flops: Floating-point operations.
        memory: Most bytes that live at one time beside weights and their gradients.
    """

    flops: int
    memory: int


class Meter(TorchDispatchMode):
    """
    Counts the operations made while it is entered, and the bytes of the storages that they make: `now`, and the `peak`.

    Tensors without data count as those with data do. Not torch's `FlopCounterMode`: it keeps tensors alive, so that
    gradient checkpointing would save nothing; the formulas are its own.

    Args:
        known: Tensors that were there before, and don't count.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._known = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive or key in self._known:
            return

        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class Rehearsal:
    """
    A network of the given form whose tensors have shapes but no data.

    Everything goes through the code that training runs: the model's own, PEFT's, gradient checkpointing, autocast, the
    chunked losses. Attention is the framework's, with a mask (B, 1, L, L) as batches of unlike length have, and without one
    for a FlashAttention.

    Args:
        config: The model's configuration; of a vision-language model the language part alone is made.
        dtype: Of its weights.
        autocast: The half precision that it computes in, if that is not the weights'.
        checkpointing: Whether activations are computed again in the backward pass.
        adapter: A PEFT configuration; then the weights below are frozen.
        attention: transformers' `attn_implementation`; `None` is the one that it takes for this model.
        float32_head: Whether the head is applied in float32 (`cast_lm_head_to_fp32`).

    Raises:
        ValueError: If the model is none that can be rehearsed. Its passes raise it too.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        checkpointing: bool = False,
        adapter: Any = None,
        attention: str | None = None,
        float32_head: bool = False,
    ) -> None:
        self._fake = FakeTensorMode()
        self._autocast = autocast
        self._float32_head = float32_head
        self._kind = config.model_type
        flash = "flash" in (attention or "")
        self._padding_mask = not flash
        with torch.device("meta"):
            model = _language_model(config, dtype=dtype, attn_implementation=None if flash else attention)
            if flash and model.config._attn_implementation != "sdpa":  # which keeps no pairs of tokens either
                raise ValueError(
                    f"{attention} of {self._kind} models can't be estimated: torch's own attention, which stands for it, "
                    "is not supported there. Leave attn_implementation out to see what it takes at most."
                )
            if adapter is not None:
                from peft import get_peft_model

                model = get_peft_model(model, adapter)
        model.generation_config = GenerationConfig()
        with self._fake:
            _onto_cpu(model)
            if checkpointing:
                _checkpoint_activations(causal_lm(model))
        self.model: nn.Module = model.train()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # Gradients are counted apart: some engines take each away as soon as it is there
                parameter.register_post_accumulate_grad_hook(_drop_gradient)

    @property
    def hidden_size(self) -> int:
        return causal_lm(self.model).get_output_embeddings().weight.size(1)

    # ---- What the trainer does with a micro-batch. All rows have `prompt` tokens and `completion` ones behind them

    def scores(self, rows: int, prompt: int, completion: int) -> Cost:
        """Log-probabilities of the completions, without gradient."""
        with torch.no_grad():
            return self._counted(lambda: self._token_logps(rows, prompt, completion))

    def target(self, rows: int, prompt: int, completion: int) -> Cost:
        """Hidden states of the completions, without gradient: what the M-step takes from a teacher."""
        with torch.no_grad():
            return self._counted(lambda: self._hidden(rows, prompt, completion))

    def policy_gradient(self, rows: int, prompt: int, completion: int) -> Cost:
        """Log-probabilities with gradient, and the backward pass: GRPO's loss, but for a few numbers per token."""
        return self._counted(lambda: self._token_logps(rows, prompt, completion).sum().backward())

    def e_step(self, rows: int, prompt: int, completion: int) -> Cost:
        """Forward and backward pass of the E-step; `prompt` is the teacher's."""

        def step() -> None:
            log_ratio = self._token_logps(rows, prompt, completion).view(rows, completion).sum(-1)
            success = torch.zeros(rows, dtype=torch.bool)
            bco_loss(log_ratio, success, temperature=0.1, shift=0.0).sum().backward()

        return self._counted(step)

    def held(self, rows: int, prompt: int, completion: int) -> int:
        """Bytes that log-probabilities with gradient keep until the backward pass."""
        meter = self._meter()
        with self._rehearsing(), meter:
            logps = self._token_logps(rows, prompt, completion)
            held = meter.now
        del logps
        return held

    def m_step(
        self,
        rows: int,
        prompt: int,
        completion: int,
        *,
        compare: Comparison,
        importance: bool = False,
        policy_gradient: bool = False,
    ) -> Cost:
        """
        Forward pass of the student, divergence to a teacher whose hidden states are there, and backward pass.

        With `importance`, tokens are scored for importance ratios in between. With `policy_gradient`, GRPO's loss is there
        before, and both have one backward pass.
        """

        def step() -> None:
            loss: Any = self._token_logps(rows, prompt, completion).sum() if policy_gradient else 0.0
            hidden = self._hidden(rows, prompt, completion)
            target = torch.zeros_like(hidden)
            with self._head_precision():
                head = self._head()
                tokens = torch.zeros(len(hidden), dtype=torch.long)
                if importance:
                    with torch.no_grad():
                        head.token_logps(hidden, tokens)
                loss = loss + distill(hidden, target, head, head, tokens, compare, tiles=GPU_TILES).loss
            loss.backward()

        return self._counted(step)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the cache of a row of that many tokens in generation."""
        with self._rehearsing(), torch.no_grad(), self._precision():
            ids = torch.zeros(1, tokens, dtype=torch.long)
            output = causal_lm(self.model).eval().base_model(input_ids=ids, use_cache=True)
            cache = output["cache" if "cache" in output else "past_key_values"]
            self.model.train()
            held = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in held if t.dim() > 1)  # counters are not the cache

    def largest_block(self) -> int:
        """Parameters of the largest of the layers that gradient checkpointing, and sharding, take one at a time."""
        return max((_size(layer) for layer in _layers(causal_lm(self.model))), default=0)

    def outside_blocks(self) -> int:
        """Parameters that belong to none of these layers: embeddings, head, norms."""
        return _size(self.model) - sum(_size(layer) for layer in _layers(causal_lm(self.model)))

    # ---- Parts

    def _counted(self, step: Callable[[], Any]) -> Cost:
        meter = self._meter()
        with self._rehearsing(), meter:
            step()
        return Cost(meter.flops, meter.peak)

    @contextmanager
    def _rehearsing(self) -> Iterator[None]:
        """Where tensors have no data; a model whose code asks for it is refused in a sentence."""
        _log.disabled = True  # of tracebacks
        try:
            with self._fake:
                yield
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise ValueError(
                f"models of type {self._kind} can't be estimated: their passes don't go through on tensors without data "
                f"({reason})."
            ) from error
        finally:
            _log.disabled = False

    def _meter(self) -> Meter:
        return Meter([*self.model.parameters(), *self.model.buffers()])

    def _hidden(self, rows: int, prompt: int, completion: int) -> torch.Tensor:
        """Hidden states (rows × completion, H) that predict the completion tokens."""
        length = prompt + completion - 1  # nothing is predicted from the last token
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask: Any = torch.ones(rows, length, dtype=torch.long) if self._padding_mask else None
        with self._precision():
            hidden = hidden_states(self.model, ids, mask)
        hidden = hidden[:, prompt - 1 :].reshape(rows * completion, -1)
        return hidden.float() if self._float32_head else hidden

    def _token_logps(self, rows: int, prompt: int, completion: int) -> torch.Tensor:
        hidden = self._hidden(rows, prompt, completion)
        with self._head_precision():
            tokens = torch.zeros(rows * completion, dtype=torch.long)
            return self._head().token_logps(hidden, tokens)

    def _head(self) -> Head:
        return head_of(self.model, temperature=1.0, float32=self._float32_head)

    def _head_precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._float32_head else self._precision()

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast("cpu", dtype=self._autocast)


def _language_model(config: PretrainedConfig, **options: Any) -> Any:
    """
    The model of a configuration with its head; of a vision-language model without what it sees with.

    Raises:
        ValueError: If that is no language model, or one that is recurrent.
    """
    text = config.get_text_config()
    if type(text) in AutoModelForCausalLM._model_mapping:
        model: Any = AutoModelForCausalLM.from_config(text, **options)
    elif type(config) in AutoModelForImageTextToText._model_mapping:
        model = AutoModelForImageTextToText.from_config(config, **options)
        setattr(model, model.base_model_prefix, model.get_decoder())
    else:
        raise ValueError(f"models of type {config.model_type} can't be estimated: they are no causal language models.")
    if model._is_stateful:
        raise ValueError(
            f"models of type {config.model_type} can't be estimated: they are recurrent, and their kernels' operations "
            "and states are not counted."
        )
    return model


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _onto_cpu(model: nn.Module) -> None:
    """Put empty tensors of the surrounding mode, on the CPU, in the place of those on the meta device."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if tensor not in made:  # tied weights stay tied
                made[tensor] = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    made[tensor] = nn.Parameter(made[tensor], requires_grad=tensor.requires_grad)
            own: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            own[name] = made[tensor]


def _layers(model: Any) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _checkpoint_activations(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if not any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        model.enable_input_require_grads()


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
