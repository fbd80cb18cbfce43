"""A prior's samples in a run: their pictures, and their measures beside those of reconstructions."""

import math
from functools import cached_property

from torch import Tensor

from dataset import OasisDataset
from evaluation.generation import MEASURES, MOST_MEASURED, Reference, of_arrays, reconstructed, to_bytes
from modules import VQVAE
from priors.checkpoints import PRIORS
from report.plots import Figures
from support import distributed, files, seeds
from support.console import UserError
from support.run import Run, restoring

N_SHOWN = 64  # as the report's figures have them
N_MEASURES = 10  # at most, in a run: each takes some 20 seconds


class Samples:
    """Draw and measure the samples of a prior while it is trained.

    A prior has `noise(n, rng)` and `sample_images(noise)`. Noise is the same each time.

    Args:
        run, vqvae, train_set, validate_set: on the run's device.
        name: of the prior and its stage, a key of PRIORS.
        epochs: of the stage.

    Attributes:
        reconstructions: measures of reconstructed training images by name, on rank 0; `begin` takes them.

    Raises UserError if the stage of a resumed run began with another VQ-VAE.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        vqvae: VQVAE,
        train_set: OasisDataset,
        validate_set: OasisDataset,
        epochs: int,
    ):
        self.run = run
        self.prefix = PRIORS[name].prefix
        self.epochs = epochs
        self.vqvae = vqvae
        self.train_set = train_set
        self.validate_set = validate_set
        self.figures = Figures(run.folder, run.phantoms)
        self.codebook = files.digest(vqvae.vector_quantizer.embedding.weight)
        self.reconstructions = {}
        if name in run.state:
            with restoring(run.folder):
                saved = run.state[name]["extra"]
                if saved["codebook"] != self.codebook:
                    path, title = run.folder / "vqvae.pth", PRIORS[name].title
                    raise UserError(f"{path}: has changed since the {title} began; start a new run with it")
                self.reconstructions = saved["reconstructions"]

    @cached_property
    def reference(self) -> Reference:
        """What samples are measured against; computed when it is first needed, which takes long."""
        images = self.validate_set.as_images().evenly_spaced(self.n_measured)
        return Reference(self.vqvae, reconstructed(self.vqvae, images), self.run.options.seed)

    @property
    def n_measured(self) -> int:
        """How many images a side are measured."""
        return min(MOST_MEASURED, len(self.validate_set), len(self.train_set))

    def noise(self, prior, n: int, stream: str) -> Tensor:
        """The noise of n images from one of the run's streams of random numbers."""
        return prior.noise(n, seeds.generator(self.run.options.seed, stream))

    def begin(self, prior) -> None:
        """Draw samples before the first epoch, and measure reconstructions of training images; on rank 0."""
        if distributed.is_first():
            self.draw(prior, 0)
            others = self.train_set.as_images().random_subset(self.n_measured, self.run.options.seed)
            others = reconstructed(self.vqvae, others)
            self.reconstructions = {name: measure.value for name, measure in self.reference.measure(others).items()}

    def state_dict(self) -> dict:
        """What resuming needs."""
        return {"reconstructions": self.reconstructions, "codebook": self.codebook}

    def are_measured(self, epoch: int) -> bool:
        """Whether samples are measured after an epoch: N_MEASURES times in a run, or after each if they are fewer."""
        now, before = (n * N_MEASURES // self.epochs for n in (epoch, epoch - 1))
        return now > before

    def measure(self, prior, epoch: int) -> dict[str, float]:
        """Measures of `n_measured` samples, where they are due; on rank 0."""
        if not self.are_measured(epoch) or not distributed.is_first():
            return {}
        pixels = to_bytes(prior.sample_images(self.noise(prior, self.n_measured, "measures")))
        return {name: measure.value for name, measure in self.reference.measure(of_arrays(pixels)).items()}

    def draw(self, prior, epoch: int) -> None:
        """Draw N_SHOWN samples after an epoch; 0 is before the first one."""
        noise = self.noise(prior, N_SHOWN, "samples by epoch")
        images = prior.sample_images(noise)  # a signal may end the program here
        when = f"after epoch {epoch}" if epoch else "before the first epoch"
        title = f"{len(images)} samples {when}, always from the same noise"
        self.figures.image_grid(f"{self.prefix}_epoch_{epoch}.png", images, title)

    def print_measures(self, rows: list[dict]) -> None:
        """If the last of a stage's rows has measures, print them, and draw those of all epochs."""
        row = rows[-1]
        if "swd" not in row:
            return
        values = {text: (row[key], self.reconstructions[key]) for key, text in MEASURES.items()}
        shown = [f"{text}: {a:.3g} ({b:.3g})" for text, (a, b) in values.items() if math.isfinite(a + b)]
        self.run.say(f"Generated slices (reconstructions): {'; '.join(shown)}")
        measured = [each for each in rows if "swd" in each]
        self.figures.measures_by_epoch(f"{self.prefix}_measures.png", measured, self.reconstructions)
