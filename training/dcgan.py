"""The DCGAN's training stage (Radford et al. 2015, arXiv 1511.06434)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dataset import OasisDataset
from modules import VQVAE, Discriminator, Generator, dcgan_init
from priors.checkpoints import PRIORS
from priors.dcgan import DCGANPrior
from priors.latent_cache import COMPARED, LatentCache
from priors.latent_space import LatentSpace
from support import distributed, files, seeds
from support.console import in_batches
from support.device import exact_float32, move
from support.run import Run, restoring
from training.fit import Stage, save_start
from training.recipes import DCGAN, DCGANRecipe
from training.samples import Samples
from training.start import start_generator


class DCGANStage(Stage):
    """Train the generator and the discriminator against each other. generator.pth has the EMA of the generator.

    Real and generated samples are coefficients (B, K, 64, 64): K numbers at each position, which `LatentSpace` makes of
    latents.

    Args:
        run, vqvae, train_set, validate_set: all on the run's device.
        recipe: constants of the training, beside the options; by default the one of `--dcgan-training`.
    """

    name, title = "dcgan", PRIORS["dcgan"].title
    # it falls as long as anything improves, and rises where D memorises
    chosen_by = ("texture_auc", min, "AUC of texture {:.3f}")
    columns = ("d_loss", "d_real", "d_fake", "g_loss")

    @exact_float32()
    def __init__(
        self,
        run: Run,
        vqvae: VQVAE,
        train_set: OasisDataset,
        validate_set: OasisDataset,
        recipe: DCGANRecipe | None = None,
    ):
        super().__init__(run)
        options, fast_path = run.options, run.fast_path
        self.recipe = recipe or DCGAN[options.dcgan_training]
        self.epochs, self.batch_size = options.dcgan_epochs, options.dcgan_batch_size
        self.autocast = fast_path.autocast
        self.average_decay = self.recipe.average_decay
        self.samples = Samples(run, self.name, vqvae, train_set, validate_set, self.epochs)
        embeddings_dim = vqvae.vector_quantizer.embedding.embedding_dim
        if self.name in run.state:
            with restoring(run.folder):
                saved = run.state[self.name]["extra"]
                space = LatentSpace(**saved["space"])
                gain = saved["gain"]
                gain = None if gain is None else gain.to(run.device)
        else:
            space = self._fit_space(vqvae, train_set)
            gain = None
        self.space = space.to(run.device)
        self.data = LatentCache(vqvae, train_set, self.space, self.recipe.quantized)
        self.validate_latents = LatentCache(vqvae, validate_set, self.space, self.recipe.quantized)

        torch.manual_seed(seeds.derived_seed(options.seed, "dcgan weights"))
        self.generator = Generator(embeddings_dim).apply(dcgan_init)
        self.discriminator = Discriminator(embeddings_dim).apply(dcgan_init)
        self.average = copy.deepcopy(self.generator).to(run.device, memory_format=fast_path.layout)
        self.networks = {"generator": self.generator, "discriminator": self.discriminator}
        self.averages = {"generator": self.average}
        self.optimizers = {}
        for name, network in self.networks.items():
            # in place: several processes then share BatchNorm's statistics
            network = distributed.synchronize_batch_norm(network).to(run.device, memory_format=fast_path.layout)
            self.optimizers[name] = fast_path.adam(network, options.dcgan_lr, options.dcgan_betas)
        self.begun: dict = {}  # step and optimizer of a start that was interrupted
        self.prior = DCGANPrior(self.average, self.space, vqvae, run.phantoms, gain)

    def _fit_space(self, vqvae: VQVAE, train_set: OasisDataset) -> LatentSpace:
        directions, emphasis = self.recipe.directions, self.recipe.emphasis
        if directions is None:
            return LatentSpace.of_codebook(vqvae)
        return distributed.from_first(lambda: LatentSpace.fit(vqvae, train_set, directions, emphasis).to("cpu"))

    def start(self) -> None:
        """Fit the generator to real coefficients by mean squared error."""
        # the average's BatchNorm is local; the generator's would wait for the other processes
        weights = distributed.from_first(self._start_average)
        for generator in (self.average, self.generator):
            generator.load_state_dict(weights)
        self.begun = {}
        self.samples.begin(self.prior)

    def _start_average(self) -> dict[str, Tensor]:
        fast_path = self.run.fast_path
        optimizer = fast_path.adam(self.average, self.recipe.start_lr)
        n_steps = self.n_steps if self.recipe.start_lr else 0
        first = 0
        if self.begun:
            fast_path.load_adam(optimizer, self.begun["optimizer"])
            first = self.begun["step"]
        settings = (self.batch_size, fast_path, self.run.options.seed)
        for step in start_generator(self.average, optimizer, self.data, range(first, n_steps), *settings):
            self.begun = {"step": step, "optimizer": optimizer.state_dict()}
            save_start(self, self.run, complete=False)
        return files.cpu_state(self.average)

    def step(self, batch: Tensor, n: int, step: int, rng: torch.Generator) -> Tensor:
        """One update of each network on real coefficients (B, K, 64, 64).

        Binary cross entropy, with the non-saturating loss for the generator (arXiv 1406.2661, section 3). Real and
        generated coefficients go through the discriminator in separate batches.

        Returns:
            (4,): the discriminator's loss without R1, mean D(x) and mean D(G(z)) before its step, the generator's loss.
        """
        gamma = self.recipe.r1
        weight = distributed.weight(n)
        noise = move(distributed.part(self.prior.noise(n, rng)), batch.device)
        real = batch.requires_grad_(gamma > 0)

        # (1) Update D: minimise -log D(x) - log(1 - D(G(z))) + γ/2 |∇x logit D(x)|²
        with self.autocast():
            fake = self.space.to_coefficients(self.generator(noise))
        d_real = self._logits(self.discriminator, real)
        d_fake = self._logits(self.discriminator, fake.detach())
        d_loss = _cross_entropy(d_real, 1) + _cross_entropy(d_fake, 0)
        loss = d_loss
        if gamma:
            (gradient,) = torch.autograd.grad(d_real.sum(), real, create_graph=True)
            loss = loss + gamma / 2 * gradient.square().sum((1, 2, 3)).mean()
        _update(self.discriminator, self.optimizers["discriminator"], loss * weight)

        # (2) Update G: minimise -log D(G(z))
        g_loss = _cross_entropy(self._logits(self.discriminator, fake), 1)
        _update(self.generator, self.optimizers["generator"], g_loss * weight)

        mean_real = d_real.detach().sigmoid().mean()
        mean_fake = d_fake.detach().sigmoid().mean()
        return torch.stack([d_loss.detach(), mean_real, mean_fake, g_loss.detach()])

    def _logits(self, discriminator: Discriminator, c: Tensor) -> Tensor:
        """float32, of coefficients (B, K, 64, 64): (B, 1)."""
        with self.autocast():  # one for each call: it caches bfloat16 weights, and an update makes these stale
            logits = discriminator.logits(c, self.space.mix)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Calibrate the prior, and measure it when that is due."""
        columns = {"d_validate": self._d_of_validation()}
        noise = self.samples.noise(self.prior, min(COMPARED, len(self.data)), "calibration")
        if self.recipe.average_decay:
            self.prior.reset_batch_norm(noise)
        if self.recipe.calibrated:
            self.prior = self.prior.calibrated(self.data.covariance, noise)
        return columns | self.samples.measure(self.prior, epoch)

    @torch.no_grad()
    def _d_of_validation(self) -> float:
        """Mean D(x) of the validation split. It is far below `d_real` where D has memorised the training split."""
        discriminator = copy.deepcopy(self.discriminator)  # BatchNorm's statistics change
        # shuffled: in file order a batch would be of two subjects, and BatchNorm's statistics theirs
        rng = seeds.generator(self.run.options.seed, "validation order")
        order = torch.randperm(len(self.validate_latents), generator=rng)
        batches = in_batches(self.validate_latents, order, self.batch_size, desc="D on validation")
        return torch.cat([self._logits(discriminator, c).sigmoid() for c in batches]).mean().item()

    def draw(self, row: dict, history: dict[str, list[float]]) -> None:
        self.samples.draw(self.prior, row["epoch"])
        print(f"Epoch: {row['epoch']}")
        self.run.say(f"Discriminator loss: {row['d_loss']:.4f}")
        self.run.say(f"Generator loss: {row['g_loss']:.4f}")
        self.run.say(f"D(x): {row['d_real']:.3f}, D(G(z)): {row['d_fake']:.3f}")
        self.run.say(f"D(x) of the validation split: {row['d_validate']:.3f}")
        self.samples.figures.gan_losses("gan_losses.png", history)
        self.samples.print_measures(self.run.rows_of(self.name))

    def save_weights(self) -> None:
        files.save(self.prior.checkpoint(), self.run.folder / "generator.pth")
        files.save(files.cpu_state(self.discriminator), self.run.folder / "discriminator.pth")

    def extra_state(self) -> dict:
        state = {"space": vars(self.space.to("cpu")), "gain": self.prior.gain, "begun": self.begun}
        return self.samples.state_dict() | state

    def load_extra_state(self, state: dict) -> None:
        self.begun = state["begun"]


def _cross_entropy(logits: Tensor, target: int) -> Tensor:
    """Binary cross entropy of logits (B, 1) with one target for all."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _update(network: nn.Module, optimizer: Optimizer, loss: Tensor) -> None:
    """Update one network; only its gradients are computed."""
    optimizer.zero_grad()
    loss.backward(inputs=list(network.parameters()))
    distributed.sum_gradients(network)
    optimizer.step()
