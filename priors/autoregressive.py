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

RARE = 1e-3  # share of the training images up to which a position outside the head may differ from the others
AT_ONCE = 32  # images whose logits are held at once: 2 MB each


class Frame(NamedTuple):
    """What surrounds the codes of heads, where codes hardly ever differ.

    Attributes:
        codes: (64, 64) int64, the most frequent code at each position.
        corner, size: row and column of the upper left code that is modelled, and the rows and columns that are.
        rare: probability of another code than the frame's at a position that is not modelled.
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
    usual = codes.mode(0).values
    other = (codes != usual).sum(0)
    varied = other > RARE * len(codes)
    if not varied.any():
        varied[:] = True
    spans = [places.nonzero().flatten().tolist() for places in (varied.any(1), varied.any(0))]
    corner, size = (tuple(each) for each in zip(*((span[0], span[-1] + 1 - span[0]) for span in spans), strict=True))
    frame = Frame(usual.long(), corner, size, 0.0)
    outside = other.sum() - other[frame.box].sum()
    n = len(codes) * (usual.numel() - math.prod(size))
    return frame._replace(rare=(outside.item() + 1) / (n + 2))  # Laplace's rule of succession: never 0


def checked_frame(values: dict, n_codes: int) -> Frame:
    """The frame that a file has. Raises ValueError if it is none for so many codes."""
    frame = Frame(**values)
    numbers = all(type(n) is int for n in (*frame.corner, *frame.size)) and len(frame.corner) == len(frame.size) == 2
    if not numbers or not all(0 <= a and 0 < n and a + n <= 64 for a, n in zip(frame.corner, frame.size, strict=True)):
        raise ValueError("its 'frame' is not within 64 x 64 codes")
    right = isinstance(frame.codes, Tensor) and frame.codes.dtype == torch.long and frame.codes.shape == (64, 64)
    if not right or not ((0 <= frame.codes) & (frame.codes < n_codes)).all() or not 0 < frame.rare < 1:
        raise ValueError("its 'frame' is not one of 64 x 64 codes")
    return frame


class AutoregressivePrior:
    """A distribution over codes (64, 64), of which slices and stacks of slices are drawn.

    Args:
        network: models the codes inside the frame's box.
        frame: what is around it.
        vqvae: decodes codes; on the network's device.
        planes: the numbers of the planes that the network was trained on; none where they were not known.
        phantoms: whether it was trained on phantoms. What is made from its samples says so.
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
                    condition = neighbour_condition(plane, neighbours, torch.stack([below, above], 1))
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
        """The prior of a `checkpoint` of this VQ-VAE, on its device. Raises ValueError for invalid contents."""
        codebook = vqvae.vector_quantizer.embedding.weight.detach()
        frame = checked_frame(contents["frame"], len(codebook))
        state = contents["state_dict"]
        planes, settings = contents["planes"], contents["settings"]
        if not isinstance(planes, list) or not all(type(n) is int and 0 <= n < N_PLANES for n in planes):
            raise ValueError(f"its 'planes' are not numbers from 0 to {N_PLANES - 1}")
        sizes = settings["width"], settings["hidden"], *settings["dilations"]
        if not all(type(n) is int and 0 < n <= 256 for n in sizes) or len(sizes) > 66:
            raise ValueError("its 'settings' are not a network's")
        network = Autoregressive(codebook, frame.size, **settings)
        files.load_state(network, state)
        network.to(vqvae.conv1.weight.device, memory_format=torch.channels_last).eval()
        return cls(network, frame, vqvae, planes, bool(contents["phantoms"]))


def neighbour_condition(plane: Tensor, neighbours: Tensor, distance: Tensor) -> Condition:
    """The condition of slices (B,), neighbours (B, 2, 64, 64) further away than MOST_DISTANCE left out."""
    return Condition(plane, neighbours, distance.where(distance <= MOST_DISTANCE, 0))


def plane_condition(plane: Tensor) -> Condition:
    """The condition of slices of which the plane (B,) alone is known."""
    n = len(plane)
    return Condition(plane, torch.zeros(n, 2, 64, 64, dtype=torch.long), torch.zeros(n, 2, dtype=torch.long))


def halving(planes: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """An order of planes, ascending numbers, in which errors do not add up: the middle one, then those half-way.

    Returns:
        Steps. Each has planes with the distances to the nearest ones below and above that come in earlier steps, 0
        where there is none.
    """
    steps = []
    spans = [(0, len(planes))] if planes else []
    while spans:
        step, halves = [], []
        for first, end in spans:
            middle = (first + end) // 2
            below = planes[middle] - planes[first - 1] if first > 0 else 0
            above = planes[end] - planes[middle] if end < len(planes) else 0
            step.append((planes[middle], below, above))
            halves += [(first, middle), (middle + 1, end)]
        steps.append(step)
        spans = [(first, end) for first, end in halves if first < end]
    return steps


def halving_distances(cache: CodeCache) -> Tensor:
    """For each slice of a split, how far its neighbours below and above in the order of `halving` are: (N, 2)."""
    distance = torch.zeros(len(cache), 2, dtype=torch.long)
    for slices in cache.heads.values():
        for plane, below, above in (each for step in halving(sorted(slices)) for each in step):
            distance[slices[plane]] = torch.tensor([below, above])
    return distance.where(distance <= MOST_DISTANCE, 0)


def likelihoods(prior: AutoregressivePrior, cache: CodeCache, indices: Tensor) -> dict[str, Tensor]:
    """Bits of slices (N,) of a split, by what they are told: (N,) each.

    "alone" is their plane; "given neighbours" those too that come before them in the order of `halving`.
    """
    by_condition = {}
    for name, distance in (
        ("alone", torch.zeros(len(cache), 2).long()),
        ("given neighbours", halving_distances(cache)),
    ):
        bits = []
        for part in console.in_parts(indices, AT_ONCE, "Likelihood"):
            condition = cache.condition(part, distance[part])
            bits.append(prior.bits(cache.batch(part), condition).sum((1, 2)).cpu())
        by_condition[name] = torch.cat(bits)
    return by_condition
