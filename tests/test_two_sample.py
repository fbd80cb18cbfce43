"""How far apart two sets of images are: against SciPy, plain loops, and distributions whose answer is known."""

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch

from evaluation import texture, two_sample
from evaluation.two_sample import Interval, Rows
from modules import VQVAE


def rows(n: int, shift: float = 0.0, seed: int = 0, n_features: int = 3, per_subject: int = 1) -> Rows:
    """Gaussian rows of standard deviation 1, with `shift` added to the first feature."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(n, n_features, generator=rng).double()
    values[:, 0] += shift
    subjects = torch.arange(n) // per_subject
    return Rows(values, subjects, two_sample.resample(subjects, rng))


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    return (images.clamp(0, 1) * 255).round().byte()


def test_resampling_draws_whole_subjects():
    subjects = torch.tensor([0, 1, 1, 2, 0])
    weights = two_sample.resample(subjects, torch.Generator())
    assert (weights[0] == 1).all() and len(weights) == 1 + two_sample.RESAMPLES
    assert torch.equal(weights[:, 0], weights[:, 4]) and torch.equal(weights[:, 1], weights[:, 2])
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert weights[1:].mean(0).sub(1).abs().max() < 0.1


def test_intervals_of_a_mean_are_as_wide_as_its_standard_error():
    side = rows(400)
    mean = two_sample.interval((side.weights @ side.values)[:, 0] / side.weights.sum(1))
    assert mean.value == pytest.approx(side.values[:, 0].mean().item())
    assert mean.high - mean.low == pytest.approx(2 * 1.96 / 400**0.5, rel=0.1)


def test_coherence_is_its_mean_over_images(images):
    side = texture.features(VQVAE().eval(), as_bytes(images), range(len(images)))
    found = two_sample.mean_coherence(side, torch.Generator())
    assert found.value == pytest.approx(side.coherence.mean().item()) and found.low < found.value < found.high


def test_logistic_regression_is_scipys_minimum():
    real, fake = rows(40), rows(50, 1.0, 1)
    label = torch.cat([torch.zeros(40), torch.ones(50)]).double()
    for x in (torch.cat([real.values, fake.values]), torch.randn(90, 200, generator=torch.Generator()).double()):

        def loss(weight, x=x):
            logit = x.numpy() @ weight[:-1] + weight[-1]
            return (np.logaddexp(0, logit) - label.numpy() * logit).sum() + (weight[:-1] ** 2).sum() / 2

        found = two_sample.fit_logistic(x, label).numpy()
        best = scipy.optimize.minimize(loss, np.zeros(x.shape[1] + 1), method="BFGS", options={"gtol": 1e-6})
        assert loss(found) <= best.fun + 1e-6
        np.testing.assert_allclose(found, best.x, atol=1e-3)


def test_auc_is_mann_whitneys_of_what_was_held_out():
    real, fake = rows(60, per_subject=3), rows(70, 0.8, 1)
    found = two_sample.two_sample_auc(real, fake)[0].item()
    won = compared = 0
    for part in range(two_sample.FOLDS):
        (a, held_a), (b, held_b) = (
            ((s := side.subjects.numpy() % 5 == part), side.values)[::-1] for side in (real, fake)
        )
        x = torch.cat([a[~held_a], b[~held_b]])
        label = torch.cat([torch.zeros((~held_a).sum()), torch.ones((~held_b).sum())]).double()
        weight = two_sample.fit_logistic(x, label)[:-1]
        won += scipy.stats.mannwhitneyu(b[held_b] @ weight, a[held_a] @ weight).statistic
        compared += held_a.sum() * held_b.sum()
    assert found == pytest.approx(won / compared)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 3.0])
def test_auc_of_shifted_gaussians_is_the_normal_distributions(shift):
    found = two_sample.interval(two_sample.two_sample_auc(rows(600), rows(600, shift, 1)))
    expected = scipy.stats.norm.cdf(shift / 2**0.5)
    assert found.value == pytest.approx(expected, abs=0.04) and found.low - 0.02 <= expected <= found.high + 0.02


def test_a_subject_is_never_on_both_sides_of_a_fold():
    """Rows that are told by their subject alone cannot be told on subjects that were held out."""
    rng = torch.Generator().manual_seed(0)
    marks = torch.randn(40, 400, generator=rng).double().repeat_interleave(5, 0)  # as many features as identify one
    subjects = torch.arange(20).repeat_interleave(5)
    sides = [Rows(part, subjects, two_sample.resample(subjects, rng)) for part in marks.split(100)]
    assert 0.3 < two_sample.two_sample_auc(*sides)[0] < 0.7
    mixed = [side._replace(subjects=torch.arange(100)) for side in sides]
    assert two_sample.two_sample_auc(*mixed)[0] > 0.95


def test_coverage_is_a_plain_loop():
    real, fake = rows(12, per_subject=2), rows(15, 0.5, 1).values
    inside = np.zeros((12, 15))
    for i in range(12):
        others = [j for j in range(12) if real.subjects[j] != real.subjects[i]]
        radius = sorted(np.linalg.norm(real.values[i] - real.values[j]) for j in others)[4]
        inside[i] = [np.linalg.norm(real.values[i] - each) < radius for each in fake]
    assert two_sample.coverage(real, fake)[0].item() == pytest.approx(inside.any(1).mean())


@pytest.mark.parametrize("per_subject", [1, 50])
def test_coverage_of_one_distribution_and_of_a_collapsed_one(per_subject):
    real, fake = rows(500, n_features=8, per_subject=per_subject), rows(500, seed=1, n_features=8).values
    found = two_sample.coverage(real, fake)[0].item()
    assert found == pytest.approx(1 - 0.5**5, abs=0.03)  # the paper's eq. 9, for large samples
    assert two_sample.coverage(real, torch.zeros(500, 8).double())[0] < 0.9
    assert two_sample.coverage(real, torch.full((500, 8), 9.0).double())[0] == 0


def test_principal_components_are_scipys():
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).double() * torch.linspace(0.1, 3, 300)
    found = two_sample.principal_components(x)
    left, values, _ = scipy.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    expected = left * values / x.var(0, correction=0).mean().sqrt().item()
    np.testing.assert_allclose(np.abs(found.numpy()), np.abs(expected), atol=1e-4)
    assert two_sample.principal_components(torch.randn(300, 300).double()).shape == (300, two_sample.COMPONENTS)


def test_one_real_subject_gives_no_number():
    one, fake = rows(30, per_subject=30), rows(30, seed=1)
    assert two_sample.two_sample_auc(one, fake)[0].isnan() and two_sample.coverage(one, fake.values)[0].isnan()


def test_there_are_no_limits_where_many_samples_have_no_number():
    values = torch.linspace(0, 1, 101).double()
    values[1:6] = torch.nan
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    assert two_sample.interval(values) == (0.0, pytest.approx(low), pytest.approx(high))
    values[6] = torch.nan
    assert two_sample.interval(values) == Interval(0.0)


def test_images_of_one_distribution_are_equal_and_blurred_ones_are_found(images):
    vqvae = VQVAE().eval()
    rng = torch.Generator().manual_seed(0)
    many = (images.repeat(8, 1, 1, 1) + 0.05 * torch.randn(8 * len(images), 1, 256, 256, generator=rng)).clamp(0, 1)
    many = many + 0.3  # windows in heads
    first, second = many[::2], many[1::2]
    sides = [texture.features(vqvae, as_bytes(x), range(len(x))) for x in (first, second, texture.blur(second, 1.0))]
    same, blurred = (two_sample.two_sample_measures(sides[0], side, torch.Generator()) for side in sides[1:])
    assert blurred["texture_auc"].value == pytest.approx(1) and blurred["texture_auc"].low > same["texture_auc"].high


def test_too_few_images_give_no_number_instead_of_an_error(images):
    vqvae = VQVAE().eval()
    sides = [texture.features(vqvae, as_bytes(x), ["one"] * len(x)) for x in (images[:1], images[:2] * 0)]
    for real, fake in (sides, sides[::-1]):
        found = two_sample.two_sample_measures(real, fake, torch.Generator())
        assert np.isnan(found["texture_auc"].value) and np.isnan(found["coverage"].value)


def test_a_measure_that_is_not_defined_is_a_dash():
    assert str(Interval(float("nan"))) == "–" and str(Interval(0.5, 0.4, 0.6)) == "0.5000 [0.4000, 0.6000]"
