"""The DCGAN's training stage."""

import copy

import torch
from torch import Tensor

from dataset import OasisDataset
from modules import VQVAE, Discriminator, Generator, dcgan_init
from support import distributed, files, seeds
from support.console import in_batches
from support.device import move
from support.run import Run
from training.gan_update import METHODS
from training.prior import GeneratorPrior
from training.prior_stage import PriorStage
from training.scale import LatentScale
from training.start import start_generator


class DCGANStage(PriorStage):
    """Train the DCGAN (arXiv 1511.06434). generator.pth has the EMA of the generator's weights.

    Args:
        run, vqvae, train_set, validate_set, n_measures: as in `PriorStage`.
    """

    name, title = "gan", "DCGAN"
    columns = ("d_loss", "d_real", "d_fake", "g_loss")

    def __init__(
        self,
        run: Run,
        vqvae: VQVAE,
        train_set: OasisDataset,
        validate_set: OasisDataset,
        n_measures: int = 10,
    ):
        super().__init__(run, vqvae, train_set, validate_set, run.config.gan_epochs, n_measures)
        config, fast_path = run.config, run.fast_path
        self.batch_size = config.gan_batch_size
        torch.manual_seed(seeds.derived_seed(config.seed, "gan weights"))
        embeddings_dim = vqvae.vector_quantizer.embedding.embedding_dim
        generator = Generator(embeddings_dim=embeddings_dim).apply(dcgan_init)
        discriminator = Discriminator(embeddings_dim).apply(dcgan_init)
        self.average = copy.deepcopy(generator).to(run.device, memory_format=fast_path.layout)
        self.networks, self.optimizers = {"generator": generator, "discriminator": discriminator}, {}
        for name, network in self.networks.items():
            network = distributed.synchronize_batch_norm(network).to(run.device, memory_format=fast_path.layout)
            self.optimizers[name] = fast_path.adam(network, config.gan_lr, config.gan_betas)
        self.averages = {"generator": self.average}
        self.update = METHODS[config.gan_training](generator, discriminator, self.optimizers.values())
        self.update.autocast = fast_path.autocast
        self.average_decay, self.quantized = self.update.average_decay, self.update.quantized

    def start(self) -> None:
        fit_scale = self.update.fit_scale
        self.set_scale(distributed.from_first(lambda: fit_scale(self.vqvae, self.train_set).to("cpu")))
        n_steps = min(self.update.most_start_steps, self.epochs * -(-len(self.data()) // self.batch_size) // 2)
        words = (self.data(), n_steps, self.batch_size, self.run.fast_path, self.run.config.seed)
        weights = distributed.from_first(lambda: start_generator(self.average, *words))  # whose BatchNorm is local
        for generator in (self.average, self.networks["generator"]):
            generator.load_state_dict(weights)
        self.samples.begin(self.prior)

    def set_scale(self, scale: LatentScale) -> None:
        super().set_scale(scale)
        for name in ("generated", "seen", "basis"):
            setattr(self.update, name, getattr(self.scale, name))
        self.prior = GeneratorPrior(self.average, self.scale, self.vqvae, self.run.phantoms)

    def step(self, batch: Tensor, n: int, step: int, rng: torch.Generator) -> Tensor:
        """One update of each network on coefficients of latents (B, K, 64, 64)."""
        noise = move(distributed.part(self.prior.noise(n, rng)), batch.device)
        return self.update(batch, noise, distributed.weight(n))

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Calibrate the prior, and measure it when that is due."""
        measures = {key: value.item() for key, value in self.update.state_dict().items()}
        measures["d_validate"] = self._judge_validation()
        noise = self.noise(512, "calibration")
        if self.update.average_decay:
            self.prior.measure_statistics(noise)
        if self.update.calibrated:
            self.prior.calibrate(self.latents.covariance, noise)
        return measures | self.samples.measure(self.prior, epoch)

    def _judge_validation(self) -> float:
        """Mean D(x) of the validation split. Far below `d_real` where D knows the training split by heart."""
        discriminator = self.networks["discriminator"]
        kept = copy.deepcopy(discriminator.state_dict())  # BatchNorm's statistics change
        # in file order a batch would be of two subjects, which BatchNorm sees
        order = torch.randperm(len(self.validate_latents), generator=seeds.generator(self.run.config.seed, "judging"))
        batches = in_batches(self.validate_latents, order, self.batch_size, desc="Judging")
        judged = torch.cat([self.update.judged(c) for c in batches])
        discriminator.load_state_dict(kept)
        return judged.mean().item()

    def print_losses(self, row: dict) -> None:
        self.run.say(f"Discriminator loss: {row['d_loss']:.4f}")
        self.run.say(f"Generator loss: {row['g_loss']:.4f}")
        self.run.say(f"D(x): {row['d_real']:.3f}, D(G(z)): {row['d_fake']:.3f}")
        self.run.say(f"D(x) of the validation split: {row['d_validate']:.3f}")

    def draw_losses(self, history: dict[str, list[float]]) -> None:
        self.figures.gan_losses("gan_losses.png", history)

    def save_weights(self, row: dict) -> None:
        files.save(self.prior.checkpoint(), self.run.folder / "generator.pth")
        files.save(files.cpu_state(self.networks["discriminator"]), self.run.folder / "discriminator.pth")

    def extra_state(self) -> dict:
        return super().extra_state() | {"update": self.update.state_dict()}

    def load_extra_state(self, state: dict) -> None:
        super().load_extra_state(state)
        self.update.load_state_dict(state["update"])
