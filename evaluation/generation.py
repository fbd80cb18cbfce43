"""Measures of generated images beside real ones. None of them needs a downloaded network."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation import memorisation
from evaluation.memorisation import Copies
from evaluation.texture import features, laplacian_pyramid
from evaluation.two_sample import Interval, mean_coherence, numbered, two_sample_measures
from modules import VQVAE
from support import seeds
from support.console import in_parts
from support.device import exact_float32

PATCH, PATCHES_PER_IMAGE, PROJECTIONS = 7, 128, 512
# Images of each set that are measured during training, at most. More take longer, and the confidence intervals, which
# are over subjects, hardly shrink.
MOST_MEASURED = 256
MOST_PROJECTED = 256  # images of each set that patches are taken from: 32,768 patches per level
FEWEST_COMPARED = 30  # images in each set; with fewer, five folds and nearest neighbours say nothing
BATCH = 32  # images that a network sees at once; fixed, so that a measure does not depend on it

MEASURES = {
    "swd": "sliced Wasserstein distance × 10³",
    "coherence": "coherence of texture in the head",
    "texture_auc": "AUC of texture, windows of 64 pixels",
    "anatomy_auc": "AUC of anatomy, images four times smaller",
    "coverage": "coverage of the encoder's moments",
}
NEAREST = "distance to the nearest training image, 5th percentile"


@dataclass(frozen=True)
class Images:
    """A set of images.

    Attributes:
        pixels: (N, 1, 256, 256) uint8.
        subjects: the subject of each image, for those of one are alike.
        names: the name of each image.
    """

    pixels: Tensor
    subjects: Sequence[Hashable]
    names: Sequence[str]

    def __getitem__(self, indices: Sequence[int]) -> "Images":
        return Images(
            self.pixels[torch.as_tensor(indices, device=self.pixels.device)],
            [self.subjects[i] for i in indices],
            [self.names[i] for i in indices],
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def evenly_spaced(self, n: int) -> "Images":
        """At most n of the images, spaced evenly."""
        n = min(n, len(self))
        return self[[i * len(self) // n for i in range(n)]]

    def random_subset(self, n: int, seed: int) -> "Images":
        """At most n of the images, chosen at random with a run's seed."""
        order = torch.randperm(len(self), generator=seeds.generator(seed, "measured images"))
        return self[order[:n].tolist()]

    def halves(self) -> list["Images"]:
        """The images of every other subject, and of the others."""
        half = numbered(self.subjects) % 2
        return [self[(half == side).nonzero().flatten().tolist()] for side in (0, 1)]


class Row(NamedTuple):
    """A measure of fake images, of real images of other subjects, and of reconstructions of these."""

    name: str
    fake: Interval
    real: Interval
    reconstructions: Interval


class Comparison(NamedTuple):
    """What `compare` found.

    Attributes:
        rows: the measures.
        missing: why some of them are missing, in one line each.
        copies: which fake images are near training images; None without any.
        fake: the fake images as they were compared.
    """

    rows: list[Row]
    missing: list[str]
    copies: Copies | None
    fake: Images


def of_arrays(pixels: np.ndarray | Tensor, subjects: Sequence[Hashable] | None = None) -> Images:
    """A set of images (N, 256, 256) or (N, 1, 256, 256), uint8. Without `subjects`, each image is one subject.

    Raises ValueError if the array has another shape or dtype, or is empty.
    """
    pixels = torch.as_tensor(pixels)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (1, 256, 256) or len(pixels) == 0:
        raise ValueError(f"images must be (N, 256, 256) uint8, not {tuple(pixels.shape)} {pixels.dtype}")
    names = [str(i) for i in range(len(pixels))]
    return Images(pixels, names if subjects is None else list(subjects), names)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as the uint8 that a PNG has, on the CPU."""
    return (images.clamp(0, 1) * 255).round().byte().cpu()


@torch.no_grad()
@exact_float32()
def reconstructed(vqvae: VQVAE, images: Images) -> Images:
    """Images decoded from their codes."""
    device = vqvae.conv1.weight.device
    parts = []
    for part in in_parts(images.pixels, BATCH, "Reconstructing"):
        parts.append(to_bytes(vqvae.decode(vqvae.encode(part.to(device).float() / 255))))
    return replace(images, pixels=torch.cat(parts))


class Reference:
    """Real images, which others are compared with.

    Args:
        vqvae: its encoder gives features.
        images: at least one.
        seed: draws what is random in a measure; the same seed gives the same values.
    """

    def __init__(self, vqvae: VQVAE, images: Images, seed: int):
        self.vqvae = vqvae
        self.images = images
        self.seed = seed
        self.features = features(vqvae, images.pixels, images.subjects)

    def measure(self, images: Images) -> dict[str, Interval]:
        """MEASURES of images, by name."""
        return self.measure_reference(Reference(self.vqvae, images, self.seed))

    def measure_reference(self, other: "Reference") -> dict[str, Interval]:
        """MEASURES of another reference's images, by name. NaN where a measure needs more images: FEWEST_COMPARED."""
        rng = seeds.generator(self.seed, "resampling")
        measures = {"coherence": mean_coherence(other.features, rng)}
        n = min(len(other.images), len(self.images))
        if n >= FEWEST_COMPARED:
            measures |= two_sample_measures(self.features, other.features, rng)
        rng = seeds.generator(self.seed, "measures")
        n = min(n, MOST_PROJECTED)
        real, fake = (each.evenly_spaced(n).pixels.float() / 255 for each in (self.images, other.images))
        measures["swd"] = Interval(sliced_wasserstein(real.cpu(), fake.cpu(), rng).mean().item())
        return {name: measures.get(name, Interval(math.nan)) for name in MEASURES}


@torch.no_grad()
def compare(
    real: Images, fake: Images, vqvae: VQVAE, train: Images | None = None, seed: int = 0, reconstruct: str = "none"
) -> Comparison:
    """How far fake images are from real ones, and whether they are copies of training images.

    Args:
        real: images that the generator of `fake` was not trained on.
        fake: generated images.
        vqvae: its encoder gives features.
        train: images that the generator was trained on, of other subjects than `real`.
        seed: the same one gives the same values.
        reconstruct: "none" compares images as they are. "real" compares `fake`, which `vqvae` decoded, with
            reconstructions. "both" passes both sides through `vqvae`, so that its loss is on both.

    Each row has two values to compare `fake` with. `real` is the measure of real images of other subjects, treated as
    `fake` is: what a perfect generator would have. `reconstructions` is that of their reconstructions compared with
    originals: what the VQ-VAE alone costs. The other subjects are as many random images of `train` as of `fake`, or
    without `train` half of the subjects of `real`, compared with the other half.
    """
    if reconstruct not in ("none", "real", "both"):
        raise ValueError(f"reconstruct must be none, real or both, not {reconstruct}")
    others, counterpart = _other_subjects(real, len(fake), train, seed)
    fake = reconstructed(vqvae, fake) if reconstruct == "both" else fake
    shown = real if reconstruct == "none" else reconstructed(vqvae, real)
    reference = Reference(vqvae, shown, seed)
    measured = reference.measure(fake)

    originals = reference if shown is counterpart else Reference(vqvae, counterpart, seed)
    decoded_others = Reference(vqvae, reconstructed(vqvae, others), seed)
    decoded = originals.measure_reference(decoded_others)
    if reconstruct == "none":
        floor = originals.measure(others)
    else:
        same = reference if counterpart is real else Reference(vqvae, reconstructed(vqvae, counterpart), seed)
        floor = same.measure_reference(decoded_others)
    rows = [Row(text, measured[name], floor[name], decoded[name]) for name, text in MEASURES.items()]

    copies = None
    if train is not None:
        copies = memorisation.find_copies(fake, shown, train, seeds.generator(seed, "resampling"))
        quantiles = (Interval(part.distance.quantile(0.05).item()) for part in (copies.fake, copies.real))
        rows.append(Row(NEAREST, *quantiles, Interval(math.nan)))
    return Comparison(rows, _missing(rows, real, train), copies, fake)


def _other_subjects(real: Images, n: int, train: Images | None, seed: int) -> tuple[Images, Images]:
    """Up to n real images of other subjects, and those that they are compared with."""
    if train is not None:
        return train.random_subset(n, seed), real
    if len(set(real.subjects)) == 1:  # its measures are NaN
        return real, real
    first, second = real.halves()
    return second.evenly_spaced(n), first


def _missing(rows: list[Row], real: Images, train: Images | None) -> list[str]:
    """Why measures are missing."""
    reasons = []
    if any(math.isnan(side.value) for row in rows[: len(MEASURES)] for side in row[1:]):
        reasons.append(
            f"AUC and coverage need {FEWEST_COMPARED} images a side, of several subjects and with detail; without the "
            "training images, halves of the real ones are compared"
        )
    if train is None:
        reasons.append("copies are not looked for without the training images")
    elif len(real) < 1 / memorisation.CHANCE:
        reasons.append(f"{len(real)} real images are few: the nearest of them decides which fake images are near")
    return reasons


def sliced_wasserstein(real: Tensor, fake: Tensor, rng: torch.Generator) -> Tensor:
    """Sliced Wasserstein distance of Laplacian-pyramid patches (Karras et al. 2018, arXiv 1710.10196, section 5).

    At each level of the pyramid, 128 patches of 7x7 pixels an image are normalised and projected on 512 random
    directions; in each direction the distance is that of the sorted values. Both sides are normalised by the mean and
    standard deviation of the real patches (in the paper each by its own), so that brightness and contrast count, and
    patches are taken at the same places of both, so that equal sides have distance 0.

    `real` and `fake` are equally many images (N, 1, 256, 256) on the CPU; `rng` draws places and directions.

    Returns:
        (5,) float64, times 10³: the levels of 256, 128, 64, 32 and 16 pixels.
    """
    if real.shape != fake.shape:
        raise ValueError(f"both sides must be equally many images, not {tuple(real.shape)} and {tuple(fake.shape)}")
    directions = torch.randn(PATCH * PATCH, PROJECTIONS, generator=rng)
    directions /= directions.norm(dim=0)
    levels = []
    for a, b in zip(laplacian_pyramid(real), laplacian_pyramid(fake), strict=True):
        n, _, h, w = a.shape
        top, left = (torch.randint(size - PATCH + 1, (n, PATCHES_PER_IMAGE), generator=rng) for size in (h, w))
        a, b = _patches(a, top, left), _patches(b, top, left)
        mean = a.mean()
        std = a.std()
        # sorted by NumPy, which is several times faster than PyTorch on a CPU
        a, b = (np.sort(((side - mean) / std @ directions).T.contiguous().numpy()) for side in (a, b))
        levels.append(torch.from_numpy(a - b).abs().mean().double())
    return 1000 * torch.stack(levels)


def _patches(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """The 7x7 patches at (N, P) places of images (N, 1, H, W): (N·P, 49)."""
    inside = torch.arange(PATCH)
    image = torch.arange(len(images))[:, None, None, None]
    rows = top[:, :, None, None] + inside[:, None]
    columns = left[:, :, None, None] + inside
    return images[:, 0][image, rows, columns].reshape(-1, PATCH * PATCH)
