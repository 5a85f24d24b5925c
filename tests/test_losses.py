"""Values and gradients of the losses against an independent float64 reference and closed forms."""

import math

import pytest
import torch

from tests import reference_losses as reference
from tests.heads import ALPHAS, HEADS, agree, reference_logits, setting
from vpd_trl import losses
from vpd_trl.losses import Head


def test_in_float64_log_probabilities_agree_to_the_last_digits():
    a, b = (torch.randn(5, 40, dtype=torch.float64).log_softmax(-1).requires_grad_() for _ in range(2))
    for alpha in ALPHAS:
        theirs = reference.divergence(a.exp(), b.exp().detach(), alpha)
        agree(losses.divergence(a, b, alpha=alpha), theirs, [a], atol=1e-12, rtol=1e-10)


def test_the_teacher_gets_no_gradient():
    a, b = (torch.randn(5, 9).log_softmax(-1).requires_grad_() for _ in range(2))
    for alpha in ALPHAS:
        assert torch.autograd.grad(losses.divergence(a, b, alpha=alpha).sum(), [a, b], allow_unused=True)[1] is None


def test_a_divergence_is_zero_at_equality_and_positive_elsewhere_and_has_a_direction():
    a, b = torch.randn(2, 6, 20).log_softmax(-1)
    values = [losses.divergence(a, b, alpha=alpha) for alpha in ALPHAS]
    assert all((v > 0).all() for v in values)
    assert not torch.allclose(values[0], values[-1])
    assert torch.allclose(values[0], losses.divergence(b, a, alpha=1.0))
    for alpha in ALPHAS:
        assert losses.divergence(a, a, alpha=alpha).abs().max() < 1e-6


def test_the_tail_completes_the_distribution_and_stays_exact_when_it_is_tiny():
    logps, indices = torch.randn(4, 9).log_softmax(-1), torch.tensor([[0, 3, 8]] * 4)
    assert torch.allclose(losses.top_k_logps(logps, indices, tail=True).exp().sum(-1), torch.ones(4), atol=1e-6)
    assert torch.allclose(losses.top_k_logps(logps, indices, tail=False).exp().sum(-1), torch.ones(4), atol=1e-6)
    peaked = torch.tensor([[60.0, 0.0, 0.0]]).log_softmax(-1)
    tail = losses.top_k_logps(peaked, torch.tensor([[0]]), tail=True)[0, 1]
    assert tail.item() == pytest.approx(math.log(2) - 60, abs=1e-4)
    everything = torch.arange(9).expand(4, 9)
    assert torch.equal(losses.top_k_logps(logps, everything, tail=True), logps)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize(("n", "vocabulary"), [(0, 11), (1, 11), (7, 1037)])
def test_a_heads_token_log_probabilities_equal_the_reference(n, vocabulary, options, with_bias):
    hidden, _, head, _ = setting(n, vocabulary, **options)
    head = head if with_bias else head._replace(bias=None)
    inputs = [hidden, head.weight, head.bias] if with_bias else [hidden, head.weight]
    tokens = torch.arange(n) * 11 % vocabulary
    expected = reference_logits(hidden, head).log_softmax(-1)[torch.arange(n), tokens]
    agree(head.token_logps(hidden, tokens), expected, inputs)


def test_sharpened_log_probabilities_are_exact_for_two_events_and_bound_the_rest():
    for others in (1, 5):
        q = torch.cat(
            [torch.tensor([[0.99, 0.6, 0.2]]), torch.tensor([[0.01, 0.4, 0.8]]).expand(others, 3) / others]
        ).T
        powers = q ** (1 / 0.5)
        exact = (powers / powers.sum(-1, keepdim=True))[:, 0].log()
        bound = losses.sharpened_logps(q[:, 0].log(), 0.5)
        assert torch.allclose(bound, exact, atol=1e-5) if others == 1 else (bound < exact).all()
    ends = torch.tensor([0.0, -torch.inf])
    assert losses.sharpened_logps(ends, 0.5).tolist() == ends.tolist()
    assert losses.sharpened_logps(q, 1.0) is q


def test_a_head_can_be_kept_as_a_constant():
    hidden, _, head, _ = setting(3, 11, scale=0.3, softcap=2.0, temperature=1.7)
    constant = head.kept(torch.Tensor.detach)
    assert not any(x.requires_grad for x in (constant.weight, constant.bias))
    assert all(x.requires_grad for x in (head.weight, head.bias))
    tokens = torch.arange(3)
    assert torch.equal(constant.token_logps(hidden, tokens), head.token_logps(hidden, tokens))
    assert head._replace(bias=None).kept(torch.Tensor.detach).bias is None


def test_bco_equals_the_reference():
    ratio = (torch.randn(9) * 20).requires_grad_()
    success = torch.arange(9) % 3 == 0
    ours = losses.bco_loss(ratio, success, temperature=0.1, shift=0.4)
    agree(ours, reference.bco(ratio, success, 0.1, 0.4), [ratio])


def test_bco_is_ln_2_at_zero_margin_and_its_gradient_half_of_beta():
    ratio = torch.full((2,), 3.0, requires_grad=True)
    value = losses.bco_loss(ratio, torch.tensor([True, False]), temperature=0.1, shift=0.3)
    assert value.tolist() == pytest.approx([math.log(2)] * 2)
    (gradient,) = torch.autograd.grad(value.sum(), ratio)
    assert gradient.tolist() == pytest.approx([-0.05, 0.05])


def test_the_mean_over_successes_plus_the_mean_over_failures_is_ln_4_at_zero_margin():
    success = torch.tensor([True, False, False, False])
    value = losses.bco_loss(torch.full((4,), 3.0), success, temperature=0.1, shift=torch.tensor(0.3))
    assert (value[success].mean() + value[~success].mean()).item() == pytest.approx(math.log(4))


def test_bcos_pooled_optimum_is_the_logit_of_the_success_rate():
    ratio = torch.zeros(1, requires_grad=True)
    success = torch.tensor([True] * 3 + [False])
    optimizer = torch.optim.LBFGS([ratio], max_iter=100)

    def closure():
        optimizer.zero_grad()
        value = losses.bco_loss(ratio.expand(4), success, temperature=1.0, shift=0.0).mean()
        value.backward()
        return value

    optimizer.step(closure)
    assert ratio.item() == pytest.approx(math.log(3), abs=1e-3)


def test_bco_is_finite_at_any_log_ratio():
    value = losses.bco_loss(torch.tensor([1e6, -1e6]), torch.tensor([False, True]), temperature=0.1, shift=0.0)
    assert torch.isfinite(value).all()


def test_a_log_ratio_sums_or_averages_the_tokens_that_count_whatever_the_others_hold():
    teacher, prior = torch.tensor([[1.0, 2.0, float("inf")]]), torch.tensor([[0.5, 0.5, float("inf")]])
    mask = torch.tensor([[1, 1, 0]])
    assert losses.sequence_log_ratio(teacher, prior, mask).item() == 2.0
    assert losses.sequence_log_ratio(teacher, prior, mask, reduction="mean").item() == 1.0
    assert losses.sequence_log_ratio(teacher, prior, mask * 0, reduction="mean").item() == 0.0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_infinities_where_the_mask_is_0_change_neither_value_nor_gradient(reduction):
    teacher, prior = torch.randn(3, 6), torch.randn(3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]])
    expected = reference.sequence_log_ratio(teacher, prior, mask, reduction)
    for bad in (0.0, float("inf"), -float("inf"), float("nan")):
        t = torch.where(mask.bool(), teacher, bad).requires_grad_()
        value = losses.sequence_log_ratio(t, torch.where(mask.bool(), prior, -float("inf")), mask, reduction=reduction)
        assert torch.allclose(value.double(), expected, atol=1e-6)
        (gradient,) = torch.autograd.grad(value.sum(), t)
        count = mask.sum(-1, keepdim=True) if reduction == "mean" else 1
        assert torch.allclose(gradient, mask / count)


def test_an_importance_ratio_equals_the_reference():
    logps, old = torch.linspace(-40, 40, 33), torch.linspace(3, -3, 33)
    for clip in (0.5, 2.0, 1e12):
        expected = reference.importance_ratio(logps, old, clip)
        assert torch.allclose(losses.importance_ratio(logps, old, clip=clip).double(), expected, rtol=1e-4, atol=0)


def test_an_importance_ratio_is_clipped_and_has_no_gradient():
    logps = torch.tensor([0.0, 1.0, 99.0, -99.0], requires_grad=True)
    ratio = losses.importance_ratio(logps, torch.zeros(4), clip=2.0)
    assert ratio.tolist() == pytest.approx([1.0, 2.0, 2.0, math.exp(-20)])
    assert not ratio.requires_grad


def test_a_log_ratio_of_half_precision_tokens_is_summed_in_float32():
    ones = torch.ones(1, 257, dtype=torch.bfloat16)
    assert losses.sequence_log_ratio(ones, ones * 0, ones).item() == 257.0


def test_cutting_the_tokens_of_log_probabilities_changes_neither_values_nor_gradients(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    hidden = torch.randn(11, 8, generator=generator)
    tokens = torch.randint(50, (11,), generator=generator)

    def measured():
        head = Head(weight.clone().requires_grad_())
        student = hidden.clone().requires_grad_()
        value = head.token_logps(student, tokens)
        (value * torch.arange(11)).sum().backward()
        return value.detach(), student.grad, head.weight.grad

    whole = measured()
    monkeypatch.setattr(losses, "CPU_CHUNK_SIZE", 4)
    for cut, expected in zip(measured(), whole, strict=True):
        torch.testing.assert_close(cut, expected)
