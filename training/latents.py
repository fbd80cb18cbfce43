"""Between VQ-VAE and DCGAN: latents to the generator's range and back, snapping to codes, sampling, generator.pth.

The generator ends in tanh, so its range is [-1, 1]. `LatentScale` is the fixed map between that and the range of the
latents. It is fitted on the training split and stored in generator.pth.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from modules import VQVAE, Generator, rows
from support import console, files
from support.console import in_batches
from support.device import fits, move

# Root mean square of the foreground in tanh's range: about 0.5 % of values are clipped. A larger one clips more, a
# smaller one squeezes the anatomy towards the background's zero.
RMS = 0.4
FIT_IMAGES = 128  # that a scale is fitted on, spaced evenly over the split


@dataclass(frozen=True, eq=False)
class LatentScale:
    """Latents z <-> tanh's range: t = clip(scale⁻¹ (z - shift), -1, 1) at each position, and z = scale t + shift.

    Attributes:
        shift: (D,), what maps to 0.
        scale: (D, D), invertible.
    """

    shift: Tensor
    scale: Tensor

    def to(self, device: torch.device | str) -> "LatentScale":
        """The same map on another device."""
        return LatentScale(self.shift.to(device), self.scale.to(device))

    def times(self, factor: float) -> "LatentScale":
        """The map whose z - shift are `factor` times as long."""
        return LatentScale(self.shift, self.scale * factor)

    @cached_property
    def _inverse(self) -> Tensor:
        return torch.linalg.inv(self.scale.cpu().double()).to(self.scale)

    def to_tanh(self, z: Tensor) -> Tensor:
        """Latents (B, D, H, W) -> (B, D, H, W) in [-1, 1]."""
        return _multiply(self._inverse, z - self.shift[:, None, None]).clamp(-1, 1)

    def from_tanh(self, t: Tensor) -> Tensor:
        """(B, D, H, W) in [-1, 1] -> latents (B, D, H, W)."""
        return _multiply(self.scale, t) + self.shift[:, None, None]

    @classmethod
    def of_codebook(cls, vqvae: VQVAE, dataset: Dataset | None = None) -> "LatentScale":
        """All embeddings in [-1, 1], by one factor. The data set is not used."""
        weight = vqvae.vector_quantizer.embedding.weight.detach()
        return cls(torch.zeros_like(weight[0]), torch.eye(weight.shape[1]).to(weight) * weight.abs().max())

    @classmethod
    @torch.no_grad()
    def fit(cls, vqvae: VQVAE, dataset: Dataset) -> "LatentScale":
        """The background's embedding at 0, one factor, and a rotation that gives every channel the same share.

        Differences d from the background's embedding, at positions with other codes, have 95 % of their variance in one
        direction, the grey level. A factor for each channel would raise weak channels up to 15 times, and with them
        what no code expresses; a rotation and one factor keep distances as the codebook measures them. With
        E[d dᵀ] = U diag(λ) Uᵀ, λ falling, the rotation is Cᵀ Uᵀ, where C is the cosine transform: its first function is
        constant and so spreads the first direction evenly over all channels.
        """
        background, difference = foreground_differences(vqvae, dataset)
        second = difference.T @ difference / len(difference)
        k = torch.arange(len(second), dtype=torch.double)
        cosines = torch.cos(torch.pi * (k[:, None] + 0.5) * k / len(k)) * (2 / len(k)) ** 0.5
        cosines[:, 0] /= 2**0.5
        rotation = cosines @ torch.linalg.eigh(second).eigenvectors.flip(1).T
        factor = second.trace().div(len(k)).sqrt().clamp(min=1e-6) / RMS
        to = dict(dtype=torch.float32, device=vqvae.vector_quantizer.embedding.weight.device)
        return cls(background.to(**to), (rotation.T * factor).to(**to))


@torch.no_grad()
def foreground_differences(vqvae: VQVAE, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The background's embedding (D,), and how latents at other codes differ from it, (N, D) float64; on the CPU."""
    quantizer, n = vqvae.vector_quantizer, min(FIT_IMAGES, len(dataset))
    picked = [i * len(dataset) // n for i in range(n)]
    z = torch.cat([vqvae.latents(x) for x in in_batches(dataset, picked, desc="Encoding")])
    codes, z = quantizer.nearest(z).flatten().cpu(), rows(z).cpu()
    most_frequent = codes.mode().values
    background = quantizer.embedding.weight.detach().cpu()[most_frequent]
    others = codes != most_frequent
    if not others.any():
        others[:] = True
    return background, (z[others] - background).double()


def _multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix (D, D) times the vector at each position of x (B, D, H, W)."""
    return torch.einsum("ij,bjhw->bihw", matrix, x)


class Latents(Dataset):
    """A split's latents in tanh's range, which the DCGAN learns to generate.

    They are encoded once and kept in half precision (512 kB an image) if that takes at most half of the free memory, on
    the device or else on the host. Otherwise each batch is encoded when it is asked for.

    Args:
        vqvae, dataset, scale: the trained network, a `dataset.OasisDataset` and the map, on one device.
        quantized: whether latents are the embeddings of an image's codes, or the encoder's output z_e.
        stored: whether the latents are kept; decided by the free memory if None. Also an attribute.
    """

    def __init__(self, vqvae: VQVAE, dataset: Dataset, scale: LatentScale, quantized: bool = False, stored=None):
        self.vqvae, self.dataset = vqvae.eval().to(memory_format=torch.channels_last), dataset
        self.scale, self.quantized = scale, quantized
        size = (len(dataset), 64, 64, len(scale.shift))
        n_bytes = 2 * math.prod(size)
        device, host = scale.shift.device, torch.device("cpu")
        self.stored = fits(n_bytes, device) or fits(n_bytes, host) if stored is None else stored
        if not self.stored:
            return
        self.kept = torch.empty(size, dtype=torch.half, device=device if fits(n_bytes, device) else host)
        start = 0
        for x in in_batches(dataset, desc="Encoding"):
            self.kept[start : start + len(x)] = self._encode(x).permute(0, 2, 3, 1)
            start += len(x)

    @torch.no_grad()
    def _encode(self, x: Tensor) -> Tensor:
        """Images (B, 1, 256, 256) -> (B, D, 64, 64) half, in [-1, 1]."""
        z = self.vqvae.latents(x)
        if self.quantized:
            z = self.vqvae.vector_quantizer.look_up(self.vqvae.vector_quantizer.nearest(z))
        return self.scale.to_tanh(z).half()

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: list[int]) -> Tensor:
        """(B, D, 64, 64) float32 in [-1, 1]."""
        if not self.stored:
            return self._encode(self.dataset.batch(indices)).float()
        kept = self.kept[move(torch.as_tensor(indices), self.kept.device)]
        return move(kept, self.scale.shift.device).permute(0, 3, 1, 2).float()

    __getitems__ = batch  # what DataLoader calls


class Prior:
    """A generator and what turns its output into brains: the scale of latents, and the VQ-VAE that they belong to.

    All are on one device. What is made from samples of a prior trained on phantoms says so.
    """

    def __init__(self, generator: Generator, scale: LatentScale, vqvae: VQVAE, phantoms: bool = False):
        self.generator, self.scale, self.vqvae, self.phantoms = generator, scale, vqvae, phantoms

    def noise(self, n: int, rng: torch.Generator) -> Tensor:
        """n noise vectors (n, noise_dim, 1, 1) from N(0, 1), on the CPU."""
        return torch.randn(n, self.generator.net[0][0].in_channels, 1, 1, generator=rng)

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Noise (B, noise_dim, 1, 1) -> codes (B, 64, 64): generated latents snapped to the nearest embeddings."""
        latents = self.scale.from_tanh(self.generator.eval()(noise.to(self.scale.shift.device)))
        return self.vqvae.vector_quantizer.nearest(latents)

    def sample_images(self, noise: Tensor, size: int = 32) -> Tensor:
        """Noise (B, noise_dim, 1, 1) -> brains (B, 1, 256, 256) in [0, 1], decoded `size` at a time."""
        images = []
        with console.progress(total=len(noise), desc="Decoding", unit=" images", leave=False) as bar:
            for part in noise.split(size):
                images.append(self.vqvae.decode(self.sample(part)).clamp(0, 1))
                bar.update(len(part))
                console.stop_if_signalled()
        return torch.cat(images)

    def calibrate(self, target: float, fitted: LatentScale, noise: Tensor) -> None:
        """Give generated brains the brightness of real ones, by a factor on the scale.

        A discriminator with BatchNorm that sees real and generated latents in separate batches cannot see their
        amplitude, so a generator is free to draw latents that are too weak, which decode to dark brains.

        `target` is the `brightness` of reconstructed real images, `fitted` the scale that the generator was trained
        with, `noise` (B, noise_dim, 1, 1) that of the brains which are compared.
        """
        factor = 1.0
        for _ in range(3):  # brightness is nearly proportional to the factor
            self.scale = fitted.times(factor)
            found = max(brightness(self.sample_images(noise)), 1e-3)
            factor = min(max(factor * target / found, 0.25), 4.0)
        self.scale = fitted.times(factor)

    def checkpoint(self) -> dict:
        """The contents of generator.pth."""
        return {
            "state_dict": files.cpu_state(self.generator),
            "shift": self.scale.shift.cpu(),
            "scale": self.scale.scale.cpu(),
            "codebook": codebook_hash(self.vqvae),
            "phantoms": self.phantoms,
        }

    @classmethod
    def from_checkpoint(cls, contents: dict, vqvae: VQVAE) -> "Prior":
        """The prior of a `checkpoint`, for the VQ-VAE that it belongs to and on its device.

        Raises ValueError if the contents are not a generator's, or belong to another codebook.
        """
        if not isinstance(contents, dict) or not {"state_dict", "shift", "scale", "codebook"} <= contents.keys():
            raise ValueError("it holds no generator (name the generator.pth of a run)")
        if contents["codebook"] != codebook_hash(vqvae):
            raise ValueError("it belongs to another codebook; use the vqvae.pth that it was trained with")
        weight = vqvae.vector_quantizer.embedding.weight
        dim, device = weight.shape[1], weight.device
        generator = Generator(embeddings_dim=dim)
        files.load_state(generator, contents["state_dict"])
        for name, shape in (("shift", (dim,)), ("scale", (dim, dim))):
            value = contents[name]
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                raise ValueError(f"its '{name}' is not {' x '.join(map(str, shape))} numbers")
            if not value.float().isfinite().all():
                raise ValueError(f"its '{name}' has values that are not finite")
        scale = LatentScale(contents["shift"].float(), contents["scale"].float()).to(device)
        return cls(generator.to(device).eval(), scale, vqvae, bool(contents.get("phantoms", False)))


def load_prior(path: str | Path, vqvae: VQVAE) -> Prior:
    """The prior in a generator.pth, on the VQ-VAE's device. Raises UserError if it is none, or not this VQ-VAE's."""
    return files.load(path, partial(Prior.from_checkpoint, vqvae=vqvae))


def brightness(images: Tensor) -> float:
    """Root mean square of images (B, 1, H, W) after averaging over 16x16 pixels, which removes grain."""
    return F.avg_pool2d(images, 16).square().mean().sqrt().item()


def walk(start: Tensor, end: Tensor, n: int) -> Tensor:
    """n noise vectors (n, noise_dim, 1, 1) from one (noise_dim, 1, 1) to another, in equal steps of angle.

    On a straight line they would be shorter half way than any that the generator was trained on (White 2016,
    arXiv 1609.04468).
    """
    device, start, end = start.device, start.cpu().double(), end.cpu().double()  # MPS has no float64
    a, b = start / start.norm(), end / end.norm()
    angle = torch.acos((a * b).sum().clamp(-1, 1))
    steps = torch.linspace(0, 1, n, dtype=torch.double).view(-1, 1, 1, 1)
    from_start, from_end = (torch.sinc(part * angle / torch.pi) * part for part in (1 - steps, steps))
    lengths = (1 - steps) * start.norm() + steps * end.norm()
    return ((from_start * a + from_end * b) / torch.sinc(angle / torch.pi) * lengths).float().to(device)


def codebook_hash(vqvae: VQVAE) -> str:
    """SHA-256 of the codebook's float32 values."""
    values = vqvae.vector_quantizer.embedding.weight.detach().cpu().float().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
