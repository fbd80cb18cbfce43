"""How far apart two sets of images are: coherence of texture, classifier two-sample tests, coverage.

The slices of a subject are alike. So folds and confidence intervals are over subjects, and neighbours are of other
subjects. Measures are functions of weights (R, N): how often each of N rows counts in each of R samples.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from evaluation.texture import Features

FOLDS, RIDGE = 5, 1.0  # of logistic regression
NEIGHBOURS = 5  # of coverage
COMPONENTS = 256  # of the images four times smaller
RESAMPLES = 1000  # for confidence intervals


class Rows(NamedTuple):
    """One side of a comparison; float64 on the CPU.

    Attributes:
        values: features (N, F).
        subjects: the number (N,) of the subject that each row is of.
        weights: (R, N).
    """

    values: Tensor
    subjects: Tensor
    weights: Tensor


class Interval(NamedTuple):
    """A measure, and its 95 % confidence interval over samples of as many subjects, drawn with replacement."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        return f"{self.value:.4f}" + ("" if self.low is None else f" [{self.low:.4f}, {self.high:.4f}]")


def mean_coherence(side: Features, rng: torch.Generator) -> Interval:
    """The mean over images of their coherence."""
    weights = resample(numbered(side.subjects), rng)
    return interval(weights @ side.coherence / weights.sum(1))


def two_sample_measures(real: Features, fake: Features, rng: torch.Generator) -> dict[str, Interval]:
    """Measures of how far apart two sets of images are, by name.

    - texture_auc, anatomy_auc: `two_sample_auc` of windows, and of `principal_components` of the images four times
      smaller.
    - coverage: of `texture.encoder_moments`, each divided by its standard deviation over the real images, or by its
      channel's mean one if that is more. Its limits are over samples of the real side alone, for coverage falls where
      fake images are repeated.
    """
    both = []  # of each side: its features, its subjects' numbers (N,), weights (1 + RESAMPLES, N)
    for side in (real, fake):
        number = numbered(side.subjects)
        both.append((side, number, resample(number, rng)))
    values = {"texture_auc": two_sample_auc(*_window_rows(both))}

    anatomy = principal_components(torch.cat([real.anatomy, fake.anatomy])).split(
        [len(real.anatomy), len(fake.anatomy)]
    )
    sides = [Rows(part, number, weight) for part, (_, number, weight) in zip(anatomy, both, strict=True)]
    values["anatomy_auc"] = two_sample_auc(*sides)

    mean = real.moments.mean(0)
    std = real.moments.std(0, correction=0)
    std = std.maximum(std.mean((0, 1))).clamp(min=1e-6)  # in squares of background alone it is near 0
    x, y = (Rows(((side.moments - mean) / std).flatten(1), *rest) for side, *rest in both)
    values["coverage"] = coverage(x, y.values)
    return {name: interval(value) for name, value in values.items()}


def _window_rows(both: list[tuple[Features, Tensor, Tensor]]) -> list[Rows]:
    """The windows of each side, every feature with a mean of 0 and a variance of 1 over both."""
    windows = torch.cat([side.windows for side, _, _ in both])
    mean = windows.mean(0)
    std = (windows - mean).square().mean(0).sqrt().clamp(min=1e-6)  # NaN without a warning if there are none
    return [
        Rows((side.windows - mean) / std, number[side.window_image], weight[:, side.window_image])
        for side, number, weight in both
    ]


def interval(values: Tensor) -> Interval:
    """The first of values (1 + R,), and the 2.5th and 97.5th percentile of the others.

    Samples of few subjects may be of one only, for which a measure is NaN. There are no limits if more than 5 % are.
    """
    if values[1:].isnan().double().mean() > 0.05:
        return Interval(values[0].item())
    low, high = values[1:].nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Interval(values[0].item(), low, high)


def principal_components(x: Tensor) -> Tensor:
    """Rows (N, F) along their leading COMPONENTS principal directions: (N, ≤ COMPONENTS).

    One factor gives the F features a variance of 1 on average. With a factor for each, those of the background, which
    hardly vary, would weigh as much as others.
    """
    x = x - x.mean(0)
    variance, left = torch.linalg.eigh(x @ x.T)
    scores = left.flip(1)[:, :COMPONENTS] * variance.flip(0)[:COMPONENTS].clamp(min=0).sqrt()
    return scores / (variance.clamp(min=0).sum() / x.numel()).sqrt().clamp(min=1e-6)


def numbered(subjects: Sequence[Hashable]) -> Tensor:
    """Subjects as 0, 1, … in the order in which they first come: (N,)."""
    number = {subject: i for i, subject in enumerate(dict.fromkeys(subjects))}
    return torch.tensor([number[subject] for subject in subjects])


def resample(subjects: Tensor, rng: torch.Generator) -> Tensor:
    """Weights (1 + RESAMPLES, N) of rows whose subjects have numbers (N,): all 1, then samples of as many subjects."""
    n = int(subjects.max()) + 1
    picked = torch.randint(n, (RESAMPLES, n), generator=rng)
    times = torch.zeros(RESAMPLES, n).scatter_add_(1, picked, torch.ones(RESAMPLES, n))
    return torch.cat([torch.ones(1, len(subjects)), times[:, subjects]]).double()


def two_sample_auc(real: Rows, fake: Rows) -> Tensor:
    """How well logistic regression tells real rows from fake ones, on subjects that it was not fitted on: (R,).

    The classifier two-sample test (Lopez-Paz and Oquab 2017, arXiv 1610.06545) with the area under the ROC curve: 0.5
    where the sides cannot be told apart. Each of FOLDS parts of the subjects is scored by a regression fitted on the
    others, once: the weights are of what is scored. Only rows of one part are compared. NaN if no two can be.
    """
    won, compared = torch.zeros(2, len(real.weights)).double()
    folds = [side.subjects % FOLDS for side in (real, fake)]
    for part in range(FOLDS):
        x = torch.cat([side.values[fold != part] for side, fold in zip((real, fake), folds, strict=True)])
        label = torch.cat([torch.full((int((fold != part).sum()),), float(i)) for i, fold in enumerate(folds)]).double()
        if len(label.unique()) < 2:
            continue
        weight = fit_logistic(x, label)
        a, b = (side.values[fold == part] @ weight[:-1] for side, fold in zip((real, fake), folds, strict=True))
        u, v = (side.weights[:, fold == part] for side, fold in zip((real, fake), folds, strict=True))
        greater = (b > a[:, None]).double() + (b == a[:, None]).double() / 2
        won += ((u @ greater) * v).sum(1)
        compared += u.sum(1) * v.sum(1)
    return won / compared


def fit_logistic(x: Tensor, label: Tensor) -> Tensor:
    """Coefficients (F + 1,), the constant last, of logistic regression of labels (N,) in {0, 1} on x (N, F).

    They minimise the sum of the cross entropies plus RIDGE / 2 times the squared coefficients without the constant.
    """
    x = F.pad(x, (0, 1), value=1.0)
    ridge = torch.full((x.shape[1],), RIDGE).to(x)
    ridge[-1] = 1e-9  # only for labels that are all equal

    def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
        weight = torch.from_numpy(weight)
        logits = x @ weight
        value = F.binary_cross_entropy_with_logits(logits, label, reduction="sum") + ridge @ weight.square() / 2
        return value.item(), (x.T @ (logits.sigmoid() - label) + ridge * weight).numpy()

    result = minimize(loss, np.zeros(len(ridge)), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    return torch.from_numpy(result.x)


def coverage(real: Rows, fake: Tensor) -> Tensor:
    """Coverage of real rows by fake values (M, F) (Naeem et al. 2020, arXiv 2002.09797, eq. 6): (R,).

    The ball around a real row reaches to its NEIGHBOURS-th nearest real row of another subject; coverage is the share
    of balls with a fake row inside. In the paper, rows of the same subject count too. But the slices of a subject are
    alike, so balls would be too small for a generator of new subjects. With as many fake as real rows from the same
    distribution, coverage is about 1 - 2^-NEIGHBOURS or more.
    """
    apart = torch.cdist(real.values, real.values)
    apart[real.subjects[:, None] == real.subjects] = torch.inf
    radius = apart.kthvalue(min(NEIGHBOURS, len(apart)), 1).values
    covered = (torch.cdist(real.values, fake) < radius[:, None]).any(1).double()
    share = real.weights * radius.isfinite()  # without another subject there is no ball
    return share @ covered / share.sum(1)
