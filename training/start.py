"""The start of the generator from data, before it meets a discriminator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules import Generator
from priors.latent_cache import LatentCache
from support import console, files, seeds
from support.device import FastPath, move

MOST_IMAGES = 10_000  # whose components are computed


def start_generator(
    generator: Generator,
    latents: LatentCache,
    n_steps: int,
    batch_size: int,
    lr: float,
    fast_path: FastPath,
    seed: int,
) -> dict[str, Tensor]:
    """Fit the generator to a split's latents, each from the `principal_scores` of its image as noise.

    These scores are distributed somewhat like noise: so the generator begins with heads that vary as real ones do.
    Fine detail is hardly determined by its noise, and is left to adversarial training. Minimises mean squared error
    with Adam.

    Args:
        generator: on the device of the run, in its layout; updated in place.
        latents: the coefficients that it is fitted to.
        n_steps: 0 leaves the generator as it is.
        batch_size: of this process alone.
        lr: of Adam.
        fast_path: of the run.
        seed: of the run.

    Returns the generator's `state_dict`, on the CPU.
    """
    if not n_steps:
        return files.cpu_state(generator)
    rng, n = seeds.generator(seed, "dcgan start"), min(len(latents), MOST_IMAGES)
    picked = torch.tensor([i * len(latents) // n for i in range(n)])
    noise = principal_scores(latents, picked, generator.net[0][0].in_channels, rng)
    optimizer, space = fast_path.adam(generator, lr), latents.space
    generator.train()
    order = torch.randint(n, (n_steps, min(batch_size, n)), generator=rng)
    with console.progress(total=n_steps, desc="Start of the generator", unit=" steps", leave=False) as bar:
        for indices in order:
            with fast_path.autocast():
                made = space.unmixed(generator(move(noise[indices], space.support.device)[:, :, None, None]))
            optimizer.zero_grad()
            F.mse_loss(made.float(), latents.batch(picked[indices])).backward()
            optimizer.step()
            bar.update(1)
            console.stop_if_signalled()
    return files.cpu_state(generator)


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
