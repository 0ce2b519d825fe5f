"""Losses of self-supervision in float64 against slow NumPy transcriptions of their papers, and against closed forms.

The transcriptions go sample by sample and component by component; gradients are compared with their central
differences. What a loss must not differentiate is not moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from iir_dist.losses.clusters import sinkhorn, swapped_prediction
from iir_dist.losses.contrastive import info_nce
from iir_dist.losses.distillation import byol, dino, negative_cosine, next_centre
from iir_dist.losses.redundancy import barlow_twins, vicreg

F64 = NDArray[np.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def units(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def check(fast: Callable[[Tensor], Tensor], slow: Callable[[F64], float], x: Tensor) -> None:
    """Value, and gradient by central differences of the transcription."""
    leaf = x.clone().requires_grad_()
    value = fast(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.shape == ()
    assert float(value.detach()) == pytest.approx(slow(x.numpy()), rel=1e-12, abs=1e-12)
    expected = np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[at] = 1e-5
        expected[at] = (slow(x.numpy() + step) - slow(x.numpy() - step)) / 2e-5
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-6, atol=1e-8)


def softmax(x: F64) -> F64:
    total = sum(math.exp(value) for value in x)
    return np.array([math.exp(value) / total for value in x])


def cross_entropy(target: F64, predicted: F64) -> float:
    return -sum(float(t) * math.log(p) for t, p in zip(target, predicted, strict=True))


def slow_info_nce(q: F64, k: F64, negatives: F64 | None, t: float) -> float:
    """arXiv:1911.05722, equation 1; arXiv:2104.02057, algorithm 1."""
    total = 0.0
    for i in range(len(q)):
        own = math.exp(sum(q[i] * k[i]) / t)
        if negatives is None:
            total -= 2 * t * math.log(own / sum(math.exp(sum(q[i] * key) / t) for key in k))
        else:
            total -= math.log(own / (own + sum(math.exp(sum(q[i] * key) / t) for key in negatives)))
    return total / len(q)


def slow_cosine(p: F64, z: F64) -> float:
    """arXiv:2011.10566, equation 1."""
    return -sum(sum(a * b) / math.sqrt(sum(a * a)) / math.sqrt(sum(b * b)) for a, b in zip(p, z, strict=True)) / len(p)


def slow_byol(p: F64, z: F64) -> float:
    """arXiv:2006.07733, equation 2."""
    total = 0.0
    for a, b in zip(p, z, strict=True):
        difference = a / math.sqrt(sum(a * a)) - b / math.sqrt(sum(b * b))
        total += sum(difference * difference)
    return total / len(p)


def slow_dino(student: F64, teacher: F64, centre: F64, student_t: float, teacher_t: float) -> float:
    """arXiv:2104.14294, equation 3 and algorithm 1."""
    terms = [
        np.mean([
            cross_entropy(softmax((teacher[t, i] - centre) / teacher_t), softmax(student[v, i] / student_t))
            for i in range(student.shape[1])
        ])
        for t in range(len(teacher))
        for v in range(len(student))
        if v != t
    ]  # fmt: skip
    return float(np.mean(terms))


def slow_sinkhorn(scores: F64, epsilon: float, iterations: int) -> F64:
    """The released code of arXiv:2006.09882, an entry at a time: prototypes x samples, all of sum 1."""
    q = np.exp(scores / epsilon).T
    q = q / q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] = q[k] / q[k].sum() / prototypes
        for i in range(samples):
            q[:, i] = q[:, i] / q[:, i].sum() / samples
    return q.T * samples


def slow_swapped(codes: list[F64], scores: F64, t: float) -> float:
    """The released loop of arXiv:2006.09882, from given codes of the assigned views."""
    loss = 0.0
    for a, code in enumerate(codes):
        others = 0.0
        for v in range(len(scores)):
            if v != a:
                rows = zip(code, scores[v], strict=True)
                others += sum(cross_entropy(q, softmax(row / t)) for q, row in rows) / len(code)
        loss += others / (len(scores) - 1)
    return loss / len(codes)


def slow_barlow(a: F64, b: F64, weight: float) -> float:
    """arXiv:2103.03230, equations 1 and 2."""
    batch, dim = a.shape

    def standardized(x: F64) -> F64:
        columns = [(x[:, j] - x[:, j].mean()) / math.sqrt(x[:, j].var() + 1e-5) for j in range(dim)]
        return np.stack(columns, axis=1)

    a, b = standardized(a), standardized(b)
    loss = 0.0
    for i in range(dim):
        for j in range(dim):
            c = sum(a[n, i] * b[n, j] for n in range(batch)) / batch
            loss += (1 - c) ** 2 if i == j else weight * c**2
    return loss


def slow_vicreg(a: F64, b: F64, weights: tuple[float, float, float]) -> float:
    """arXiv:2105.04906, equations 1 to 6, with the means of the released code."""
    (batch, dim), (invariance, variance, covariance) = a.shape, weights
    loss = invariance * sum((a[n, j] - b[n, j]) ** 2 for n in range(batch) for j in range(dim)) / (batch * dim)
    for x in (a, b):
        mean = [sum(x[:, j]) / batch for j in range(dim)]
        for i in range(dim):
            for j in range(dim):
                c = sum((x[n, i] - mean[i]) * (x[n, j] - mean[j]) for n in range(batch)) / (batch - 1)
                if i == j:
                    loss += variance * max(0, 1 - math.sqrt(c + 1e-4)) / dim / 2
                else:
                    loss += covariance * c**2 / dim
    return loss


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize("negatives", [7, 1, None])
def test_info_nce(negatives: int | None, temperature: float) -> None:
    q, k = units(5, 3, seed=1), units(5, 3, seed=2)
    others = None if negatives is None else units(negatives, 3, seed=3)
    other = None if others is None else others.numpy()
    check(
        lambda x: info_nce(x, k, others, temperature), lambda x: slow_info_nce(x, k.numpy(), other, temperature), q
    )  # fmt: skip


def test_info_nce_of_identical_and_of_orthogonal_vectors() -> None:
    same = units(1, 4).repeat(6, 1)
    assert info_nce(same, same, same[:1].repeat(9, 1), 0.1) == pytest.approx(math.log(1 + 9), abs=1e-12)
    assert info_nce(same, same, None, 0.3) == pytest.approx(2 * 0.3 * math.log(6), abs=1e-12)
    assert info_nce(same, same, same[:0], 0.1) == 0
    basis = torch.eye(8, dtype=torch.float64)
    q, negatives = basis[:3], basis[3:]
    assert info_nce(q, q, negatives, 0.5) == pytest.approx(math.log(1 + 5 * math.exp(-2)), abs=1e-12)
    assert info_nce(q, q, None, 0.5) == pytest.approx(math.log(1 + 2 * math.exp(-2)), abs=1e-12)
    # Other keys of the batch are no negatives where there is a queue.
    assert info_nce(q, q, negatives, 0.5) == pytest.approx(float(info_nce(q[:1], q[:1], negatives, 0.5)), abs=1e-12)


def test_cosines() -> None:
    p, z = 3 * normal(6, 4, seed=1), normal(6, 4, seed=2)
    check(lambda x: negative_cosine(x, z), lambda x: slow_cosine(x, z.numpy()), p)
    check(lambda x: byol(x, z), lambda x: slow_byol(x, z.numpy()), p)
    assert negative_cosine(p, 7 * p) == pytest.approx(-1, abs=1e-12)
    assert byol(p, 7 * p) == pytest.approx(0, abs=1e-12)
    assert byol(p, -p) == pytest.approx(4, abs=1e-12)


@pytest.mark.parametrize(("students", "teachers"), [(2, 2), (5, 2), (2, 1), (1, 2)])
def test_dino(students: int, teachers: int) -> None:
    student, teacher, centre = normal(students, 3, 4, seed=1), normal(teachers, 3, 4, seed=2), normal(4, seed=3)
    check(
        lambda x: dino(x, teacher, centre, 0.3, 0.1),
        lambda x: slow_dino(x, teacher.numpy(), centre.numpy(), 0.3, 0.1),
        student,
    )


def test_dino_of_plain_teachers() -> None:
    student, centre = normal(3, 2, 5, seed=1), normal(5, seed=2)
    uniform = centre.expand(2, 2, 5)
    expected = -F.log_softmax(student / 0.1, dim=-1).mean(dim=(1, 2))  # of each view; the last has two teachers
    assert dino(student, uniform, centre, 0.1, 0.04) == pytest.approx(float(expected[[0, 1, 2, 2]].mean()), abs=1e-12)
    assert dino(uniform * 0, uniform, centre, 0.1, 0.04) == pytest.approx(math.log(5), abs=1e-12)
    # A teacher that is sure: the surprise of the student about that one class.
    sure = torch.zeros(1, 2, 5, dtype=torch.float64)
    sure[0, 0, 1], sure[0, 1, 3] = 100, 100
    surprise = -F.log_softmax(student[1] / 0.1, dim=-1)[[0, 1], [1, 3]].mean()
    assert dino(student[:2], sure, 0 * centre, 0.1, 0.04) == pytest.approx(float(surprise), abs=1e-12)
    with pytest.raises(ValueError, match="two views"):
        dino(student[:1], sure, centre, 0.1, 0.04)


def test_the_centre_follows_the_teacher() -> None:
    centre, teacher = normal(5, seed=1), normal(2, 3, 5, seed=2).requires_grad_()
    found = next_centre(centre, teacher, 0.9)
    mean = sum(teacher[v, i].detach().numpy() for v in range(2) for i in range(3)) / 6
    np.testing.assert_allclose(found.numpy(), 0.9 * centre.numpy() + 0.1 * mean, atol=1e-14)
    assert not found.requires_grad
    assert torch.equal(centre, normal(5, seed=1))
    assert next_centre(centre.float(), teacher.bfloat16(), 0.9).dtype == torch.float32


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("shape", [(7, 3), (3, 7)])
def test_sinkhorn(shape: tuple[int, int], iterations: int) -> None:
    scores = units(*shape, seed=4)
    expected = slow_sinkhorn(scores.numpy(), 0.05, iterations)
    np.testing.assert_allclose(sinkhorn(scores, 0.05, iterations).numpy(), expected, rtol=1e-10, atol=1e-13)
    assert torch.equal(scores, units(*shape, seed=4))


def test_sinkhorn_shares_the_samples_out() -> None:
    scores = units(12, 4, seed=5).requires_grad_()
    q = sinkhorn(scores, 0.2, 500)
    assert not q.requires_grad
    assert torch.allclose(q.sum(dim=1), torch.ones(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(q.sum(dim=0), torch.full((4,), 12 / 4, dtype=torch.float64), atol=1e-9)
    uneven = torch.zeros(8, 4)  # every sample is nearest to prototype 2
    uneven[:, 2] = 1
    assert torch.allclose(sinkhorn(uneven, 0.05, 3), torch.full((8, 4), 0.25), atol=1e-6)
    with pytest.raises(ValueError, match="one iteration"):
        sinkhorn(scores, 0.05, 0)


def test_sinkhorn_of_scores_whose_exponential_is_no_float() -> None:
    q = sinkhorn(1000 * normal(20, 6, seed=6).float(), 0.05, 3)
    assert torch.isfinite(q).all()
    assert torch.allclose(q.sum(dim=1), torch.ones(20), atol=1e-5)
    far = normal(20, 6, seed=6).float()
    far[:, 3] -= 1000  # a prototype far from all gets its share nevertheless
    assert torch.allclose(sinkhorn(far, 0.05, 3), sinkhorn(normal(20, 6, seed=6).float(), 0.05, 3), atol=1e-2)


@pytest.mark.parametrize("queued", [0, 5])
@pytest.mark.parametrize(("views", "assigned"), [(2, 2), (4, 2), (3, 1)])
def test_swapped_prediction(views: int, assigned: int, queued: int) -> None:
    scores = 0.3 * normal(views, 4, 3, seed=7)
    queue = 0.3 * normal(assigned, queued, 3, seed=8) if queued else None
    codes = []
    for a in range(assigned):
        rows = scores[a].numpy() if queue is None else np.concatenate([queue[a].numpy(), scores[a].numpy()])
        codes.append(slow_sinkhorn(rows, 0.05, 3)[-4:])
    check(
        lambda x: swapped_prediction(x, queue, 0.1, 0.05, 3, assigned), lambda x: slow_swapped(codes, x, 0.1), scores
    )  # fmt: skip


def test_swapped_prediction_of_equal_scores_and_of_wrong_shapes() -> None:
    assert swapped_prediction(torch.ones(3, 4, 7), None, 0.1, 0.05, 3) == pytest.approx(math.log(7), abs=1e-6)
    with pytest.raises(ValueError, match="two views"):
        swapped_prediction(torch.ones(1, 4, 7), None, 0.1, 0.05, 3, assigned=1)
    with pytest.raises(ValueError, match="a queue for each of 2"):
        swapped_prediction(torch.ones(3, 4, 7), torch.ones(1, 5, 7), 0.1, 0.05, 3)


@pytest.mark.parametrize(("batch", "dim"), [(6, 3), (3, 5)])
def test_barlow_twins(batch: int, dim: int) -> None:
    a, b = 2 * normal(batch, dim, seed=9) + 1, normal(batch, dim, seed=10)
    check(lambda x: barlow_twins(x, b, 0.3), lambda x: slow_barlow(x, b.numpy(), 0.3), a)
    check(lambda x: barlow_twins(a, x, 0.3), lambda x: slow_barlow(a.numpy(), x, 0.3), b)
    norm = nn.BatchNorm1d(dim, affine=False).double()
    c = norm(a).T @ norm(b) / batch
    expected = ((1 - c.diagonal()) ** 2).sum() + 0.0051 * (c**2).sum() - 0.0051 * (c.diagonal() ** 2).sum()
    assert barlow_twins(a, b) == pytest.approx(float(expected), rel=1e-12)


def test_barlow_twins_of_known_correlations() -> None:
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    a = 1000 * signs  # so long that the constant below the root is nothing
    assert barlow_twins(a, a) == pytest.approx(0, abs=1e-12)
    assert barlow_twins(a, 5 * a + 3) == pytest.approx(0, abs=1e-12)
    assert barlow_twins(a, -a) == pytest.approx(3 * 2**2, abs=1e-8)
    repeated = a[:, :1].repeat(1, 3)
    assert barlow_twins(repeated, repeated, 0.25) == pytest.approx(6 * 0.25, abs=1e-8)
    leaf = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)  # all the same: no correlation at all
    value = barlow_twins(leaf, leaf)
    assert value.detach() == pytest.approx(3, abs=1e-12)
    assert torch.isfinite(torch.autograd.grad(value, leaf)[0]).all()


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (0.5, 2.0, 3.0)])
def test_vicreg(weights: tuple[float, float, float]) -> None:
    # Of the first one some components vary enough and some too little; of the second none.
    a, b = normal(6, 4, seed=11) * torch.tensor([0.3, 0.6, 2.0, 3.0]) + 1, 0.5 * normal(6, 4, seed=12)
    check(lambda x: vicreg(x, b, *weights), lambda x: slow_vicreg(x, b.numpy(), weights), a)
    check(lambda x: vicreg(a, x, *weights), lambda x: slow_vicreg(a.numpy(), x, weights), b)


def test_vicreg_worked_by_hand() -> None:
    a = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    # Squared differences 0, 4, 0, 4: mean 2. Variances 2: no hinge. Covariances 2 and -2: 2 * 4 / 2 of each view.
    assert vicreg(a, b) == pytest.approx(25 * 2 + 25 * 0 + 1 * (4 + 4), abs=1e-12)
    assert vicreg(0 * a, 0 * a) == pytest.approx(25 * (0.99 + 0.99) / 2, abs=1e-12)


BOTH = 0.5 * normal(2, 4, 3, seed=13)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "info nce": lambda x, y: info_nce(x[0], y[1], y[0], 0.2),
    "info nce, batch": lambda x, y: info_nce(x[0], y[1], None, 0.2),
    "negative cosine": lambda x, y: negative_cosine(x[0], y[1]),
    "byol": lambda x, y: byol(x[0], y[1]),
    "dino": lambda x, y: dino(x, y, y[0, 0].detach(), 0.1, 0.05),
    "swav, queue": lambda x, y: swapped_prediction(x, y, temperature=0.1, epsilon=0.05, iterations=3),
    "barlow twins": lambda x, y: barlow_twins(x[0], x[1]),
    "vicreg": lambda x, y: vicreg(x[0], x[1]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_targets_get_no_gradient(name: str) -> None:
    online, target = BOTH.clone().requires_grad_(), BOTH.flip(1).clone().requires_grad_()
    LOSSES[name](online, target).backward()
    assert target.grad is None
    assert online.grad is not None
    assert online.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_precision(name: str) -> None:
    """Half precision and autocast are computed in float32; float64 stays."""
    loss, half = LOSSES[name], BOTH.bfloat16()
    assert loss(BOTH, BOTH.flip(1)).dtype == torch.float64
    expected = loss(half.float(), half.float().flip(1))
    assert expected.dtype == torch.float32
    found = loss(half, half.flip(1))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(half.float(), half.float().flip(1)), expected)
    assert loss(BOTH, half.flip(1)).dtype == torch.float64


def test_the_widest_dtype_counts_wherever_it_stands() -> None:
    half = BOTH.bfloat16()
    assert negative_cosine(half[0], BOTH[1]).dtype == torch.float64
    assert info_nce(half[0], half[1], negatives=BOTH[1], temperature=0.2).dtype == torch.float64
    assert sinkhorn(half[0], 0.05, 3).dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_a_vector_that_is_not_finite_shows(name: str) -> None:
    broken = BOTH.clone()
    broken[:, 1, 2] = torch.nan
    assert LOSSES[name](broken, BOTH).isnan()
