"""The start of the generator from data, before it meets a discriminator."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from modules import NOISE, Generator
from priors.latent_cache import LatentCache
from support import console, seeds
from support.device import FastPath, move

MOST_IMAGES = 10_000  # that the generator is fitted to: their components are computed in memory
SAVE_EVERY = 300  # steps: some minutes on a CPU


def start_generator(
    generator: Generator,
    optimizer: Optimizer,
    latents: LatentCache,
    steps: range,
    batch_size: int,
    fast_path: FastPath,
    seed: int,
) -> Iterator[int]:
    """Fit the generator to a split's coefficients, each from the `principal_scores` of its image as noise.

    Minimises mean squared error with Adam. The scores are distributed somewhat like noise, so the generator begins with
    heads that vary as real ones do. They hardly determine fine detail, which is left to adversarial training.

    Yields the number of steps that are done every SAVE_EVERY steps, so that the caller can save.

    Args:
        generator, optimizer: on the device of the run, in its layout; updated in place.
        latents: the coefficients that it is fitted to.
        steps: those that are left, to the last.
        batch_size: images in a step; one process trains alone.
        fast_path, seed: of the run.
    """
    if not steps:
        return
    rng = seeds.generator(seed, "dcgan start")
    n = min(len(latents), MOST_IMAGES)
    picked = torch.arange(n) * len(latents) // n
    noise = principal_scores(latents, picked, NOISE, rng)
    space = latents.space
    generator.train()
    order = torch.randint(n, (steps.stop, min(batch_size, n)), generator=rng)
    settings = {"total": steps.stop, "initial": steps.start, "unit": " steps", "leave": False}
    with console.progress(desc="Start of the generator", **settings) as bar:
        for step in steps:
            indices = order[step]
            with fast_path.autocast():
                made = space.to_coefficients(generator(move(noise[indices], space.device)[:, :, None, None]))
            optimizer.zero_grad()
            F.mse_loss(made, latents.batch(picked[indices])).backward()
            optimizer.step()
            bar.update(1)
            console.stop_if_signalled()
            if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps.stop:
                yield step + 1


def principal_scores(latents: LatentCache, picked: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Scores of N picked images on their n leading principal components, with a variance of 1: (N, n), on the CPU.

    The components are those of coefficients averaged over 2x2 positions. Where there are fewer, noise takes their
    place.
    """
    x = torch.cat([F.avg_pool2d(latents.batch(part), 2).flatten(1).cpu() for part in picked.split(64)])
    x = x[:, x.abs().amax(0) > 0]
    x = x - x.mean(0)
    wider = min(n + 16, len(x) - 1, x.shape[1])  # the method's last components are inexact
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        u = torch.svd_lowrank(x, wider, niter=4)[0][:, :n] * len(x) ** 0.5
    return torch.cat([u, torch.randn(len(x), n - u.shape[1], generator=rng)], 1)
