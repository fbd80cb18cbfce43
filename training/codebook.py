"""How the embeddings of the codebook are kept in use: the three methods of `--codebook`.

A method acts in each step before embeddings are looked up, on the latents of the batch at hand. The loss and its
optimizer move the embeddings as well (eq. 3 of arXiv 1711.00937), except with `ema`. What a method remembers from step
to step is in its `state_dict`, which the run's resume file holds; none of it is in the network.
"""

import torch
from torch import Tensor

from modules import VectorQuantizer, rows
from support import distributed
from support.device import move
from training.recipes import VQVAE as RECIPE


class LossOnly:
    """arXiv 1711.00937 and nothing else: a random start, uniform in ±1/n_embeddings, and the loss's codebook term.

    Most codes are never chosen, and a code that is not chosen does not move. This is also the interface of the other
    methods, which move the embeddings of `quantizer` in place; `optimizer` is the Adam that trains them.
    """

    def __init__(self, quantizer: VectorQuantizer, optimizer: torch.optim.Adam):
        self.quantizer = quantizer
        self.optimizer = optimizer

    @property
    def embeddings(self) -> Tensor:
        """(n_embeddings, D), to be read and written without a gradient."""
        return self.quantizer.embedding.weight.detach()

    def before_lookup(self, step: int, z_e: Tensor, n: int, rng: torch.Generator) -> None:
        """Move embeddings in step 0, 1, … of the run, before the step's latents are quantized.

        z_e (B, D, 64, 64) float32 are the latents of this process's part of a batch of n images. `rng` is on the CPU,
        so that every process draws the same numbers.
        """

    def after_step(self, codes: Tensor) -> None:
        """Count the codes, of any shape, of this process's part of the batch."""

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs; called on all ranks, and the same on all."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`."""


class KMeans(LossOnly):
    """Start from data, then keep every code in use: the default.

    In the first `kmeans_steps` steps, a k-means step on each batch keeps embeddings where the latents are. Later, every
    `revive_every` steps, embeddings that no latent chose move to where the quantization error is large, and their Adam
    moments are set to 0.
    """

    def __init__(self, quantizer: VectorQuantizer, optimizer: torch.optim.Adam):
        super().__init__(quantizer, optimizer)
        self.usage = torch.zeros(len(self.embeddings), dtype=torch.int64, device=self.embeddings.device)

    def before_lookup(self, step: int, z_e: Tensor, n: int, rng: torch.Generator) -> None:
        if step < RECIPE.kmeans_steps:
            z_e = distributed.gather(z_e, n)
            if step == 0:
                start_from(self.quantizer, z_e, rng)
            for _ in range(RECIPE.start_steps if step == 0 else 1):
                k_means_step(self.quantizer, z_e, rng)
            distributed.copy_first(self.embeddings)
        elif step % RECIPE.revive_every == 0:
            dead = distributed.total(self.usage) == 0
            if dead.any():
                self.revive(dead, distributed.gather(z_e, n), rng)
            self.usage.zero_()

    def revive(self, dead: Tensor, z_e: Tensor, rng: torch.Generator) -> None:
        """Move the embeddings marked in `dead` (n_embeddings,) bool onto latents z_e (B, D, H, W)."""
        move_dead(self.quantizer, dead, z_e, rng)
        distributed.copy_first(self.embeddings)
        moments = self.optimizer.state[self.quantizer.embedding.weight]
        for moment in (moments["exp_avg"], moments["exp_avg_sq"]):
            moment.masked_fill_(dead[:, None], 0)

    def after_step(self, codes: Tensor) -> None:
        self.usage += _count(codes.flatten(), len(self.usage))

    def state_dict(self) -> dict[str, Tensor]:
        return {"usage": distributed.total(self.usage).cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.usage.copy_(state["usage"] if distributed.is_first() else 0)  # it is a sum over processes


class EMA(LossOnly):
    """Each embedding is an exponential moving average of the latents that chose it (arXiv 1711.00937, appendix A.1).

    N ← γN + (1 - γ)n and m ← γm + (1 - γ)Σz over the n latents of a batch that chose it; e = m / N, γ = 0.99 as in the
    paper. The loss's codebook term is still part of the recorded vq_loss but has no gradient. The start is that of
    `LossOnly`, with N = 1 and m = e: a code that is not chosen stays where it is.

    DeepMind's Sonnet (sonnet.nets.VectorQuantizerEMA) starts with N = 0 and smooths N, and quantizes a batch before it
    moves the embeddings; here they move first.
    """

    def __init__(self, quantizer: VectorQuantizer, optimizer: torch.optim.Adam):
        super().__init__(quantizer, optimizer)
        quantizer.embedding.weight.requires_grad_(False)
        self.counts = torch.ones(len(self.embeddings), 1, device=self.embeddings.device)
        self.sums = self.embeddings.clone()

    def before_lookup(self, step: int, z_e: Tensor, n: int, rng: torch.Generator) -> None:
        is_counted = distributed.weight(n) > 0  # otherwise this part repeats an image that another process counts
        _, counts, sums = cells(self.quantizer, z_e)
        self.counts.lerp_(distributed.total(counts * is_counted)[:, None].float(), 1 - RECIPE.ema_decay)
        self.sums.lerp_(distributed.total(sums * is_counted), 1 - RECIPE.ema_decay)
        alive = self.counts > 1e-20  # below, float32 loses the digits of both
        self.embeddings.copy_(torch.where(alive, self.sums / self.counts, self.embeddings))

    def state_dict(self) -> dict[str, Tensor]:
        return {"ema_counts": self.counts, "ema_sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts.copy_(state["ema_counts"])
        self.sums.copy_(state["ema_sums"])


METHODS = {"kmeans": KMeans, "paper": LossOnly, "ema": EMA}


@torch.no_grad()
def cells(quantizer: VectorQuantizer, z_e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Assign latents z_e (B, D, H, W) to embeddings: those with the same code are a cell.

    Returns:
        codes (B·H·W,), the number of latents with each code (n_embeddings,), and their sums (n_embeddings, D).
    """
    codes = quantizer.nearest(z_e).flatten()
    weight = quantizer.embedding.weight.detach()
    return codes, _count(codes, len(weight)), torch.zeros_like(weight).index_add_(0, codes, rows(z_e))


@torch.no_grad()
def start_from(quantizer: VectorQuantizer, z_e: Tensor, rng: torch.Generator) -> None:
    """Put every embedding on a random latent of z_e (B, D, H, W)."""
    latents = rows(z_e)
    weight = quantizer.embedding.weight
    pick = torch.randint(len(latents), (len(weight),), generator=rng)
    weight.copy_(latents[move(pick, latents.device)])


@torch.no_grad()
def k_means_step(quantizer: VectorQuantizer, z_e: Tensor, rng: torch.Generator) -> None:
    """Move each embedding to the mean of its latents in z_e (B, D, H, W), and unused ones as `move_dead` does."""
    codes, counts, sums = cells(quantizer, z_e)
    used = counts > 0
    weight = quantizer.embedding.weight
    weight.copy_(torch.where(used[:, None], sums / counts[:, None], weight))
    move_dead(quantizer, ~used, z_e, rng, codes)


@torch.no_grad()
def move_dead(
    quantizer: VectorQuantizer, dead: Tensor, z_e: Tensor, rng: torch.Generator, codes: Tensor | None = None
) -> None:
    """Move the embeddings marked in `dead` (n_embeddings,) bool onto latents of z_e (B, D, H, W).

    A cell (the positions that share a code) is drawn with probability proportional to its sum of squared quantization
    errors, then one of its members uniformly. Drawing the cell by its cost puts codes where the loss is, as splitting
    does in the LBG algorithm (Linde, Buzo and Gray 1980); drawing the member uniformly does not favour single outliers,
    which unsettle the decoder.
    """
    n_dead = int(dead.sum())  # a GPU is waited for
    if n_dead == 0:
        return
    latents = rows(z_e)
    weight = quantizer.embedding.weight
    codes = quantizer.nearest(z_e).flatten() if codes is None else codes  # (B·H·W,)
    counts = _count(codes, len(weight))
    errors = (latents - weight[codes]).square().sum(1)
    costs = torch.zeros(len(weight), device=weight.device).index_add_(0, codes, errors).cpu().double()
    if not costs.sum() > 0:  # every latent lies on its embedding, or they are not finite
        return
    cell = torch.multinomial(costs, n_dead, replacement=True, generator=rng)
    counts = counts.cpu()
    offset = torch.rand(n_dead, generator=rng, dtype=torch.double) * counts[cell]
    index = (counts.cumsum(0) - counts)[cell] + torch.minimum(offset.long(), counts[cell] - 1)
    members = codes.argsort(stable=True)  # positions, sorted by code
    weight[dead] = latents[members[move(index, members.device)]]


def _count(codes: Tensor, n: int) -> Tensor:
    """How often each of n codes occurs, (n,) int64. On CUDA, `torch.bincount` is not deterministic, and waits."""
    return torch.zeros(n, dtype=torch.int64, device=codes.device).scatter_add_(0, codes, torch.ones_like(codes))
