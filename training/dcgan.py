"""The DCGAN's training stage: the generator's start, its averages, calibration, measures and figures."""

import copy
from functools import cached_property

import torch
from torch import Tensor

from dataset import OasisDataset
from evaluation import generation
from modules import VQVAE, Discriminator, Generator, dcgan_init
from report.plots import Figures
from support import distributed, files, seeds
from support.console import UserError, in_batches
from support.device import move
from support.run import Run
from training.fit import Stage
from training.gan_update import METHODS, PlainUpdate
from training.latents import Latents, Prior, codebook_hash
from training.scale import LatentScale
from training.start import start_generator


class DCGANStage(Stage):
    """Train the DCGAN (arXiv 1511.06434) on the training split's latents.

    Samples are drawn with an EMA of the generator's weights; generated latents are snapped to embeddings and decoded.

    Args:
        run, vqvae, train_set, validate_set: all on the run's device.
        method: the update rule; by default the one that the config names.
        n_measures: number of times in a run that generated brains are compared with the validation split.
    """

    name, title = "gan", "DCGAN"
    columns = ("d_loss", "d_real", "d_fake", "g_loss")

    def __init__(
        self,
        run: Run,
        vqvae: VQVAE,
        train_set: OasisDataset,
        validate_set: OasisDataset,
        method: type[PlainUpdate] | None = None,
        n_measures: int = 10,
    ):
        super().__init__(run)
        config, fast_path = run.config, run.fast_path
        self.vqvae, self.train_set, self.validate_set, self.n_measures = vqvae, train_set, validate_set, n_measures
        self.epochs, self.batch_size = config.gan_epochs, config.gan_batch_size
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
        self.update = (method or METHODS[config.gan_training])(generator, discriminator, self.optimizers.values())
        self.update.autocast, self.average_decay = fast_path.autocast, self.update.average_decay
        self.figures, self.floor, self.latents, self.stored = Figures(run.folder, run.phantoms), None, None, None

    def start(self) -> None:
        fit_scale = self.update.fit_scale
        self.set_scale(distributed.from_first(lambda: fit_scale(self.vqvae, self.train_set).to("cpu")))
        n_steps = min(self.update.most_start_steps, self.epochs * -(-len(self.data()) // self.batch_size) // 2)
        words = (self.data(), n_steps, self.batch_size, self.run.fast_path, self.run.config.seed)
        weights = distributed.from_first(lambda: start_generator(self.average, *words))  # whose BatchNorm is local
        for generator in (self.average, self.networks["generator"]):
            generator.load_state_dict(weights)
        if distributed.is_first():
            self._draw_samples(0, "before adversarial training")
            self.floor = {name: found.value for name, found in self.held_out.floor().items()}

    def set_scale(self, scale: LatentScale) -> None:
        """Set the map between latents and the generator's range, and what depends on it."""
        self.scale = scale.to(self.run.device)
        self.vqvae.eval().to(memory_format=torch.channels_last)
        for name in ("generated", "seen", "basis"):
            setattr(self.update, name, getattr(self.scale, name))
        self.prior = Prior(self.average, self.scale, self.vqvae, self.run.phantoms)
        self.shown = self._noise(64, "gan samples")
        self.eval_noise = self._noise(min(len(self.validate_set), len(self.train_set)), "measures")

    def _noise(self, n: int, stream: str) -> Tensor:
        return self.prior.noise(n, seeds.generator(self.run.config.seed, stream))

    def data(self) -> Latents:
        if self.latents is None:
            self.latents = Latents(self.vqvae, self.train_set, self.scale, self.update.quantized, self.stored)
            self.stored = self.latents.stored
            kept = "kept in memory" if self.stored else "too many for memory, so each batch is encoded when it is used"
            print(f"DCGAN: {len(self.latents)} latents, {kept}", flush=True)
        return self.latents

    def step(self, batch: Tensor, n: int, step: int, rng: torch.Generator) -> Tensor:
        """One update of each network on coefficients of latents (B, K, 64, 64)."""
        noise = move(distributed.part(self.prior.noise(n, rng)), batch.device)
        return self.update(batch, noise, distributed.weight(n))

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Calibrate the prior. `n_measures` times in a run, compare its samples with the validation split."""
        measures = {key: value.item() for key, value in self.update.state_dict().items()}
        measures["d_validate"] = self._judge_validation()
        noise = self._noise(512, "calibration")
        if self.update.average_decay:
            self.prior.measure_statistics(noise)
        if self.update.calibrated:
            self.prior.calibrate(self.latents.power, self.scale, noise)
        now, before = (n * self.n_measures // self.epochs for n in (epoch, epoch - 1))
        if now > before and distributed.is_first():
            found = self.held_out.measure(self.prior.sample_images(self.eval_noise))
            measures |= {name: measure.value for name, measure in found.items()}
        return measures

    def _judge_validation(self) -> float:
        """Mean D(x) of the validation split. Far below `d_real` where D knows the training split by heart."""
        discriminator = self.networks["discriminator"]
        kept = copy.deepcopy(discriminator.state_dict())  # BatchNorm's statistics change
        batches = in_batches(self.validate_latents, size=self.batch_size, desc="Judging")
        judged = torch.cat([self.update.judged(c) for c in batches])
        discriminator.load_state_dict(kept)
        return judged.mean().item()

    @cached_property
    def validate_latents(self) -> Latents:
        return Latents(self.vqvae, self.validate_set, self.scale, self.update.quantized)

    @cached_property
    def held_out(self) -> generation.HeldOut:
        sides = self.vqvae, self.validate_set, self.train_set
        return generation.HeldOut(*sides, n=len(self.eval_noise), seed=self.run.config.seed)

    def draw(self, row: dict, history: dict[str, list[float]]) -> None:
        self._draw_samples(row["epoch"], f"after epoch {row['epoch']}")  # a signal may end the program here
        self._print(row)
        self.figures.gan_losses("gan_losses.png", history)
        measured = [row for row in self.run.rows_of(self.name) if "swd_mean" in row]
        if measured:
            self.figures.gan_measures("gan_measures.png", measured, self.floor)
            self.figures.gan_texture("gan_texture.png", measured, self.floor)

    def save_weights(self, row: dict) -> None:
        files.save(self.prior.checkpoint(), self.run.folder / "generator.pth")
        files.save(files.cpu_state(self.networks["discriminator"]), self.run.folder / "discriminator.pth")

    def _draw_samples(self, epoch: int, when: str) -> None:
        images = self.prior.sample_images(self.shown)
        self.figures.image_grid(f"gan_epoch_{epoch}.png", images, f"{len(images)} fixed noise vectors, decoded {when}")

    def _print(self, row: dict) -> None:
        print(f"Epoch: {row['epoch']}")
        self.run.say(f"Discriminator loss: {row['d_loss']:.4f}")
        self.run.say(f"Generator loss: {row['g_loss']:.4f}")
        self.run.say(f"D(x): {row['d_real']:.3f}, D(G(z)): {row['d_fake']:.3f}")
        self.run.say(f"D(x) of the validation split: {row['d_validate']:.3f}")
        if "swd_mean" in row:
            shown = (("swd_mean", 1), ("grey_values", 3), ("coherence", 3), ("texture_auc", 2), ("coverage", 2))
            swd, grey, coherence, auc, coverage = (f"{row[key]:.{n}f} ({self.floor[key]:.{n}f})" for key, n in shown)
            self.run.say(
                f"Distance of generated brains (reconstructions): sliced Wasserstein {swd}, grey values {grey}"
            )
            self.run.say(f"Their texture (reconstructions): coherence {coherence}, AUC {auc}, coverage {coverage}")

    def extra_state(self) -> dict:
        state = {"scale": self.scale.to("cpu").tensors(), "codebook": codebook_hash(self.vqvae)}
        return state | {"stored": self.stored, "floor": self.floor, "update": self.update.state_dict()}

    def load_extra_state(self, state: dict) -> None:
        if state["codebook"] != codebook_hash(self.vqvae):
            raise UserError(
                f"{self.run.folder / 'vqvae.pth'}: has changed since the DCGAN began; start a new run with it"
            )
        self.set_scale(LatentScale(**state["scale"]))
        self.update.load_state_dict(state["update"])
        self.floor, self.stored = state["floor"], state["stored"]
