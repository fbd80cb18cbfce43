"""How the embeddings of the codebook come to where the latents are: three ways, as `--codebook` names them.

A way acts before each update of the networks, on latents of the batch at hand. The loss and its optimizer move the
embeddings too (eq. 3 of arXiv 1711.00937), in all ways but `ema`. What a way remembers from update to update is in its
`state`, which the run's resume file keeps; nothing of it is in the network.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import parallel
from modules import VectorQuantizer, rows


class Paper:
    """arXiv 1711.00937 and nothing else: a start at random, uniform in ±1/n_embeddings, and the loss's codebook term.

    Most codes are never chosen, and what is never chosen never moves. Also the interface of the other ways: each method
    here does nothing.

    Args:
        quantizer: its embeddings are moved in place.
        optimizer: the Adam that trains them.
    """

    def __init__(self, quantizer: VectorQuantizer, optimizer: torch.optim.Adam):
        self.quantizer, self.optimizer = quantizer, optimizer

    @property
    def embeddings(self) -> Tensor:
        """(n_embeddings, D), to be read and written without a gradient."""
        return self.quantizer.embedding.weight.detach()

    def before_update(self, update: int, latents: Callable[[], Tensor], n: int, random: torch.Generator) -> None:
        """Move embeddings before an update.

        Args:
            update: 0, 1, … of the run.
            latents: gives z_e (B, D, 64, 64) of this process's part of the batch; called only where it is needed.
            n: images in the batch of all processes.
            random: a generator on the CPU, so that every device draws the same.
        """

    def after_update(self, codes: Tensor) -> None:
        """Take note of the codes that this process's share of the batch was given, any shape."""

    def state(self) -> dict[str, Tensor]:
        """What resuming needs, the same in all processes."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""


class KMeans(Paper):
    """Start from data, then keep every code alive: the default.

    For the first updates the encoder's output changes faster than Adam can move embeddings at lr 1e-3, and nearly all
    codes die; a k-means step on each batch keeps them where the latents are. Later, codes that nothing chose for
    REVIVE_EVERY updates move to where the quantization error is, and forget the momentum they had elsewhere.
    """

    K_MEANS_UPDATES = 100
    START_STEPS = 10  # on the first batch alone
    REVIVE_EVERY = 10

    def __init__(self, quantizer: VectorQuantizer, optimizer: torch.optim.Adam):
        super().__init__(quantizer, optimizer)
        self.usage = torch.zeros(len(self.embeddings), dtype=torch.int64, device=self.embeddings.device)

    def before_update(self, update: int, latents: Callable[[], Tensor], n: int, random: torch.Generator) -> None:
        if update < self.K_MEANS_UPDATES:
            z_e = parallel.gather(latents(), n)
            if update == 0:
                start_from(self.quantizer, z_e, random)
            for _ in range(self.START_STEPS if update == 0 else 1):
                k_means_step(self.quantizer, z_e, random)
            parallel.copy_first(self.embeddings)
        elif update % self.REVIVE_EVERY == 0:
            dead = parallel.total(self.usage) == 0
            if dead.any() and not dead.all():  # all: nothing was counted yet, in a run of an older version
                self.revive(dead, parallel.gather(latents(), n), random)
            self.usage.zero_()

    def revive(self, dead: Tensor, z_e: Tensor, random: torch.Generator) -> None:
        """Move the embeddings marked in `dead` (n_embeddings,) bool onto latents z_e (B, D, H, W)."""
        move_dead(self.quantizer, dead, z_e, random)
        parallel.copy_first(self.embeddings)
        moments = self.optimizer.state[self.quantizer.embedding.weight]
        moments["exp_avg"][dead] = 0
        moments["exp_avg_sq"][dead] = 0

    def after_update(self, codes: Tensor) -> None:
        codes = codes.flatten()
        self.usage.scatter_add_(0, codes, torch.ones_like(codes))

    def state(self) -> dict[str, Tensor]:
        return {"usage": parallel.total(self.usage).cpu()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.usage.copy_(state["usage"] if parallel.is_first() else 0)  # it is a sum over processes


class Ema(Paper):
    """Each embedding is an exponential moving average of the latents that chose it (arXiv 1711.00937, appendix A.1).

    N ← γN + (1 - γ)n and m ← γm + (1 - γ)Σz over the n latents of a batch that chose it; e = m / N. The loss's
    codebook term, still a part of the vq_loss that is recorded, passes no gradient on then. The start is that of
    `Paper`, with N = 1 and m = e: what nothing chose stays where it is. γ = 0.99 as in the paper.

    DeepMind's Sonnet (sonnet.nets.VectorQuantizerEMA) starts with N = 0 and smooths N, and quantizes a batch before it
    moves the embeddings; here they move first.
    """

    DECAY = 0.99

    def __init__(self, quantizer: VectorQuantizer, optimizer: torch.optim.Adam):
        super().__init__(quantizer, optimizer)
        quantizer.embedding.weight.requires_grad_(False)
        self.counts = torch.ones(len(self.embeddings), 1, device=self.embeddings.device)
        self.sums = self.embeddings.clone()

    def before_update(self, update: int, latents: Callable[[], Tensor], n: int, random: torch.Generator) -> None:
        mine = parallel.weight(n) > 0  # else the part is an image that another process counts
        _, counts, sums = cells(self.quantizer, latents())
        self.counts.lerp_(parallel.total(counts * mine)[:, None].float(), 1 - self.DECAY)
        self.sums.lerp_(parallel.total(sums * mine), 1 - self.DECAY)
        alive = self.counts > 1e-20  # others have decayed to where float32 loses their digits
        self.embeddings.copy_(torch.where(alive, self.sums / self.counts, self.embeddings))

    def state(self) -> dict[str, Tensor]:
        return {"ema_counts": self.counts, "ema_sums": self.sums}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.counts.copy_(state["ema_counts"])
        self.sums.copy_(state["ema_sums"])


WAYS = {"kmeans": KMeans, "paper": Paper, "ema": Ema}


@torch.no_grad()
def cells(quantizer: VectorQuantizer, z_e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which latents z_e (B, D, H, W) share a code.

    Returns:
        codes (B·H·W,), how many latents chose each code (n_embeddings,), and their sums (n_embeddings, D).
    """
    codes = quantizer.nearest(z_e).flatten()
    weight = quantizer.embedding.weight.detach()
    counts = torch.zeros(len(weight), dtype=torch.int64, device=codes.device)
    counts.scatter_add_(0, codes, torch.ones_like(codes))  # bincount would make a GPU wait
    return codes, counts, torch.zeros_like(weight).index_add_(0, codes, rows(z_e))


@torch.no_grad()
def start_from(quantizer: VectorQuantizer, z_e: Tensor, random: torch.Generator) -> None:
    """Put every embedding on a random latent of z_e (B, D, H, W)."""
    latents, weight = rows(z_e), quantizer.embedding.weight
    pick = torch.randint(len(latents), (len(weight),), generator=random)
    weight.copy_(latents[pick.to(latents.device)])


@torch.no_grad()
def k_means_step(quantizer: VectorQuantizer, z_e: Tensor, random: torch.Generator) -> None:
    """Move each embedding to the mean of the latents z_e (B, D, H, W) nearest to it, the others as `move_dead` does."""
    codes, counts, sums = cells(quantizer, z_e)
    used = counts > 0
    quantizer.embedding.weight[used] = sums[used] / counts[used, None]
    _move_dead(quantizer, ~used, rows(z_e), codes, random)


@torch.no_grad()
def move_dead(quantizer: VectorQuantizer, dead: Tensor, z_e: Tensor, random: torch.Generator) -> None:
    """Move the embeddings marked in `dead` (n_embeddings,) bool onto latents of z_e (B, D, H, W).

    A cell (the positions that share a code) is drawn in proportion to its sum of squared quantization errors, then
    one of its members uniformly. Drawing the cell by its cost puts codes where the loss is, as splitting does in the
    LBG algorithm (Linde, Buzo and Gray 1980); drawing the member uniformly keeps single outliers, which unsettle the
    decoder, from being favoured.
    """
    _move_dead(quantizer, dead, rows(z_e), quantizer.nearest(z_e).flatten(), random)


def _move_dead(
    quantizer: VectorQuantizer, dead: Tensor, latents: Tensor, codes: Tensor, random: torch.Generator
) -> None:
    n_dead = int(dead.sum())
    if n_dead == 0:
        return
    weight = quantizer.embedding.weight
    n = len(weight)
    errors = (latents - weight[codes]).square().sum(1)
    costs = torch.zeros(n, device=latents.device).index_add_(0, codes, errors).cpu().double()
    if not costs.sum() > 0:  # every latent lies on its embedding, or they are not finite: nothing to gain
        return
    drawn = torch.multinomial(costs, n_dead, replacement=True, generator=random)
    order = codes.argsort(stable=True)
    counts = torch.bincount(codes, minlength=n).cpu()
    starts = counts.cumsum(0) - counts
    members = (torch.rand(n_dead, generator=random, dtype=torch.double) * counts[drawn]).long()
    weight[dead] = latents[order[(starts[drawn] + members).to(latents.device)]]
