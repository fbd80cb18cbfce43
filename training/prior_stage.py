"""What the stages of the DCGAN and of the flow have in common: latents, samples, measures and their figures."""

from collections.abc import Callable
from functools import cached_property

import torch

from dataset import OasisDataset
from modules import VQVAE
from priors.latent_cache import LatentCache
from priors.latent_space import LatentSpace
from support import distributed
from support.device import exact_float32
from support.run import Run
from training.fit import Stage
from training.samples import Samples


class PriorStage(Stage):
    """Train a prior on the training split's latents; compare its samples with the validation split.

    Generated latents are snapped to embeddings and decoded. A subclass has `prior`, which draws samples with the EMA of
    the weights.

    Args:
        run, vqvae, train_set, validate_set: all on the run's device.
        epochs, n_measures: of the stage, and how often in these its samples are measured.
        fit_space: makes the map between latents and what the prior generates, of a VQ-VAE and a data set.
        quantized: whether the prior learns embeddings, or the encoder's output before quantization.

    Attributes:
        prefix: of the names of its figures.
    """

    prefix: str

    @exact_float32()
    def __init__(
        self,
        run: Run,
        vqvae: VQVAE,
        train_set: OasisDataset,
        validate_set: OasisDataset,
        epochs: int,
        n_measures: int,
        fit_space: Callable[[VQVAE, OasisDataset], LatentSpace] = LatentSpace.fit,
        quantized: bool = False,
    ):
        super().__init__(run)
        self.vqvae, self.validate_set, self.epochs = vqvae, validate_set, epochs
        self.vqvae.eval().to(memory_format=torch.channels_last)
        self.samples = Samples(run, self.prefix, vqvae, train_set, validate_set, epochs, n_measures)
        self.figures = self.samples.figures
        stored = None
        if self.name in run.state:
            with run.restoring():
                saved = run.state[self.name]["extra"]
                self.samples.load_state_dict(saved, self.title)
                space, stored = LatentSpace(**saved["space"]), saved["stored"]
        else:
            space = distributed.from_first(lambda: fit_space(vqvae, train_set).to("cpu"))
        self.space = space.to(run.device)
        self.latents = LatentCache(vqvae, train_set, self.space, quantized, stored)
        kept = (
            "kept in memory" if self.latents.stored else "too many for memory, so each batch is encoded when it is used"
        )
        print(f"{self.title}: {len(self.latents)} latents, {kept}", flush=True)

    def data(self) -> LatentCache:
        return self.latents

    @cached_property
    def validate_latents(self) -> LatentCache:
        latents = self.latents
        return LatentCache(self.vqvae, self.validate_set, self.space, latents.quantized, latents.stored)

    def drawn_now(self, epoch: int) -> bool:
        """Whether samples are drawn after an epoch."""
        return True

    def draw(self, row: dict, history: dict[str, list[float]]) -> None:
        if self.drawn_now(row["epoch"]):
            self.samples.draw(self.prior, row["epoch"])
        print(f"Epoch: {row['epoch']}")
        self.print_losses(row)
        self.draw_losses(history)
        self.samples.report(self.run.rows_of(self.name))

    def print_losses(self, row: dict) -> None:
        """Print a line for each value of an epoch's row that tells how training goes."""
        raise NotImplementedError

    def draw_losses(self, history: dict[str, list[float]]) -> None:
        """Draw the losses by step."""
        raise NotImplementedError

    def extra_state(self) -> dict:
        return self.samples.state_dict() | {"space": self.space.to("cpu").tensors(), "stored": self.latents.stored}
