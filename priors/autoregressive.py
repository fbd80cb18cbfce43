"""The prior over codes: samples of planes and of stacks, how likely codes are, and the file autoregressive.pth."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modules import MOST_DISTANCE, N_PLANES, VQVAE, Autoregressive, Condition
from priors.code_cache import CodeCache
from support import console, files
from support.device import move, one_thread

RARE = 1e-3  # where at most this share of the training images has another code than the most frequent, there is no head
AT_ONCE = 32  # images in a batch


class Frame(NamedTuple):
    """The codes around the box that holds all heads. There, images hardly ever differ.

    Attributes:
        codes: (64, 64) int64, the most frequent code at each position.
        corner, size: row and column of the box's upper left code, and its numbers of rows and columns.
        rare: probability that a code outside the box is not the frame's.
    """

    codes: Tensor
    corner: tuple[int, int]
    size: tuple[int, int]
    rare: float

    @property
    def box(self) -> tuple[slice, slice]:
        """The rows and columns that are modelled."""
        return tuple(slice(start, start + size) for start, size in zip(self.corner, self.size, strict=True))


def fit_frame(codes: Tensor) -> Frame:
    """The frame of training codes (N, 64, 64): around all positions where more than RARE of the images differ."""
    most_frequent = codes.mode(0).values
    n_different = (codes != most_frequent).sum(0)
    varies = n_different > RARE * len(codes)
    if not varies.any():
        varies[:] = True
    rows, columns = (varies.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    corner = rows[0], columns[0]
    size = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    frame = Frame(most_frequent.long(), corner, size, 0.0)
    n_rare = n_different.sum() - n_different[frame.box].sum()
    n = len(codes) * (most_frequent.numel() - math.prod(size))
    return frame._replace(rare=(n_rare.item() + 1) / (n + 2))  # Laplace's rule of succession: never 0


class AutoregressivePrior:
    """A distribution over codes (64, 64), from which slices and stacks of slices are sampled.

    Args:
        network: models the codes inside the frame's box.
        frame: what is around it.
        vqvae: decodes codes; on the network's device.
        planes: the numbers of the planes that the network was trained on; empty if file names had none.
        phantoms: whether it was trained on phantoms. Figures of its samples say so.
    """

    def __init__(
        self, network: Autoregressive, frame: Frame, vqvae: VQVAE, planes: Sequence[int], phantoms: bool = False
    ):
        self.network = network
        self.frame = frame
        self.vqvae = vqvae
        self.planes = planes
        self.phantoms = phantoms

    @property
    def device(self) -> torch.device:
        return self.vqvae.conv1.weight.device

    def noise(self, n: int, rng: torch.Generator) -> Tensor:
        """The noise of n images (n, 64, 64), uniform in [0, 1), on the CPU."""
        return torch.rand(n, *self.frame.codes.shape, generator=rng)

    @torch.no_grad()
    @one_thread()
    def sample(self, noise: Tensor, condition: Condition) -> Tensor:
        """Noise (B, 64, 64) -> codes (B, 64, 64) of slices with a condition."""
        inside = self.network.eval().sample(move(noise, self.device)[:, *self.frame.box], self._cut(condition))
        codes = self.frame.codes.to(self.device).repeat(len(noise), 1, 1)
        codes[:, *self.frame.box] = inside
        return codes

    def sample_images(self, noise: Tensor, plane: int | None = None) -> Tensor:
        """Noise (B, 64, 64) -> slices (B, 1, 256, 256) in [0, 1] of one plane, or of all its planes in turn."""
        planes = self.planes if plane is None else [plane]
        planes = torch.tensor([planes[i % len(planes)] if planes else N_PLANES for i in range(len(noise))])
        parts = console.in_parts(torch.arange(len(noise)), AT_ONCE, "Sampling")
        return torch.cat([self.decode(self.sample(noise[part], plane_condition(planes[part]))) for part in parts])

    def sample_stacks(self, noise: Tensor, planes: Sequence[int]) -> Tensor:
        """Noise (B, S, 64, 64) -> codes (B, S, 64, 64) of S planes of B heads, drawn in the order of `halving`."""
        codes = torch.zeros(noise.shape, dtype=torch.long)
        index = {plane: i for i, plane in enumerate(planes)}
        with console.progress(total=len(noise) * len(planes), desc="Sampling", unit=" images", leave=False) as bar:
            for step in halving(planes):
                planned = torch.tensor([(head, *each) for head in range(len(noise)) for each in step])
                for head, plane, below, above in (part.T for part in planned.split(AT_ONCE)):
                    at, under, over = (
                        torch.tensor([index[number] for number in numbers.tolist()])
                        for numbers in (plane, plane - below, plane + above)
                    )
                    neighbours = torch.stack([codes[head, under], codes[head, over]], 1)
                    condition = Condition(plane, neighbours, torch.stack([below, above], 1))
                    codes[head, at] = self.sample(noise[head, at], condition).cpu()
                    bar.update(len(head))
                    console.stop_if_signalled()
        return codes

    @torch.no_grad()
    def bits(self, codes: Tensor, condition: Condition) -> Tensor:
        """The information -log2 p of each of codes (B, 64, 64) int64, exact: (B, 64, 64) in bits."""
        codes = move(codes, self.device)
        frame = self.frame.codes.to(self.device)
        other = self.frame.rare / max(1, self.network.n_codes - 1)
        bits = -torch.where(codes == frame, 1 - self.frame.rare, other).log2()
        bits[:, *self.frame.box] = self.network.eval()(codes[:, *self.frame.box], self._cut(condition))
        return bits

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, 64, 64) -> slices (B, 1, 256, 256) in [0, 1]."""
        return self.vqvae.decode(codes).clamp(0, 1)

    def _cut(self, condition: Condition) -> Condition:
        """The part of a condition inside the frame's box, on the device."""
        neighbours = condition.neighbours[:, :, *self.frame.box]
        return Condition(*(move(part, self.device) for part in condition._replace(neighbours=neighbours)))

    def checkpoint(self) -> dict:
        """The contents of autoregressive.pth."""
        return {
            "kind": "autoregressive",
            "version": files.VERSION,
            "state_dict": files.cpu_state(self.network),
            "settings": self.network.settings,
            "frame": self.frame._replace(codes=self.frame.codes.cpu())._asdict(),
            "planes": list(self.planes),
            "codebook": files.digest(self.vqvae.vector_quantizer.embedding.weight),
            "phantoms": self.phantoms,
        }

    @classmethod
    def from_checkpoint(cls, contents: dict, vqvae: VQVAE) -> "AutoregressivePrior":
        """The prior of a `checkpoint` of this VQ-VAE, on its device. Other contents raise an error of some kind."""
        codebook = vqvae.vector_quantizer.embedding.weight.detach()
        frame = Frame(**contents["frame"])
        network = Autoregressive(codebook, frame.size, **contents["settings"])
        files.load_state(network, contents["state_dict"])
        network.to(vqvae.conv1.weight.device, memory_format=torch.channels_last).eval()
        return cls(network, frame, vqvae, contents["planes"], contents["phantoms"])


def plane_condition(plane: Tensor) -> Condition:
    """The condition of slices of which the plane (B,) alone is known."""
    n = len(plane)
    return Condition(plane, torch.zeros(n, 2, 64, 64, dtype=torch.long), torch.zeros(n, 2, dtype=torch.long))


def halving(planes: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """An order in which to sample planes (ascending numbers): the middle one, then the middle of each half, and so on.

    Errors add up over few steps only.

    Returns:
        For each step a list of (plane, below, above): the distances to the nearest planes below and above that were
        sampled in earlier steps, 0 where there is none within MOST_DISTANCE.
    """
    steps = []
    spans = [(0, len(planes))] if planes else []
    while spans:
        step, halves = [], []
        for first, end in spans:
            middle = (first + end) // 2
            below = planes[middle] - planes[first - 1] if first > 0 else 0
            above = planes[end] - planes[middle] if end < len(planes) else 0
            step.append((planes[middle], *(d if d <= MOST_DISTANCE else 0 for d in (below, above))))
            halves += [(first, middle), (middle + 1, end)]
        steps.append(step)
        spans = [(first, end) for first, end in halves if first < end]
    return steps


def halving_distances(cache: CodeCache) -> Tensor:
    """For each slice of a split, how far its neighbours below and above in the order of `halving` are: (N, 2)."""
    distance = torch.zeros(len(cache), 2, dtype=torch.long)
    for slices in cache.heads.values():
        for step in halving(sorted(slices)):
            for plane, below, above in step:
                distance[slices[plane]] = torch.tensor([below, above])
    return distance


def likelihoods(prior: AutoregressivePrior, cache: CodeCache, indices: Tensor) -> dict[str, Tensor]:
    """Bits of slices (N,) of a split under two conditions: (N,) each.

    "alone": given their plane. "given neighbours": also given the slices that come before them in `halving`.
    """
    by_condition = {}
    none = torch.zeros(len(cache), 2, dtype=torch.long)
    for name, distance in {"alone": none, "given neighbours": halving_distances(cache)}.items():
        bits = []
        for part in console.in_parts(indices, AT_ONCE, "Likelihood"):
            condition = cache.condition(part, distance[part])
            bits.append(prior.bits(cache.batch(part), condition).sum((1, 2)).cpu())
        by_condition[name] = torch.cat(bits)
    return by_condition
