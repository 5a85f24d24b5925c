"""Hidden states and heads with random numbers, and the comparison with the reference: for the tests of the losses."""

import torch

from tests import reference_losses as reference
from vpd_trl.losses import Head


ALPHAS = [0.0, 0.3, 0.5, 1.0]
HEADS = [{}, {"temperature": 0.5}, {"scale": 0.3, "softcap": 2.0, "temperature": 1.7}]


def setting(n, vocabulary, *, size=8, dtype=torch.float32, seed=0, **head):
    """Hidden states of student and teacher (n, size), and their heads."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()

    student, teacher = draw(n, size), draw(n, size)
    heads = [Head(draw(vocabulary, size), draw(vocabulary, scale=0.1), **head) for _ in range(2)]
    return student, teacher, *heads


def gradients(value, tensors):
    """Of a weighted sum of the values; of a scalar its own."""
    weights = torch.linspace(0.5, 2.0, max(value.numel(), 1), dtype=value.dtype)[: value.numel()]
    return torch.autograd.grad((value * weights.view_as(value)).sum(), tensors)


def reference_logits(hidden, head):
    return reference.logits(hidden, head.weight, head.bias, head.scale, head.softcap, head.temperature)


def agree(ours, theirs, inputs, *, atol=2e-5, rtol=2e-4):
    """Values and gradients of `ours` are those of `theirs`."""
    assert torch.allclose(ours.double(), theirs.double(), atol=atol, rtol=rtol)
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=atol * 5, rtol=rtol)
