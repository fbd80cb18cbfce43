"""The flow's training stage: flow matching along straight paths (Lipman et al. 2022, arXiv 2210.02747)."""

import copy

import torch
from torch import Tensor, nn

from dataset import OasisDataset
from modules import VQVAE, UNet
from priors.checkpoints import load_prior, prior_of
from priors.flow import GUIDE_WIDTHS, FlowPrior
from priors.latent_space import DIRECTIONS
from support import distributed, files, seeds
from support.console import in_batches
from support.device import exact_float32, move
from support.run import Run
from training.fit import falling_rate
from training.prior_stage import PriorStage

STD = 0.7  # of what the network learns, where heads are
AVERAGE_DECAY = 0.999
WARM_UP = 200  # steps
LAST_RATE = 0.02  # the last step's learning rate, as a share of the highest
GRADIENT_NORM = 1.0  # at most
CALIBRATION = 128  # samples


class FlowStage(PriorStage):
    """Train a U-Net v on x_t = (1 - t) ε + t x to predict x - ε, of noise ε and latents x (arXiv 2210.02747, eq. 23).

    Beside it a smaller U-Net, the guide, learns the same from the same batches. flow.pth has the EMA of the weights of
    both after the epoch with the lowest validation loss, for later ones may know the training split by heart. In the
    end it is calibrated.

    Args:
        run, vqvae, train_set, validate_set, n_measures: as in `PriorStage`.
    """

    name, title, prefix = "flow", "Flow", "flow"
    columns, chosen_by = ("flow_loss", "guide_loss"), "validation_loss"
    average_decay = AVERAGE_DECAY

    def __init__(
        self, run: Run, vqvae: VQVAE, train_set: OasisDataset, validate_set: OasisDataset, n_measures: int = 10
    ):
        super().__init__(run, vqvae, train_set, validate_set, run.options.flow_epochs, n_measures)
        options, fast_path = run.options, run.fast_path
        self.batch_size, self.lr = options.flow_batch_size, options.flow_lr
        torch.manual_seed(seeds.derived_seed(options.seed, "flow weights"))
        embeddings_dim = vqvae.vector_quantizer.embedding.embedding_dim
        channels = 4 * min(DIRECTIONS, embeddings_dim)
        self.networks = {"flow": UNet(channels), "guide": UNet(channels, GUIDE_WIDTHS)}
        for network in self.networks.values():
            network.to(run.device, memory_format=fast_path.layout)
        self.averages = copy.deepcopy(self.networks)
        self.optimizers = {name: fast_path.adam(network, self.lr) for name, network in self.networks.items()}
        if self.name in run.state:
            with run.restoring():
                factor = run.state[self.name]["extra"]["factor"]
        else:
            heads = self.latents.spaced()[:, :, self.space.support.bool()]
            factor = STD / max(heads.std().item(), 1e-6)
        averages = self.averages["flow"], self.averages["guide"]
        self.prior = FlowPrior(*averages, factor, self.space, vqvae, run.phantoms, steps=options.flow_steps)
        self.prior.autocast = fast_path.autocast

    def start(self) -> None:
        self.samples.begin(self.prior)

    def step(self, batch: Tensor, n: int, step: int, rng: torch.Generator) -> Tensor:
        """One update of each network on coefficients of latents (B, K, 64, 64). Returns their losses."""
        drawn = [move(distributed.part(each), batch.device) for each in self.drawn(n, rng)]
        losses = []
        for name, network in self.networks.items():
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = self.lr * self.rate(step)
            loss = self.losses(network, batch, *drawn).mean()
            optimizer.zero_grad()
            (loss * distributed.weight(n)).backward()
            distributed.sum_gradients(network)
            nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def rate(self, step: int) -> float:
        """A step's learning rate as a share of the highest: it rises in WARM_UP steps and falls along a cosine."""
        return min(1.0, (step + 1) / WARM_UP) * falling_rate(step, self.n_steps, 0.0, LAST_RATE)

    def drawn(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Times (n,) with a normal logit (arXiv 2403.03206, section 3.1), and the noise of n images; on the CPU."""
        return torch.randn(n, generator=rng).sigmoid(), self.prior.noise(n, rng)

    def losses(self, network: UNet, c: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The mean squared error of each image, of coefficients (B, K, 64, 64) at times (B,): (B,)."""
        x = self.prior.packed(c)
        with self.run.fast_path.autocast():
            found = network(torch.lerp(noise, x, t[:, None, None, None]), t)
        return (found.float() - (x - noise)).square().mean((1, 2, 3))

    def evaluate(self, epoch: int) -> dict[str, float]:
        """The validation loss; and, when they are due, the measures of the calibrated prior."""
        prior = self.prior
        if self.samples.are_measured(epoch) and distributed.is_first():
            prior = self.calibrated(prior)
        return {"validation_loss": self.validation_loss()} | self.samples.measure(prior, epoch)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The mean loss of the flow's averaged weights on the validation split, each time with the same noise."""
        rng, losses = seeds.generator(self.run.options.seed, "flow validation"), []
        for c in in_batches(self.validate_latents, desc="Validating"):
            drawn = (move(each, c.device) for each in self.drawn(len(c), rng))
            losses.append(self.losses(self.averages["flow"].eval(), c, *drawn))
        return torch.cat(losses).mean().item()

    def calibrated(self, prior: FlowPrior) -> FlowPrior:
        noise = self.samples.noise(prior, min(CALIBRATION, len(self.latents)), "calibration")
        return prior.calibrated(self.latents.covariance, noise)

    def drawn_now(self, epoch: int) -> bool:
        """After the first epoch, and with each measure, for samples take long."""
        return epoch == 1 or self.samples.are_measured(epoch)

    def print_losses(self, row: dict) -> None:
        self.run.say(f"Training loss: {row['flow_loss']:.4f}")
        self.run.say(f"Validation loss: {row['validation_loss']:.4f}")

    def draw_losses(self, history: dict[str, list[float]]) -> None:
        losses, rows = history["flow_loss"], self.run.rows_of(self.name)
        self.figures.losses("flow_losses.png", losses, rows, "Flow training", "flow_loss", "validation_loss")

    def save_weights(self, row: dict) -> None:
        if row is self._best_row():
            files.save(self.prior.checkpoint(), self.run.folder / "flow.pth")

    def _best_row(self) -> dict:
        return min(self.run.rows_of(self.name), key=lambda row: row[self.chosen_by])  # the earliest of equal ones

    def extra_state(self) -> dict:
        return super().extra_state() | {"factor": self.prior.factor}

    @exact_float32()
    def best(self) -> FlowPrior:
        """Calibrate the prior in flow.pth, and return it, on the run's device."""
        return prior_of(distributed.from_first(self._calibrate_best), self.vqvae)

    def _calibrate_best(self) -> dict:
        row, path = self._best_row(), self.run.folder / "flow.pth"
        self.run.say(f"Best epoch: {row['epoch']}, validation loss {row['validation_loss']:.4f}")
        contents = self.calibrated(load_prior(path, self.vqvae)).checkpoint()  # samples as predict.py will
        files.save(contents, path)
        return contents
