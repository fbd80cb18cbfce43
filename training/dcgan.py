"""The DCGAN's training stage, and the two update rules of `--gan-training`: balanced, and the report's own.

Both minimise binary cross entropy, with the non-saturating loss for the generator (arXiv 1406.2661, section 3), as
arXiv 1511.06434 does. Real latents come as coefficients (B, K, 64, 64) of `training.scale.LatentScale`.
"""

import copy
from contextlib import nullcontext
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import OasisDataset
from evaluation import generation
from modules import VQVAE, Discriminator, Generator, dcgan_init
from report.plots import Figures
from support import distributed, files, seeds
from support.console import UserError
from support.device import move
from support.run import Run
from training.fit import Stage
from training.latents import Latents, Prior, codebook_hash
from training.scale import LatentScale
from training.start import start_generator


class PlainUpdate:
    """The report's procedure, that of PyTorch's DCGAN tutorial: cross entropy and nothing else.

    Real latents are quantized. Real and generated latents go through the discriminator in separate batches. The
    networks are in training mode; the optimizers are those of the generator and of the discriminator.
    """

    fit_scale = LatentScale.of_codebook  # (vqvae, train_set) -> the map between latents and the generator's range
    quantized = True  # whether real latents are embeddings, or the encoder's output before quantization
    calibrated = False  # whether samples are, by `latents.Prior.calibrate`
    average_decay = 0.0  # of the EMA of the generator's weights, which draws the samples
    most_start_steps = 0  # in which the generator learns real latents before it meets a discriminator
    generated = seen = staticmethod(lambda x: x)  # the methods of `LatentScale`
    autocast = staticmethod(nullcontext)  # for the networks; maps and losses are float32

    def __init__(self, generator, discriminator, optimizers):
        self.generator, self.discriminator = generator, discriminator
        self.generator_optimizer, self.discriminator_optimizer = optimizers

    def __call__(self, real: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        """Update D, then G, on coefficients of real latents (B, K, 64, 64) and noise (B, noise_dim, 1, 1).

        These are this process's part of the batch, and `weight` is its share.

        Returns:
            (4,): the discriminator's loss, mean D(x) and mean D(G(z)) before its step, and the generator's loss.
        """
        # (1) Update D: minimise -log D(x) - log(1 - D(G(z))), plus a penalty
        with self.autocast():
            t = self.generator(noise)
        fake = self.seen(self.generated(t))
        d_real, d_fake = self._logits(self.seen(real)), self._logits(fake.detach())
        d_loss = cross_entropy(d_real, 1) + cross_entropy(d_fake, 0)
        loss = d_loss + self.penalty(real, d_real)
        _step(self.discriminator, self.discriminator_optimizer, loss * weight)
        # (2) Update G: minimise -log D(G(z))
        g_loss = cross_entropy(self._logits(fake), 1)
        _step(self.generator, self.generator_optimizer, g_loss * weight)
        return torch.stack([d_loss, d_real.sigmoid().mean(), d_fake.sigmoid().mean(), g_loss]).detach()

    def _logits(self, x: Tensor) -> Tensor:
        with self.autocast():  # anew for each call: it keeps a copy of the weights until it ends
            logits = self.discriminator.logits(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def penalty(self, real: Tensor, d_real: Tensor) -> Tensor | float:
        """A further loss of the discriminator, given its logits (B, 1) of real latents."""
        return 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Scalars that resuming needs, each of them also a column of metrics.csv."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`."""


class BalancedUpdate(PlainUpdate):
    """Cross entropy with a weak R1, from a start that is learned from data.

    - Real latents are continuous, cut to what decodes to heads, with a flatter spectrum (`LatentScale.fit`); the
      discriminator sees where it is (`LatentScale.seen`).
    - The generator begins with smooth heads, learned from data (`training.start`). Samples are of its EMA, calibrated.
    - R1 (arXiv 1801.04406, eq. 9) penalises the discriminator's gradient at real latents. Its weight γ is 0.3 while the
      discriminator's lead d, the running mean of D(x) - D(G(z)), is below 0.4, and 0.3 exp(10 (d - 0.4)) above.
    """

    fit_scale = LatentScale.fit
    quantized, calibrated = False, True
    average_decay = 0.995
    most_start_steps = 400
    least_gamma, guard, tolerated_lead, lead_decay = 0.3, 10.0, 0.4, 0.98

    def __init__(self, generator, discriminator, optimizers):
        super().__init__(generator, discriminator, optimizers)
        self.lead = next(discriminator.parameters()).new_zeros(())

    @property
    def gamma(self) -> Tensor:
        return self.least_gamma * (self.guard * (self.lead - self.tolerated_lead).clamp(min=0)).exp()

    def __call__(self, real: Tensor, noise: Tensor, weight: float = 1.0) -> Tensor:
        values = super().__call__(real.requires_grad_(True), noise, weight)
        self.lead.lerp_(distributed.total((values[1] - values[2]) * weight), 1 - self.lead_decay)
        return values

    def penalty(self, real: Tensor, d_real: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(d_real.sum(), real, create_graph=True)
        return self.gamma / 2 * gradient.square().sum((1, 2, 3)).mean()

    def state_dict(self) -> dict[str, Tensor]:
        return {"ahead": self.lead}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.lead.copy_(state["ahead"])


METHODS = {"balanced": BalancedUpdate, "report": PlainUpdate}


def cross_entropy(logits: Tensor, target: int) -> Tensor:
    """Binary cross entropy of logits (B, 1) with one target for all."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _step(network, optimizer, loss: Tensor) -> None:
    """Update one network; only its gradients are computed."""
    optimizer.zero_grad()
    loss.backward(inputs=list(network.parameters()))
    distributed.sum_gradients(network)
    optimizer.step()


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
        self.update.generated, self.update.seen = self.scale.generated, self.scale.seen
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
