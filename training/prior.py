"""The priors, which sample codes: the DCGAN's generator and the flow; and their files, generator.pth and flow.pth."""

import copy
import math
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from modules import VQVAE, Generator, UNet
from priors import autoregressive
from priors.autoregressive import AutoregressivePrior
from priors.checkpoints import codebook_hash
from support import console, files
from support.console import UserError
from support.device import move
from training.scale import N_RINGS, LatentScale, checked, covariance_spectrum, multiply_spectrum

LARGEST_FACTOR = 2.0  # by which calibration changes an amplitude
STEPS, FINER = 20, 1.5  # of the flow's solver (docs/results.md)
STEP_COUNT = console.Number(int, 1, "a whole number from 1 to 1000", below=1001)  # far above, times coincide
GUIDE_WIDTHS, GUIDANCE = (24, 32, 40, 40), 0.5  # of the U-Net that guides it


class Prior:
    """A network that makes coefficients of noise, and what turns these into brains: their scale and the VQ-VAE.

    All are on one device. What is made from samples of a prior trained on phantoms says so. A subclass has
    `noise_shape` and `coefficients`.
    """

    kind: str  # in its file

    def __init__(
        self,
        network: nn.Module,
        scale: LatentScale,
        vqvae: VQVAE,
        phantoms: bool = False,
        gain: Tensor | None = None,  # (R, K, K), what multiplies coefficients at each ring of frequencies
    ):
        self.network, self.scale, self.vqvae, self.phantoms, self.gain = network, scale, vqvae, phantoms, gain

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks, by their key in the prior's file."""
        return {"state_dict": self.network}

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """The noise of one image is (C, H, W)."""
        raise NotImplementedError

    def coefficients(self, noise: Tensor) -> Tensor:
        """Noise (B, *noise_shape), on the network's device -> coefficients (B, K, 64, 64), not calibrated."""
        raise NotImplementedError

    def noise(self, n: int, rng: torch.Generator) -> Tensor:
        """The noise of n images (n, *noise_shape) from N(0, 1), on the CPU."""
        return torch.randn(n, *self.noise_shape, generator=rng)

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Noise (B, *noise_shape) -> codes (B, 64, 64): generated latents snapped to the nearest embeddings."""
        c = self.coefficients(noise.to(self.scale.support.device))
        if self.gain is not None:
            c = multiply_spectrum(c, self.gain)
        return self.vqvae.vector_quantizer.nearest(self.scale.latents(c))

    def sample_images(self, noise: Tensor, size: int = 32) -> Tensor:
        """Noise (B, *noise_shape) -> brains (B, 1, 256, 256) in [0, 1], made `size` at a time."""
        images = []
        few = len(noise) <= size
        with console.progress(total=len(noise), desc="Sampling", unit=" images", leave=False, disable=few) as bar:
            for part in noise.split(size):
                images.append(self.vqvae.decode(self.sample(part)).clamp(0, 1))
                bar.update(len(part))
                console.stop_if_signalled()
        return torch.cat(images)

    @torch.no_grad()
    def calibrated(self, real: Tensor, noise: Tensor) -> "Prior":
        """A prior whose coefficients have the covariance about 0 of real ones, at each radial frequency.

        A discriminator with BatchNorm hardly sees amplitudes, and a mean squared error favours small ones, so
        coefficients may be too weak.

        Args:
            real: `covariance_spectrum` of real coefficients.
            noise: (B, *noise_shape), on the CPU, of the samples that are compared.
        """
        device = self.scale.support.device
        generated = torch.cat([self.coefficients(move(part, device)) for part in noise.split(32)])
        prior = copy.copy(self)
        prior.gain = transport(covariance_spectrum(generated), real)
        return prior

    def checkpoint(self) -> dict:
        """The contents of the prior's file."""
        contents = {
            "kind": self.kind,
            **{key: files.cpu_state(network) for key, network in self.networks.items()},
            **self.scale.to("cpu").tensors(),
            "codebook": codebook_hash(self.vqvae),
            "phantoms": self.phantoms,
        }
        return contents if self.gain is None else contents | {"gain": self.gain.cpu()}

    @classmethod
    def untrained(cls, contents: dict, *words) -> "Prior":
        """A prior with a network of the size that a `checkpoint` has. `words` are the arguments after the network.

        Raises ValueError if the contents do not say the size.
        """
        raise NotImplementedError


class DCGANPrior(Prior):
    """The DCGAN's generator. Its noise vectors are (128, 1, 1)."""

    kind = "dcgan"

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        return self.network.net[0][0].in_channels, 1, 1

    def coefficients(self, noise: Tensor) -> Tensor:
        return self.scale.generated(self.network.eval()(noise))

    def measure_statistics(self, noise: Tensor) -> None:
        """Set the statistics of the generator's BatchNorm to those that its weights have for noise (on the CPU).

        An average of the statistics of past weights is not that of averaged weights.
        """
        update_bn([part.to(self.scale.support.device) for part in noise.split(32)], self.network)

    @classmethod
    def untrained(cls, contents: dict, *words) -> "DCGANPrior":
        scale = words[0]
        return cls(Generator(embeddings_dim=len(scale.shift)), *words)


class FlowPrior(Prior):
    """The flow from noise (4K, 32, 32) to coefficients, 2x2 positions as channels, times `factor`.

    It solves dx/dt = v(x, t) from t = 0 to 1 (arXiv 2210.02747, eq. 1) in `steps` steps: the first is Heun's, the
    others are those of the two-step Adams-Bashforth method, which reuses the slope of the step before (Hairer, Nørsett
    and Wanner 1993, section III.5). They get finer towards the end: t = 1 - (1 - s)^FINER, in equal steps of s.

    A smaller network of the same training, the guide, is expected to make the same faults, but greater ones. So samples
    lead away from it: they follow v + guidance (v - v_guide) (autoguidance, arXiv 2406.02507, section 4).
    """

    kind, guidance = "flow", GUIDANCE

    def __init__(self, network: UNet, guide: UNet, factor: float, *words, steps: int = STEPS, **settings):
        super().__init__(network, *words, **settings)
        self.guide, self.factor, self.steps, self.autocast = guide, factor, steps, nullcontext

    @property
    def networks(self) -> dict[str, nn.Module]:
        return super().networks | {"guide": self.guide}

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        h, w = self.scale.support.shape
        return 4 * len(self.scale.scale), h // 2, w // 2

    def packed(self, c: Tensor) -> Tensor:
        """Coefficients (B, K, 64, 64) -> what the network learns, (B, 4K, 32, 32)."""
        return F.pixel_unshuffle(c * self.factor, 2).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def coefficients(self, noise: Tensor) -> Tensor:
        for network in self.networks.values():
            network.eval()
        x = noise.contiguous(memory_format=torch.channels_last)
        times = (1 - (1 - torch.linspace(0, 1, self.steps + 1)) ** FINER).tolist()
        before = None  # the time and the slope of the step before
        for t, later in pairwise(times):
            step, slope = later - t, self.velocity(x, t)
            if before:
                rate = (slope - before[1]) / (t - before[0])
            else:
                rate = (self.velocity(x + step * slope, later) - slope) / step
            x = x + step * (slope + step / 2 * rate)
            before = t, slope
            console.stop_if_signalled()
        return F.pixel_shuffle(x, 2) / self.factor * self.scale.support

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """That of samples x at one time, guided: (B, 4K, 32, 32) float32."""
        words = x, x.new_full((len(x),), t)
        with self.autocast():
            v = self.network(*words).float()
            return v + self.guidance * (v - self.guide(*words).float())

    def checkpoint(self) -> dict:
        contents = super().checkpoint() | {"factor": self.factor}
        weights = {key: {name: value.half() for name, value in contents[key].items()} for key in self.networks}
        return contents | weights | {"shift": contents["shift"].half()}

    @classmethod
    def untrained(cls, contents: dict, *words) -> "FlowPrior":
        scale, factor = words[0], contents["factor"]
        if "guide" not in contents:
            raise ValueError("it is a flow without a guide, of an earlier version; train it anew")
        if not isinstance(factor, float) or not 0 < factor < math.inf:
            raise ValueError("its 'factor' is not a positive number")
        channels = 4 * len(scale.scale)
        return cls(UNet(channels), UNet(channels, GUIDE_WIDTHS), factor, *words)


KINDS = {kind.kind: kind for kind in (DCGANPrior, FlowPrior)}


def load_prior(path: str | Path, vqvae: VQVAE) -> Prior | AutoregressivePrior:
    """The prior in a generator.pth, flow.pth or autoregressive.pth, on the VQ-VAE's device.

    Raises UserError if the file holds none, or not one for this VQ-VAE.
    """
    return files.load(path, partial(prior_of, vqvae=vqvae))


def load_autoregressive(path: str | Path, vqvae: VQVAE) -> AutoregressivePrior:
    """As `load_prior`, of an autoregressive.pth. Raises UserError if the file holds another prior, too."""
    prior = load_prior(path, vqvae)
    if not isinstance(prior, AutoregressivePrior):
        raise UserError(f"{path}: is no autoregressive prior")
    return prior


def prior_of(contents: dict, vqvae: VQVAE) -> Prior | AutoregressivePrior:
    """The prior of a `checkpoint`, on the VQ-VAE's device. Raises ValueError if it is none, or not this VQ-VAE's."""
    if isinstance(contents, dict) and contents.get("kind") == "autoregressive":
        return autoregressive.prior_of(contents, vqvae)
    needed = {"state_dict", "codebook"} | {field.name for field in fields(LatentScale)}
    if not isinstance(contents, dict) or contents.get("kind") not in KINDS or not needed <= contents.keys():
        raise ValueError("it holds no prior of this version (name a generator.pth, flow.pth or autoregressive.pth)")
    if contents["codebook"] != codebook_hash(vqvae):
        raise ValueError("it belongs to another codebook; use the vqvae.pth that it was trained with")
    weight = vqvae.vector_quantizer.embedding.weight
    scale = LatentScale.from_tensors(contents, weight.shape[1]).to(weight.device)
    prior = KINDS[contents["kind"]].untrained(contents, scale, vqvae, bool(contents.get("phantoms", False)))
    for key, network in prior.networks.items():
        files.load_state(network, contents[key])
    if "gain" in contents:
        n = len(scale.scale)
        prior.gain = checked(contents["gain"], "gain", (N_RINGS, n, n)).to(weight.device)
    for network in (*prior.networks.values(), vqvae):  # as in training, for the same digits
        network.to(weight.device, memory_format=torch.channels_last).eval()
    return prior


def transport(generated: Tensor, real: Tensor) -> Tensor:
    """The symmetric matrices T (R, K, K) with T A T = B, for covariances A and B (R, K, K) about 0.

    Of all linear maps from the one to the other they change values least, in mean square (Peyré and Cuturi 2019, arXiv
    1803.00567, remark 2.31). Eigenvalues beyond 1 / LARGEST_FACTOR and LARGEST_FACTOR are cut to these.
    """
    least = 1e-9 * torch.eye(generated.shape[-1], dtype=torch.double)  # what is 0 on both sides is kept
    a, b = (each.cpu().double() + least for each in (generated, real))  # MPS has no float64
    root, inverse = _power(a, 0.5), _power(a, -0.5)
    values, vectors = torch.linalg.eigh(inverse @ _power(root @ b @ root, 0.5) @ inverse)
    values = values.clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return (vectors * values[:, None] @ vectors.mT).float().to(generated.device)


def _power(a: Tensor, exponent: float) -> Tensor:
    """Of symmetric matrices (R, K, K) with positive eigenvalues."""
    values, vectors = torch.linalg.eigh(a)
    return vectors * values.clamp(min=1e-30).pow(exponent)[:, None] @ vectors.mT  # rounding may make them negative


def walk(start: Tensor, end: Tensor, n: int) -> Tensor:
    """n noises (n, C, H, W) from one (C, H, W) to another, in equal steps of angle.

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
