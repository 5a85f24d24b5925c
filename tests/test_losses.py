"""Values and gradients of the losses against an independent float64 reference, TRL's own, and closed forms."""

import math

import pytest
import torch
from trl.experimental.sdpo import loss_utils

from tests import reference_losses as reference
from vpd_trl import losses
from vpd_trl.losses import Head, fused_divergence, topk_divergence


ALPHAS = [0.0, 0.3, 0.5, 1.0]


def setting(n, vocabulary, *, size=8, dtype=torch.float32, seed=0, **head):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()

    student, teacher = draw(n, size), draw(n, size)
    heads = [Head(draw(vocabulary, size), draw(vocabulary, scale=0.1), **head) for _ in range(2)]
    return student, teacher, *heads


def gradients(value, tensors):
    weights = torch.linspace(0.5, 2.0, max(value.numel(), 1), dtype=value.dtype)[: value.numel()]
    return torch.autograd.grad((value * weights.view_as(value)).sum(), tensors, retain_graph=True)


def reference_logits(hidden, head):
    return reference.logits(hidden, head.weight, head.bias, head.scale, head.softcap, head.temperature)


def agree(ours, theirs, inputs, *, atol=2e-5, rtol=2e-4):
    assert torch.allclose(ours.double(), theirs, atol=atol, rtol=rtol)
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=atol * 5, rtol=rtol)


HEADS = [{}, {"temperature": 0.5}, {"scale": 0.3, "softcap": 2.0, "temperature": 1.7}]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("n", "vocabulary"), [(1, 11), (7, 1037)])
def test_the_fused_divergence_equals_the_reference(n, vocabulary, alpha, head):
    student, teacher, s, t = setting(n, vocabulary, **head)
    ours = losses.fused_divergence(student, teacher, s, t, alpha=alpha)
    theirs = reference.full(reference_logits(student, s), reference_logits(teacher, t).detach(), alpha)
    agree(ours.divergence, theirs, [student, s.weight, s.bias])
    p = torch.softmax(reference_logits(student, s), -1)
    assert torch.allclose(ours.entropy.double(), -(p * p.log()).sum(-1), atol=1e-4)
    assert not ours.entropy.requires_grad


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("n", "vocabulary", "k"), [(1, 11, 1), (1, 11, 5), (1, 11, 11), (7, 1037, 5), (7, 1037, 100), (7, 1037, 1037)]
)
def test_the_top_k_divergence_equals_the_reference(n, vocabulary, k, alpha, tail, head):
    student, teacher, s, t = setting(n, vocabulary, **head)
    ours = losses.topk_divergence(student, teacher, s, t, alpha=alpha, k=k, add_tail=tail)
    logits = reference_logits(student, s), reference_logits(teacher, t).detach()
    agree(ours.divergence, reference.top_k(*logits, alpha, k, tail), [student, s.weight, s.bias])


@pytest.mark.parametrize("alpha", ALPHAS)
def test_divergences_equal_those_of_trls_sdpo_on_the_same_logits(alpha):
    student, teacher, s, t = setting(7, 301)
    inputs = [student, s.weight]
    logits = s.logits(student), t.logits(teacher).detach()
    full = loss_utils.compute_full_logit_self_distillation_loss(*logits, distillation_alpha=alpha)
    agree(losses.fused_divergence(student, teacher, s, t, alpha=alpha).divergence, full.double(), inputs)
    for tail in (True, False):
        logits = s.logits(student), t.logits(teacher).detach()
        theirs = loss_utils.compute_topk_self_distillation_loss(
            *logits, distillation_topk=9, distillation_alpha=alpha, distillation_add_tail=tail
        )
        ours = losses.topk_divergence(student, teacher, s, t, alpha=alpha, k=9, add_tail=tail)
        agree(ours.divergence, theirs.double(), inputs)


def test_in_float64_log_probabilities_agree_to_the_last_digits():
    a, b = (torch.randn(5, 40, dtype=torch.float64).log_softmax(-1).requires_grad_() for _ in range(2))
    for alpha in ALPHAS:
        theirs = reference.divergence(a.exp(), b.exp().detach(), alpha)
        agree(losses.divergence(a, b, alpha=alpha), theirs, [a], atol=1e-12, rtol=1e-10)


def test_in_bfloat16_the_divergence_is_right_to_its_precision():
    student, teacher, s, t = setting(7, 301, dtype=torch.bfloat16)
    ours = losses.fused_divergence(student, teacher, s, t, alpha=0.5).divergence
    theirs = reference.full(reference_logits(student, s), reference_logits(teacher, t), 0.5)
    assert torch.allclose(ours.double(), theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_in_bfloat16_the_gradients_are_right_to_its_precision(alpha):
    student, teacher, s, t = setting(7, 301, dtype=torch.bfloat16)
    inputs = [student, s.weight, s.bias]
    logits = reference_logits(student, s), reference_logits(teacher, t).detach()
    for ours, theirs in (
        (losses.fused_divergence(student, teacher, s, t, alpha=alpha), reference.full(*logits, alpha)),
        (losses.topk_divergence(student, teacher, s, t, alpha=alpha, k=5), reference.top_k(*logits, alpha, 5, True)),
    ):
        # Logits are rounded to 8 bits, so a gradient is off by about 1% of the largest entry.
        for a, b in zip(gradients(ours.divergence, inputs), gradients(theirs, inputs), strict=True):
            assert (a.double() - b.double()).abs().max() < 0.05 * b.double().abs().max()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_temperature_divides_the_logits_of_both_sides(alpha):
    student, teacher, s, t = setting(5, 31)
    logits = reference_logits(student, s) / 0.5, reference_logits(teacher, t).detach() / 0.5
    sharp = s._replace(temperature=0.5), t._replace(temperature=0.5)
    inputs = [student, s.weight, s.bias]
    ours = losses.fused_divergence(student, teacher, *sharp, alpha=alpha)
    agree(ours.divergence, reference.full(*logits, alpha), inputs)
    ours = losses.topk_divergence(student, teacher, *sharp, alpha=alpha, k=4)
    agree(ours.divergence, reference.top_k(*logits, alpha, 4, True), inputs)


def test_the_two_sides_may_differ_in_width_and_in_all_of_the_head_but_the_temperature():
    student, _, s, _ = setting(5, 31, scale=0.5)
    _, teacher, _, t = setting(5, 31, size=6, softcap=3.0, seed=1)
    t = t._replace(bias=None)
    logits = reference_logits(student, s), reference_logits(teacher, t).detach()
    ours = losses.fused_divergence(student, teacher, s, t, alpha=0.3).divergence
    agree(ours, reference.full(*logits, 0.3), [student, s.weight, s.bias])
    ours = losses.topk_divergence(student, teacher, s, t, alpha=0.3, k=4).divergence
    agree(ours, reference.top_k(*logits, 0.3, 4, True), [student, s.weight, s.bias])


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_token_gives_a_loss_of_zero_that_still_reaches_every_weight(k, alpha):
    student, teacher, s, t = setting(0, 31)
    if k is None:
        value = losses.fused_divergence(student, teacher, s, t, alpha=alpha).divergence
    else:
        value = losses.topk_divergence(student, teacher, s, t, alpha=alpha, k=k).divergence
    assert value.shape == (0,)
    hidden, weight = torch.autograd.grad(value.sum(), [student, s.weight])
    assert hidden.shape == student.shape
    assert not weight.any()


@pytest.mark.parametrize("tail", [True, False])
def test_chunks_change_nothing_and_bound_how_many_logits_exist(tail, monkeypatch):
    student, teacher, s, t = setting(13, 101)
    rows = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(losses.F, "linear", lambda h, *a: (rows.append(len(h)), linear(h, *a))[1])
    results = []
    for chunk in (1, 7, 13):
        rows.clear()
        value = losses.topk_divergence(
            student, teacher, s, t, alpha=0.5, k=5, add_tail=tail, chunk_size=chunk
        ).divergence
        results.append((value, *gradients(value, [student, s.weight])))
        assert max(rows) == chunk
    for other in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-6) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", [True, False])
def test_the_top_k_divergence_stays_finite_when_the_k_hold_all_the_mass(tail, alpha):
    student, teacher, s, t = setting(3, 31)
    with torch.no_grad():
        s.bias[:2] += 500.0  # the other 29 have probability 0 in float32, and in float64 under 1e-200
        t.bias[:2] += 500.0
    ours = losses.topk_divergence(student, teacher, s, t, alpha=alpha, k=2, add_tail=tail).divergence
    logits = reference_logits(student, s)[:, :2], reference_logits(teacher, t)[:, :2].detach()
    agree(ours, reference.full(*logits, alpha), [student, s.weight], atol=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_teacher_gets_no_gradient(alpha):
    student, teacher, s, t = setting(5, 31)
    for value in (
        losses.fused_divergence(student, teacher, s, t, alpha=alpha).divergence,
        losses.topk_divergence(student, teacher, s, t, alpha=alpha, k=4).divergence,
    ):
        value.sum().backward()
        assert all(x.grad is not None for x in (student, s.weight, s.bias))
        assert all(x.grad is None for x in (teacher, t.weight, t.bias))
    a, b = (torch.randn(5, 9).log_softmax(-1).requires_grad_() for _ in range(2))
    losses.divergence(a, b, alpha=alpha).sum().backward()
    assert a.grad is not None
    assert b.grad is None


def test_a_divergence_is_zero_at_equality_and_positive_elsewhere_and_has_a_direction():
    a, b = torch.randn(2, 6, 20).log_softmax(-1)
    values = [losses.divergence(a, b, alpha=alpha) for alpha in ALPHAS]
    assert all((v > 0).all() for v in values)
    assert not torch.allclose(values[0], values[-1])
    assert torch.allclose(values[0], losses.divergence(b, a, alpha=1.0))
    for alpha in ALPHAS:
        assert losses.divergence(a, a, alpha=alpha).abs().max() < 1e-6


def test_the_tail_completes_the_distribution_and_stays_exact_when_it_is_tiny():
    logits, indices = torch.randn(4, 9), torch.tensor([[0, 3, 8]] * 4)
    assert torch.allclose(losses.top_k_logps(logits, indices, tail=True).exp().sum(-1), torch.ones(4), atol=1e-6)
    assert torch.allclose(losses.top_k_logps(logits, indices, tail=False).exp().sum(-1), torch.ones(4), atol=1e-6)
    peaked = torch.tensor([[60.0, 0.0, 0.0]])
    tail = losses.top_k_logps(peaked, torch.tensor([[0]]), tail=True)[0, 1]
    assert tail.item() == pytest.approx(math.log(2) - 60, abs=1e-4)
    everything = torch.arange(9).expand(4, 9)
    assert torch.allclose(losses.top_k_logps(logits, everything, tail=True), logits.log_softmax(-1), atol=1e-6)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize(("n", "vocabulary"), [(0, 11), (1, 11), (7, 1037)])
def test_a_heads_logits_and_token_log_probabilities_equal_the_reference(n, vocabulary, options, with_bias):
    hidden, _, head, _ = setting(n, vocabulary, **options)
    head = head if with_bias else head._replace(bias=None)
    inputs = [hidden, head.weight, head.bias] if with_bias else [hidden, head.weight]
    expected = reference_logits(hidden, head)
    agree(head.logits(hidden), expected, inputs)
    tokens = torch.arange(n) * 11 % vocabulary
    expected = reference_logits(hidden, head).log_softmax(-1)[torch.arange(n), tokens]
    agree(head.token_logps(hidden, tokens), expected, inputs)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_a_sharpened_heads_probabilities_are_powers_of_the_original_ones(options):
    hidden, _, head, _ = setting(5, 37, **options)
    powers = head.logits(hidden).double().softmax(-1) ** (1 / 0.7)
    sharp = head.sharpened(0.7)
    assert torch.allclose(sharp.logits(hidden).double().softmax(-1), powers / powers.sum(-1, keepdim=True), atol=1e-6)
    assert sharp.temperature == head.temperature


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_the_fused_divergence_takes_a_sharpened_teacher(options, alpha):
    student, teacher, s, t = setting(5, 37, **options)
    ours = losses.fused_divergence(student, teacher, s, t.sharpened(0.7), alpha=alpha)
    theirs = reference.full(reference_logits(student, s), reference_logits(teacher, t).detach() / 0.7, alpha)
    agree(ours.divergence, theirs, [student, s.weight, s.bias])


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


def test_logits_of_a_bfloat16_head_are_float32():
    hidden, _, head, _ = setting(3, 11, dtype=torch.bfloat16)
    assert head.logits(hidden).dtype == torch.float32


def test_a_head_can_be_kept_as_a_constant():
    hidden, _, head, _ = setting(3, 11, scale=0.3, softcap=2.0, temperature=1.7)
    constant = head.kept(torch.Tensor.detach)
    assert not any(x.requires_grad for x in (constant.weight, constant.bias))
    assert all(x.requires_grad for x in (head.weight, head.bias))
    assert torch.equal(constant.logits(hidden), head.logits(hidden))
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


@pytest.mark.parametrize("what", ["fused", "top k", "log-probabilities"])
def test_cutting_the_tokens_changes_neither_values_nor_gradients(what, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    hidden, target = torch.randn(2, 11, 8, generator=generator)
    tokens = torch.randint(50, (11,), generator=generator)

    def measured():
        head = Head(weight.clone().requires_grad_())
        student = hidden.clone().requires_grad_()
        if what == "fused":
            value = fused_divergence(student, target, head, head, alpha=0.3).divergence
        elif what == "top k":
            size = losses.CPU_CHUNK_SIZE
            value = topk_divergence(student, target, head, head, alpha=0.3, k=5, chunk_size=size).divergence
        else:
            value = head.token_logps(student, tokens)
        (value * torch.arange(11)).sum().backward()
        return value.detach(), student.grad, head.weight.grad

    whole = measured()
    monkeypatch.setattr(losses, "CPU_CHUNK_SIZE", 4)
    for cut, expected in zip(measured(), whole, strict=True):
        torch.testing.assert_close(cut, expected)


def test_the_backward_pass_of_the_top_k_divergence_does_not_ask_the_teacher_again(monkeypatch):
    asked = []
    teacher = Head(torch.randn(20, 4), temperature=0.5)  # told apart by its temperature
    logits = Head.logits

    def counting(self, hidden):
        asked.append(self.temperature)
        return logits(self, hidden)

    monkeypatch.setattr(Head, "logits", counting)
    hidden = torch.randn(6, 4, requires_grad=True)
    student = Head(torch.randn(20, 4, requires_grad=True))
    topk_divergence(
        hidden, torch.randn(6, 4), student, teacher, alpha=1.0, k=3, chunk_size=3
    ).divergence.sum().backward()
    assert asked.count(0.5) == 2
    assert asked.count(1.0) == 4
