"""The losses again, from their formulas, in float64 and as plainly as can be: what the library is compared with."""

import torch


def logits(hidden, weight, bias=None, scale=1.0, softcap=None, temperature=1.0):
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def kl(p, q):
    """KL(p ‖ q) of probabilities."""
    return (p * (torch.log(p) - torch.log(q))).sum(-1)


def divergence(student, teacher, alpha):
    """Of probabilities (…, V)."""
    if alpha == 0:
        return kl(teacher, student)
    if alpha == 1:
        return kl(student, teacher)
    m = (1 - alpha) * student + alpha * teacher
    return (1 - alpha) * kl(student, m) + alpha * kl(teacher, m)


def full(student_logits, teacher_logits, alpha):
    return divergence(torch.softmax(student_logits, -1), torch.softmax(teacher_logits, -1), alpha)


def top_k(student_logits, teacher_logits, alpha, k, tail):
    student, teacher = torch.softmax(student_logits, -1), torch.softmax(teacher_logits, -1)
    indices = student_logits.argsort(-1, descending=True)[..., :k]
    student, teacher = student.gather(-1, indices), teacher.gather(-1, indices)
    if tail and k < student_logits.shape[-1]:
        student = torch.cat([student, 1 - student.sum(-1, keepdim=True)], -1)
        teacher = torch.cat([teacher, 1 - teacher.sum(-1, keepdim=True)], -1)
    else:
        student, teacher = student / student.sum(-1, keepdim=True), teacher / teacher.sum(-1, keepdim=True)
    return divergence(student, teacher, alpha)


def bco(log_ratio, success, temperature, shift):
    rho = temperature * log_ratio.double()
    return torch.stack(
        [-torch.log(torch.sigmoid(r - shift if s else shift - r)) for r, s in zip(rho, success, strict=True)]
    )


def sequence_log_ratio(teacher_logps, prior_logps, mask, reduction):
    rows = []
    for teacher, prior, counts in zip(teacher_logps.double(), prior_logps.double(), mask, strict=True):
        differences = [t - p for t, p, c in zip(teacher, prior, counts, strict=True) if c]
        rows.append(sum(differences) / (1 if reduction == "sum" else len(differences)))
    return torch.stack(rows)


def importance_ratio(logps, old_logps, clip):
    ratio = torch.exp((logps.double() - old_logps.double()).clamp(-20, 20))
    return torch.minimum(ratio, torch.tensor(clip, dtype=torch.float64))
