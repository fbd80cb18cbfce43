"""What the stages of both priors have in common: latents, samples, measures and their figures."""

from functools import cached_property

import torch
from torch import Tensor

from dataset import OasisDataset
from evaluation import generation
from modules import VQVAE
from report.plots import Figures
from support import distributed, seeds
from support.console import UserError
from support.run import Run
from training.fit import Stage
from training.latents import Latents, codebook_hash
from training.prior import Prior
from training.scale import LatentScale


class PriorStage(Stage):
    """Train a prior on the training split's latents; compare its samples with the validation split.

    Generated latents are snapped to embeddings and decoded. A subclass sets `prior` whenever its scale is set.

    Args:
        run, vqvae, train_set, validate_set: all on the run's device.
        n_measures: number of times in a run that generated brains are compared with the validation split.
    """

    quantized = False  # whether it learns embeddings, or the encoder's output before quantization
    prior: Prior  # draws samples with the EMA of the weights

    def __init__(self, run: Run, vqvae: VQVAE, train_set: OasisDataset, validate_set: OasisDataset, n_measures: int):
        super().__init__(run)
        self.vqvae, self.train_set, self.validate_set, self.n_measures = vqvae, train_set, validate_set, n_measures
        self.vqvae.eval().to(memory_format=torch.channels_last)
        self.figures, self.floor, self.latents, self.stored = Figures(run.folder, run.phantoms), None, None, None

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

    @cached_property
    def shown(self) -> Tensor:
        return self.noise(64, "gan samples")

    @cached_property
    def eval_noise(self) -> Tensor:
        return self.noise(generation.n_measured(self.validate_set, self.train_set), "measures")

    @cached_property
    def held_out(self) -> generation.HeldOut:
        return generation.HeldOut(self.vqvae, self.validate_set, self.train_set, self.run.config.seed)

    def noise(self, n: int, stream: str) -> Tensor:
        """The noise of n images, the same at each call."""
        return self.prior.noise(n, seeds.generator(self.run.config.seed, stream))

    def begin(self) -> None:
        """Draw samples of the untrained prior, and measure what stands beside those of the trained one."""
        if distributed.is_first():
            self.draw_samples(0, "before training")
            self.floor = {name: found.value for name, found in self.held_out.floor().items()}

    def measured_now(self, epoch: int) -> bool:
        """Whether samples are measured after an epoch: `n_measures` times in a run."""
        now, before = (n * self.n_measures // self.epochs for n in (epoch, epoch - 1))
        return now > before

    def drawn_now(self, epoch: int) -> bool:
        """Whether samples are drawn after an epoch."""
        return True

    def measure(self, epoch: int) -> dict[str, float]:
        """Measures of `generation.n_measured` samples, where they are due; on rank 0."""
        if not self.measured_now(epoch) or not distributed.is_first():
            return {}
        found = self.held_out.measure(self.prior.sample_images(self.eval_noise))
        return {name: measure.value for name, measure in found.items()}

    def draw(self, row: dict, history: dict[str, list[float]]) -> None:
        if self.drawn_now(row["epoch"]):
            self.draw_samples(row["epoch"], f"after epoch {row['epoch']}")  # a signal may end the program here
        print(f"Epoch: {row['epoch']}")
        self.print_losses(row)
        if "swd_mean" in row:
            self._print_measures(row)
        self.draw_losses(history)
        measured = [row for row in self.run.rows_of(self.name) if "swd_mean" in row]
        if measured:
            self.figures.measures(f"{self.name}_measures.png", measured, self.floor)
            self.figures.texture(f"{self.name}_texture.png", measured, self.floor)

    def print_losses(self, row: dict) -> None:
        """Print a line for each value of an epoch's row that tells how training goes."""
        raise NotImplementedError

    def draw_losses(self, history: dict[str, list[float]]) -> None:
        """Draw the losses by step."""
        raise NotImplementedError

    def draw_samples(self, epoch: int, when: str) -> None:
        images = self.prior.sample_images(self.shown)
        title = f"{len(images)} fixed noise vectors, decoded {when}"
        self.figures.image_grid(f"{self.name}_epoch_{epoch}.png", images, title)

    def _print_measures(self, row: dict) -> None:
        shown = (("swd_mean", 1), ("grey_values", 3), ("coherence", 3), ("texture_auc", 2), ("coverage", 2))
        swd, grey, coherence, auc, coverage = (f"{row[key]:.{n}f} ({self.floor[key]:.{n}f})" for key, n in shown)
        self.run.say(f"Distance of generated brains (reconstructions): sliced Wasserstein {swd}, grey values {grey}")
        self.run.say(f"Their texture (reconstructions): coherence {coherence}, AUC {auc}, coverage {coverage}")

    def extra_state(self) -> dict:
        state = {"scale": self.scale.to("cpu").tensors(), "codebook": codebook_hash(self.vqvae)}
        return state | {"stored": self.stored, "floor": self.floor}

    def load_extra_state(self, state: dict) -> None:
        if state["codebook"] != codebook_hash(self.vqvae):
            path = self.run.folder / "vqvae.pth"
            raise UserError(f"{path}: has changed since the {self.title} began; start a new run with it")
        self.floor, self.stored = state["floor"], state["stored"]
        self.set_scale(LatentScale(**state["scale"]))
