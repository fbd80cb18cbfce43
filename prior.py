"""What lies between the VQ-VAE and the DCGAN: latents to tanh's range and back, snapping to codes, sampling.

The generator ends in tanh, so its range is [-1, 1]; latents have a range of their own. `LatentScale` is the fixed map
between the two, fitted on the training split and kept in generator.pth.
"""

import hashlib
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import hardware
from modules import VQVAE, Generator, load_checked, plain_state, rows

# The foreground's root mean square in tanh's range: about 0.5 % of values are clipped. More clips more; less squeezes
# the anatomy towards the background's zero.
RMS = 0.4
FIT_IMAGES = 128  # spaced evenly over the split, that a scale is fitted on


class LatentScale(NamedTuple):
    """Latents z <-> tanh's range: t = clip(scale⁻¹ (z - shift), -1, 1) at each position, and z = scale t + shift.

    Attributes:
        shift: (D,), what maps to 0.
        scale: (D, D), invertible.
    """

    shift: Tensor
    scale: Tensor

    def to_tanh(self, z: Tensor) -> Tensor:
        """Latents (B, D, H, W) -> (B, D, H, W) in [-1, 1]."""
        inverse = torch.linalg.inv(self.scale.cpu().double()).to(self.scale)
        return _mix(inverse, z - self.shift[:, None, None]).clamp(-1, 1)

    def from_tanh(self, t: Tensor) -> Tensor:
        """(B, D, H, W) in [-1, 1] -> latents (B, D, H, W)."""
        return _mix(self.scale, t) + self.shift[:, None, None]

    @classmethod
    def of_codebook(cls, vqvae: VQVAE) -> "LatentScale":
        """All embeddings in [-1, 1], by one factor."""
        weight = vqvae.vector_quantizer.embedding.weight.detach()
        return cls(torch.zeros_like(weight[0]), torch.eye(weight.shape[1]).to(weight) * weight.abs().max())

    @classmethod
    @torch.no_grad()
    def fit(cls, vqvae: VQVAE, dataset: Dataset) -> "LatentScale":
        """The background's embedding at 0, one factor, and a rotation that gives every channel the same share.

        Deviations d from the background's embedding, at positions of other codes, have 95 % of their variance in one
        direction, the grey level, and in most of 64 less than quantization changes. Were each channel divided by its
        own root mean square, weak channels would be raised, up to 15 times, and with them what no code expresses: the
        discriminator tells real latents by that. A rotation and one factor keep distances as the codebook measures
        them. With E[d dᵀ] = U diag(λ) Uᵀ, λ falling, the rotation is Cᵀ Uᵀ, C being the cosine transform: its first
        function is constant and so spreads the first direction evenly over all channels.

        Args:
            vqvae: the trained network, on the device of the data set's batches.
            dataset: an `OasisDataset`.
        """
        quantizer, n = vqvae.vector_quantizer, min(FIT_IMAGES, len(dataset))
        picked = [i * len(dataset) // n for i in range(n)]
        z = torch.cat([vqvae.latents(dataset.__getitems__(picked[i : i + 32])) for i in range(0, n, 32)])
        codes, z = quantizer.nearest(z).flatten().cpu(), rows(z).cpu()
        embeddings = quantizer.embedding.weight.detach().cpu()
        background = codes.mode().values
        others = codes != background
        if not others.any():
            others[:] = True
        deviation = (z[others] - embeddings[background]).double()
        second = deviation.T @ deviation / len(deviation)
        k = torch.arange(len(second), dtype=torch.double)
        cosines = torch.cos(torch.pi * (k[:, None] + 0.5) * k / len(k)) * (2 / len(k)) ** 0.5
        cosines[:, 0] /= 2**0.5
        rotation = cosines @ torch.linalg.eigh(second).eigenvectors.flip(1).T
        factor = second.trace().div(len(k)).sqrt().clamp(min=1e-6) / RMS
        to = dict(dtype=torch.float32, device=quantizer.embedding.weight.device)
        return cls(embeddings[background].to(**to), (rotation.T * factor).to(**to))


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix (D, D) times the vector at each position of x (B, D, H, W)."""
    return torch.einsum("ij,bjhw->bihw", matrix, x)


class Latents(Dataset):
    """A split's latents, mapped to tanh's range: what the DCGAN learns to draw.

    Encoded once and kept in half precision (512 kB an image) where that fits in half of the free memory, on the device
    or else beside it; else each batch is encoded when it is asked for.

    Args:
        vqvae: the trained network, on the device of the data set's batches.
        dataset: an `OasisDataset`.
        scale: the map, on the same device.
        quantized: whether latents are the embeddings of an image's codes, or the encoder's outputs z_e.
        progress: called as tqdm is.
        stored: whether the latents are kept; decided by the free memory if None.

    Attributes:
        stored: whether the latents are kept.
    """

    def __init__(self, vqvae: VQVAE, dataset: Dataset, scale: LatentScale, quantized=False, progress=tqdm, stored=None):
        self.vqvae, self.dataset = vqvae.eval().to(memory_format=torch.channels_last), dataset
        self.scale, self.quantized = scale, quantized
        size = (len(dataset), 64, 64, len(scale.shift))
        n_bytes = 2 * math.prod(size)
        device, host = scale.shift.device, torch.device("cpu")
        self.stored = hardware.fits(n_bytes, device) or hardware.fits(n_bytes, host) if stored is None else stored
        if not self.stored:
            return
        self.kept = torch.empty(size, dtype=torch.half, device=device if hardware.fits(n_bytes, device) else host)
        with progress(total=len(dataset), desc="Encoding", unit=" images") as bar:
            for start in range(0, len(dataset), 32):
                part = self._encode(range(start, min(start + 32, len(dataset))))
                self.kept[start : start + len(part)] = part.permute(0, 2, 3, 1)
                bar.update(len(part))

    @torch.no_grad()
    def _encode(self, indices) -> Tensor:
        """(B, D, 64, 64) half, in [-1, 1]."""
        z = self.vqvae.latents(self.dataset.__getitems__(indices))
        if self.quantized:
            z = self.vqvae.vector_quantizer.look_up(self.vqvae.vector_quantizer.nearest(z))
        return self.scale.to_tanh(z).half()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Tensor:
        """(B, D, 64, 64) float32 in [-1, 1]."""
        if not self.stored:
            return self._encode(indices).float()
        kept = self.kept[torch.as_tensor(indices).to(self.kept.device, non_blocking=True)]
        return kept.to(self.scale.shift.device, non_blocking=True).permute(0, 3, 1, 2).float()


class Prior:
    """A generator and what turns its output into brains: the scale of latents and the VQ-VAE they belong to.

    Args:
        generator, scale, vqvae: on one device.
        phantoms: whether it was trained on phantoms, which figures of its samples have to say.
    """

    def __init__(self, generator: Generator, scale: LatentScale, vqvae: VQVAE, phantoms: bool = False):
        self.generator, self.scale, self.vqvae, self.phantoms = generator, scale, vqvae, phantoms

    @property
    def noise_dim(self) -> int:
        return self.generator.net[0][0].in_channels

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Noise (B, noise_dim, 1, 1) -> codes (B, 64, 64): generated latents snapped to the nearest embeddings."""
        latents = self.scale.from_tanh(self.generator.eval()(noise))
        return self.vqvae.vector_quantizer.nearest(latents)

    def sample_images(self, noise: Tensor, at_once: int = 32, progress=tqdm) -> Tensor:
        """Noise (B, noise_dim, 1, 1) -> brains (B, 1, 256, 256) in [0, 1]."""
        images = []
        with progress(total=len(noise), desc="Decoding", unit=" images", leave=False) as bar:
            for part in noise.split(at_once):
                images.append(self.vqvae.decode(self.sample(part)).clamp(0, 1))
                bar.update(len(part))
        return torch.cat(images)

    def calibrate(self, brightness: float, fitted: LatentScale, noise: Tensor) -> None:
        """Give generated brains the brightness of real ones, by a factor on the scale.

        A discriminator with BatchNorm, that sees real and generated latents in batches of their own, cannot see their
        amplitude: its first layer has no bias, the background is 0, and what it gives is divided by the batch's
        standard deviation. So a generator is free to draw latents that are too weak, which decode to dark brains.

        Args:
            brightness: `brightness_of` reconstructed real images.
            fitted: the scale that the generator was trained with.
            noise: (B, noise_dim, 1, 1), of the brains that are looked at.
        """
        factor = 1.0
        for _ in range(3):  # brightness is nearly proportional to the factor
            self.scale = fitted._replace(scale=fitted.scale * factor)
            found = max(brightness_of(self.sample_images(noise, progress=partial(tqdm, disable=True))), 1e-3)
            factor = min(max(factor * brightness / found, 0.25), 4.0)
        self.scale = fitted._replace(scale=fitted.scale * factor)

    def checkpoint(self) -> dict:
        """The contents of generator.pth."""
        return {
            "state_dict": plain_state(self.generator),
            "shift": self.scale.shift.cpu(),
            "scale": self.scale.scale.cpu(),
            "codebook": codebook_hash(self.vqvae),
            "phantoms": self.phantoms,
        }

    @classmethod
    def from_checkpoint(cls, contents: dict, vqvae: VQVAE) -> "Prior":
        """What `checkpoint` gave, for the VQ-VAE that it belongs to and on that one's device.

        Raises:
            ValueError: the contents are no generator's, or belong to another codebook.
        """
        if not isinstance(contents, dict) or not {"state_dict", "shift", "scale", "codebook"} <= contents.keys():
            raise ValueError("it holds no generator (name the generator.pth of a run)")
        if contents["codebook"] != codebook_hash(vqvae):
            raise ValueError("it belongs to another codebook; use the vqvae.pth that it was trained with")
        weight = vqvae.vector_quantizer.embedding.weight
        generator = Generator(embeddings_dim=weight.shape[1])
        load_checked(generator, contents["state_dict"])
        shift, scale = (contents[name] for name in LatentScale._fields)
        if isinstance(scale, Tensor) and scale.ndim == 1:  # a factor for each channel, as older files have it
            scale = scale.diag()
        dim = weight.shape[1]
        for name, value, shape in (("shift", shift, (dim,)), ("scale", scale, (dim, dim))):
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                raise ValueError(f"its '{name}' is not {' x '.join(map(str, shape))} numbers")
            if not value.float().isfinite().all():
                raise ValueError(f"its '{name}' has values that are not finite")
        scale = LatentScale(shift.float().to(weight.device), scale.float().to(weight.device))
        return cls(generator.to(weight.device).eval(), scale, vqvae, bool(contents.get("phantoms", False)))


def brightness_of(images: Tensor) -> float:
    """Root mean square of images (B, 1, H, W) after means over 16x16 pixels, which grain does not survive."""
    return F.avg_pool2d(images, 16).square().mean().sqrt().item()


def walk(start: Tensor, end: Tensor, n: int) -> Tensor:
    """n noise vectors (n, noise_dim, 1, 1) from one (noise_dim, 1, 1) to another, in equal steps of angle.

    On a straight line they would be shorter half way than any the generator was trained on (White 2016,
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
