"""The M-step's loss from hidden states against the float64 reference, TRL's own losses, and what it may hold."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trl.experimental.sdpo import loss_utils

from tests import reference_losses as reference
from tests.heads import ALPHAS, HEADS, agree, gradients, reference_logits, setting
from vpd_trl import distillation
from vpd_trl.distillation import Comparison, Tiles, distill
from vpd_trl.estimate.rehearsal import Meter
from vpd_trl.losses import Head


SMALL = Tiles(chunk=4 * 101, block=3 * 101)  # 4 and 3 tokens of a vocabulary of 101


def sampled(n, vocabulary):
    return torch.arange(n) * 11 % vocabulary


def measured(case, alpha, *, weights=None, tiles=None, **how):
    student, teacher, s, t = case
    tokens = sampled(len(student), len(s.weight))
    return distill(student, teacher, s, t, tokens, Comparison(alpha, **how), weights=weights, tiles=tiles)


def both_logits(case):
    student, teacher, s, t = case
    return reference_logits(student, s), reference_logits(teacher, t).detach()


def of_student(case):
    student, _, s, _ = case
    return [student, s.weight, s.bias]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("n", "vocabulary"), [(1, 11), (7, 1037)])
def test_on_the_full_vocabulary_it_equals_the_reference(n, vocabulary, alpha, head):
    case = setting(n, vocabulary, **head)
    ours, logits = measured(case, alpha), both_logits(case)
    theirs = reference.full(*logits, alpha)
    agree(ours.loss, theirs.sum(), of_student(case))
    assert torch.allclose(ours.divergence.double(), theirs, atol=2e-5, rtol=2e-4)
    p = torch.softmax(logits[0], -1)
    assert torch.allclose(ours.entropy.double(), -(p * p.log()).sum(-1), atol=1e-4)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("n", "vocabulary", "k"), [(1, 11, 1), (1, 11, 5), (1, 11, 11), (7, 1037, 5), (7, 1037, 100), (7, 1037, 1037)]
)
def test_on_the_top_k_it_equals_the_reference(n, vocabulary, k, alpha, tail, head):
    case = setting(n, vocabulary, **head)
    ours = measured(case, alpha, top_k=k, add_tail=tail)
    theirs = reference.top_k(*both_logits(case), alpha, k, tail)
    agree(ours.loss, theirs.sum(), of_student(case))
    assert torch.allclose(ours.divergence.double(), theirs, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_log_probabilities_of_the_sampled_tokens_are_those_of_the_student_and_of_the_unsharpened_teacher(head, top_k):
    case = setting(7, 101, **head)
    ours = measured(case, 0.5, top_k=top_k, target_temperature=0.7)
    rows, tokens = torch.arange(7), sampled(7, 101)
    student, teacher = (logits.log_softmax(-1)[rows, tokens] for logits in both_logits(case))
    assert torch.allclose(ours.student_logps.double(), student, atol=1e-5)
    assert torch.allclose(ours.teacher_logps.double(), teacher, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_target_temperature_divides_the_teachers_logits(head, alpha, top_k):
    case = setting(5, 101, **head)
    student, teacher = both_logits(case)
    sharp = teacher / 0.7
    theirs = (
        reference.full(student, sharp, alpha) if top_k is None else reference.top_k(student, sharp, alpha, top_k, True)
    )
    agree(measured(case, alpha, top_k=top_k, target_temperature=0.7).loss, theirs.sum(), of_student(case))


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("tiles", [None, SMALL])
def test_weights_are_of_the_loss_and_not_of_the_divergence_that_is_shown(tiles, top_k):
    case, weights = setting(13, 101), torch.linspace(0.0, 2.0, 13)
    student, teacher = both_logits(case)
    ours = measured(case, 0.3, weights=weights, top_k=top_k, tiles=tiles)
    per_token = (
        reference.full(student, teacher, 0.3) if top_k is None else reference.top_k(student, teacher, 0.3, top_k, True)
    )
    agree(ours.loss, (per_token * weights).sum(), of_student(case))
    assert torch.allclose(ours.divergence.double(), per_token, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_it_equals_trls_sdpo_on_the_same_logits(alpha):
    case = setting(7, 301)
    student, teacher, s, t = case

    def logits():
        return (
            head.shaped(torch.nn.functional.linear(h, head.weight, head.bias))
            for h, head in ((student, s), (teacher, t))
        )

    student_logits, teacher_logits = logits()
    full = loss_utils.compute_full_logit_self_distillation_loss(
        student_logits, teacher_logits.detach(), distillation_alpha=alpha
    )
    agree(measured(case, alpha).loss, full.sum(), of_student(case), atol=1e-4)
    for tail in (True, False):
        student_logits, teacher_logits = logits()
        theirs = loss_utils.compute_topk_self_distillation_loss(
            student_logits,
            teacher_logits.detach(),
            distillation_topk=9,
            distillation_alpha=alpha,
            distillation_add_tail=tail,
        )
        ours = measured(case, alpha, top_k=9, add_tail=tail)
        agree(ours.loss, theirs.sum(), of_student(case), atol=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("top_k", [None, 5])
def test_in_bfloat16_value_and_gradients_are_right_to_its_precision(top_k, alpha):
    case = setting(7, 301, dtype=torch.bfloat16)
    ours = measured(case, alpha, top_k=top_k)
    logits = both_logits(case)
    theirs = reference.full(*logits, alpha) if top_k is None else reference.top_k(*logits, alpha, top_k, True)
    # The products are added up in float32: what was rounded is the gradient that goes into them
    assert torch.allclose(ours.divergence.double(), theirs, atol=1e-4, rtol=1e-4)
    for a, b in zip(gradients(ours.loss, of_student(case)), gradients(theirs.sum(), of_student(case)), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b.double()).abs().max() < 0.01 * b.double().abs().max()


def test_under_autocast_the_products_are_made_in_its_precision():
    case = setting(7, 301)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = measured(case, 0.5)
    exact = measured(case, 0.5)
    assert rounded.loss.dtype == torch.float32
    assert not torch.equal(rounded.divergence, exact.divergence)
    assert torch.allclose(rounded.divergence, exact.divergence, atol=0.05)
    assert all(g.dtype == torch.float32 for g in gradients(rounded.loss, of_student(case)))


def test_the_two_sides_may_differ_in_width_and_in_all_of_the_head_but_the_temperature():
    student, _, s, _ = setting(5, 101, scale=0.5)
    _, teacher, _, t = setting(5, 101, size=6, softcap=3.0, seed=1)
    case = student, teacher, s, t._replace(bias=None)
    logits = both_logits(case)
    agree(measured(case, 0.3).loss, reference.full(*logits, 0.3).sum(), of_student(case))
    logits = both_logits(case)
    agree(measured(case, 0.3, top_k=4).loss, reference.top_k(*logits, 0.3, 4, True).sum(), of_student(case))


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_token_gives_a_loss_of_zero_that_still_reaches_every_weight(top_k, alpha):
    case = setting(0, 31)
    ours = measured(case, alpha, top_k=top_k)
    assert ours.loss.item() == 0.0
    assert ours.divergence.shape == ours.student_logps.shape == (0,)
    hidden, weight, bias = torch.autograd.grad(ours.loss, of_student(case))
    assert hidden.shape == case[0].shape
    assert not weight.any()
    assert not bias.any()


@pytest.mark.parametrize(
    "how", [{}, {"top_k": 5}, {"top_k": 5, "add_tail": False}, {"target_temperature": 0.5}], ids=str
)
def test_the_size_of_tiles_changes_nothing(how):
    case = setting(13, 101)
    results = []
    for tiles in (Tiles(10**6, 10**6), SMALL, Tiles(1, 1)):
        found = measured(case, 0.5, tiles=tiles, **how)
        results.append((*found, *gradients(found.loss, of_student(case))))
    for other in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", [True, False])
def test_it_stays_finite_when_the_top_k_hold_all_the_mass(tail, alpha):
    case = student, teacher, s, t = setting(3, 31)
    with torch.no_grad():
        s.bias[:2] += 500.0  # the other 29 have probability 0 in float32, and in float64 under 1e-200
        t.bias[:2] += 500.0
    ours = measured(case, alpha, top_k=2, add_tail=tail)
    theirs = reference.full(reference_logits(student, s)[:, :2], reference_logits(teacher, t)[:, :2].detach(), alpha)
    agree(ours.loss, theirs.sum(), [student, s.weight], atol=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_it_stays_finite_where_a_probability_is_zero_on_either_side(alpha):
    student, teacher, s, t = setting(3, 31)
    with torch.no_grad():
        s.bias[4] -= 500.0
        t.bias[5] -= 500.0
    ours = measured((student, teacher, s, t), alpha)
    assert torch.isfinite(ours.loss)
    assert all(torch.isfinite(g).all() for g in gradients(ours.loss, [student, s.weight, s.bias]))


@pytest.mark.parametrize("top_k", [None, 4])
def test_the_student_alone_gets_a_gradient(top_k):
    student, teacher, s, t = case = setting(5, 31)
    found = measured(case, 0.5, top_k=top_k)
    assert [x.requires_grad for x in found] == [True, False, False, False, False]
    found.loss.backward()
    assert all(x.grad is not None for x in (student, s.weight, s.bias))
    assert all(x.grad is None for x in (teacher, t.weight, t.bias))


def test_a_frozen_head_costs_no_gradient_of_its_own():
    student, teacher, s, t = setting(5, 31)
    frozen = s.kept(torch.Tensor.detach)
    expected, _ = gradients(measured((student, teacher, s, t), 0.5).loss, [student, s.weight])
    (found,) = gradients(measured((student, teacher, frozen, t), 0.5).loss, [student])
    assert torch.allclose(found, expected)

    def products(head):
        with FlopCounterMode(display=False) as counter:
            measured((student, teacher, head, t), 0.5).loss.backward()
        return counter.get_total_flops() / (2 * 5 * 31 * 8)

    assert products(s) == 4, "logits of both, gradients of hidden states and head: as with full logits"
    assert products(frozen) == 3


def test_without_gradients_it_makes_none():
    case = setting(5, 31)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = measured(case, 0.5)
    assert counter.get_total_flops() == 2 * 2 * 5 * 31 * 8
    assert torch.equal(found.loss, measured(case, 0.5).loss)
    assert not found.loss.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("how", [{}, {"top_k": 20}, {"target_temperature": 0.5}], ids=str)
def test_logits_of_no_more_than_a_chunk_of_each_model_exist_at_one_time(how, temperature):
    n, vocabulary, size = 600, 1000, 8
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, n, size, generator=generator)
    head = Head(torch.randn(vocabulary, size, generator=generator).requires_grad_(), temperature=temperature)
    case = student.requires_grad_(), teacher, head, head
    tiles = Tiles(chunk=100 * vocabulary, block=vocabulary)
    with Meter([student, teacher, head.weight]) as meter:
        measured(case, 0.5, **how, tiles=tiles).loss.backward()
    gradients_of_both = 4 * (n + vocabulary) * size
    small = 4 * 10 * n
    in_rows = (meter.peak - gradients_of_both - small) / (4 * vocabulary)
    assert 200 < in_rows < 200 + 15, "a chunk of each model, and the tensors of a block"


def test_in_float16_small_gradients_are_not_lost():
    """Where the teacher is close, they are below what float16 can tell from 0."""
    student, _, s, _ = setting(7, 3001)
    teacher = (student + 1e-3 * torch.randn_like(student)).detach()
    exact = gradients(measured((student, teacher, s, s), 0.5).loss, of_student((student, teacher, s, s)))
    half = [x.detach().half().requires_grad_() for x in (student, s.weight, s.bias)]
    head = Head(half[1], half[2])
    case = half[0], half[0].detach().float() + (teacher - student.detach()), head, head
    loss = measured((half[0], case[1].half(), head, head), 0.5).loss
    found = gradients(loss * 2.0**14, half)  # as a gradient scaler does
    rounded = half[0].detach().float(), case[1].half().float()
    whole = [x.detach().float().requires_grad_() for x in half]
    again = Head(whole[1], whole[2])
    exact = gradients(measured((whole[0], rounded[1], again, again), 0.5).loss, whole)
    for a, b in zip(found, exact, strict=True):
        assert (a.float() / 2.0**14 - b).norm() < 5e-3 * b.norm()


@pytest.mark.parametrize(
    "how", [{}, {"top_k": 9}, {"top_k": 9, "add_tail": False}, {"target_temperature": 0.5}], ids=str
)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("sides", ["student", "teacher", "both"])
def test_tokens_that_can_not_be_leave_numbers(sides, alpha, how):
    student, teacher, s, t = setting(5, 40)
    with torch.no_grad():
        for name, head in (("student", s), ("teacher", t)):
            if sides in (name, "both"):
                head.bias[9:] = -torch.inf
    found = measured((student, teacher, s, t), alpha, **how)
    assert all(torch.isfinite(x).all() for x in found)
    assert all(torch.isfinite(g).all() for g in gradients(found.loss, [student, s.weight, s.bias]))
    if sides == "both" and "top_k" not in how:
        plain = [Head(h.weight[:9].detach(), h.bias[:9].detach()) for h in (s, t)]
        tokens = torch.zeros(5, dtype=torch.long)
        alone = distill(student, teacher, *plain, tokens, Comparison(alpha, **how))
        assert torch.allclose(found.divergence, alone.divergence, atol=1e-5)


def test_the_loss_may_be_scaled_after_the_gradient_was_taken():
    case = setting(5, 31)
    plain = gradients(measured(case, 0.5).loss, of_student(case))
    scaled = gradients(measured(case, 0.5).loss * 1000, of_student(case))
    assert all(torch.allclose(b, 1000 * a, rtol=1e-5) for a, b in zip(plain, scaled, strict=True))


def test_a_second_backward_pass_is_refused():
    case = setting(5, 31)
    loss = measured(case, 0.5).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_a_gpus_tiles_are_larger_than_a_cpus():
    assert distillation.GPU_TILES.chunk > distillation.CPU_TILES.chunk
