"""What the stages of both priors have in common: latents, samples, measures and their figures."""

from functools import cached_property

import torch
from torch import Tensor

from dataset import OasisDataset
from modules import VQVAE
from support.run import Run
from training.fit import Stage
from training.latents import Latents
from training.prior import Prior
from training.samples import Samples
from training.scale import LatentScale


class PriorStage(Stage):
    """Train a prior on the training split's latents; compare its samples with the validation split.

    Generated latents are snapped to embeddings and decoded. A subclass sets `prior` whenever its scale is set.

    Args:
        run, vqvae, train_set, validate_set: all on the run's device.
        epochs, n_measures: of the stage, and how often in these its samples are measured.
    """

    quantized = False  # whether it learns embeddings, or the encoder's output before quantization
    prior: Prior  # draws samples with the EMA of the weights

    def __init__(
        self,
        run: Run,
        vqvae: VQVAE,
        train_set: OasisDataset,
        validate_set: OasisDataset,
        epochs: int,
        n_measures: int,
    ):
        super().__init__(run)
        self.vqvae, self.train_set, self.validate_set, self.epochs = vqvae, train_set, validate_set, epochs
        self.vqvae.eval().to(memory_format=torch.channels_last)
        self.latents, self.stored = None, None
        self.samples = Samples(run, self.name, vqvae, train_set, validate_set, epochs, n_measures)
        self.figures = self.samples.figures

    def set_scale(self, scale: LatentScale) -> None:
        """Set the map between latents and what the prior generates."""
        self.scale = scale.to(self.run.device)

    def data(self) -> Latents:
        if self.latents is None:
            self.latents = Latents(self.vqvae, self.train_set, self.scale, self.quantized, self.stored)
            self.stored = self.latents.stored
            kept = "kept in memory" if self.stored else "too many for memory, so each batch is encoded when it is used"
            print(f"{self.title}: {len(self.latents)} latents, {kept}", flush=True)
        return self.latents

    @cached_property
    def validate_latents(self) -> Latents:
        return Latents(self.vqvae, self.validate_set, self.scale, self.quantized, self.stored)

    def noise(self, n: int, stream: str) -> Tensor:
        """The noise of n images, the same at each call."""
        return self.samples.noise(self.prior, n, stream)

    def drawn_now(self, epoch: int) -> bool:
        """Whether samples are drawn after an epoch."""
        return True

    def draw(self, row: dict, history: dict[str, list[float]]) -> None:
        if self.drawn_now(row["epoch"]):
            self.samples.draw(self.prior, row["epoch"])
        print(f"Epoch: {row['epoch']}")
        self.print_losses(row)
        self.draw_losses(history)
        self.samples.report(row)

    def print_losses(self, row: dict) -> None:
        """Print a line for each value of an epoch's row that tells how training goes."""
        raise NotImplementedError

    def draw_losses(self, history: dict[str, list[float]]) -> None:
        """Draw the losses by step."""
        raise NotImplementedError

    def extra_state(self) -> dict:
        return self.samples.state_dict() | {"scale": self.scale.to("cpu").tensors(), "stored": self.stored}

    def load_extra_state(self, state: dict) -> None:
        self.samples.load_state_dict(state, self.title)
        self.stored = state["stored"]
        self.set_scale(LatentScale(**state["scale"]))
