"""The training stage of the prior over codes (van den Oord et al. 2017, arXiv 1711.00937, section 3.3)."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dataset import OasisDataset
from modules import MOST_DISTANCE, N_PLANES, VQVAE, Autoregressive, Condition
from priors.autoregressive import AutoregressivePrior, Frame, fit_frame
from priors.checkpoints import PRIORS
from priors.code_cache import CodeCache
from support import distributed, files, seeds
from support.device import exact_float32, move
from support.run import Run, restoring
from training.fit import Stage, rate_factor
from training.recipes import AUTOREGRESSIVE
from training.samples import Samples

VALIDATION_BATCH = 32


class ConditionDraw(NamedTuple):
    """Which conditions n slices have in training.

    Attributes:
        distance: (n, 2), of neighbours below and above, 1 to MOST_DISTANCE planes; 0 for none.
        plane_dropped: (n,), whether the plane is not known.
        replaced: (n, 2, 64, 64), which codes of neighbours are replaced by those of other slices.
        donors: (n, 2), these slices.
    """

    distance: Tensor
    plane_dropped: Tensor
    replaced: Tensor
    donors: Tensor


class AutoregressiveStage(Stage):
    """Train the distribution of codes by its log likelihood.

    autoregressive.pth has the EMA of the weights after the epoch in which validation slices have the fewest bits: later
    ones may overfit.

    Args:
        run, vqvae, train_set, validate_set: all on the run's device.
    """

    name, title = "autoregressive", PRIORS["autoregressive"].title
    columns = ("bits",)
    chosen_by = ("validation_bits", min, "{:.0f} bits of a validation image")

    @exact_float32()
    def __init__(self, run: Run, vqvae: VQVAE, train_set: OasisDataset, validate_set: OasisDataset):
        super().__init__(run)
        options = run.options
        fast_path = run.fast_path
        recipe = AUTOREGRESSIVE
        self.average_decay = recipe.average_decay
        self.epochs, self.batch_size = options.autoregressive_epochs, options.autoregressive_batch_size
        self.lr = options.autoregressive_lr
        self.samples = Samples(run, self.name, vqvae, train_set, validate_set, self.epochs)
        frame = None
        if self.name in run.state:
            with restoring(run.folder):
                saved = run.state[self.name]["extra"]
                frame = Frame(**saved["frame"])
        self.data, self.validate_codes = CodeCache(vqvae, train_set), CodeCache(vqvae, validate_set)
        self.frame = frame or distributed.from_first(lambda: fit_frame(self.data.codes))
        torch.manual_seed(seeds.derived_seed(options.seed, "autoregressive weights"))
        codebook = vqvae.vector_quantizer.embedding.weight.detach()
        self.network = Autoregressive(codebook, self.frame.size, recipe.width, recipe.dilations, recipe.hidden)
        for parameter in self.network.parameters():  # principal components may have other signs on another machine
            distributed.copy_first(parameter.data)
        self.network.to(run.device, memory_format=fast_path.layout)
        average = copy.deepcopy(self.network)
        self.networks = {"autoregressive": self.network}
        self.averages = {"autoregressive": average}
        self.optimizer = fast_path.adam(self.network, self.lr)
        self.optimizers = {"autoregressive": self.optimizer}
        planes = sorted(set(self.data.plane.tolist()) - {N_PLANES})
        self.prior = AutoregressivePrior(average, self.frame, vqvae, planes, run.phantoms)

    def start(self) -> None:
        self.samples.begin(self.prior)

    def step(self, batch: Tensor, n: int, step: int, rng: torch.Generator) -> Tensor:
        """One update on the slices of indices (B,). Returns their mean bits."""
        factor = min(1.0, (step + 1) / AUTOREGRESSIVE.warm_up)
        factor *= rate_factor(step, self.n_steps, AUTOREGRESSIVE.constant_rate, AUTOREGRESSIVE.last_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        conditions = ConditionDraw(*map(distributed.part, self.draw_conditions(n, rng)))
        bits = self.bits(self.network, self.data, batch, conditions).mean()
        loss = bits / self.frame.codes.numel()  # the mean over codes, for whose gradient `gradient_norm` is made
        self.optimizer.zero_grad()
        (loss * distributed.weight(n)).backward()
        distributed.sum_gradients(self.network)
        nn.utils.clip_grad_norm_(self.network.parameters(), AUTOREGRESSIVE.gradient_norm)
        self.optimizer.step()
        return bits.detach()[None]

    def draw_conditions(self, n: int, rng: torch.Generator) -> ConditionDraw:
        """Draw which conditions n slices have."""
        recipe = AUTOREGRESSIVE
        distance = ((MOST_DISTANCE + 1) ** torch.rand(n, 1, generator=rng)).long().expand(n, 2)  # small ones most often
        alone = torch.rand(n, 1, generator=rng) < recipe.without_neighbours
        left_out = torch.rand(n, 2, generator=rng) < recipe.without_one
        plane_dropped = torch.rand(n, generator=rng) < recipe.without_plane
        share = recipe.exchanged * torch.rand(n, 1, 1, 1, generator=rng)
        replaced = torch.rand(n, 2, *self.frame.codes.shape, generator=rng) < share
        donors = torch.randint(len(self.data), (n, 2), generator=rng)
        return ConditionDraw(distance.masked_fill(alone | left_out, 0), plane_dropped, replaced, donors)

    def bits(self, network: Autoregressive, codes: CodeCache, indices: Tensor, draw: ConditionDraw) -> Tensor:
        """The bits of slices (B,) of a split, given the conditions that were drawn for them: (B,)."""
        condition = codes.condition(indices, draw.distance)
        donors = move(self.data.codes[draw.donors], self.run.device).long()
        neighbours = torch.where(move(draw.replaced, self.run.device), donors, condition.neighbours)
        plane = condition.plane.masked_fill(move(draw.plane_dropped, self.run.device), N_PLANES)
        box = self.frame.box
        condition = Condition(plane, neighbours[:, :, *box], condition.distance)
        with self.run.fast_path.autocast():
            bits = network(codes.batch(indices)[:, *box], condition)
        return bits.sum((1, 2))

    def evaluate(self, epoch: int) -> dict[str, float]:
        """The validation split's bits, with the same conditions in each epoch; and measures, when they are due."""
        return {"validation_bits": self.validation_bits()} | self.samples.measure(self.prior, epoch)

    @torch.no_grad()
    def validation_bits(self) -> float:
        """The mean bits of validation slices by the averaged weights."""
        rng = seeds.generator(self.run.options.seed, "autoregressive validation")
        bits = []
        network = self.averages["autoregressive"].eval()
        for indices in torch.arange(len(self.validate_codes)).split(VALIDATION_BATCH):
            bits.append(self.bits(network, self.validate_codes, indices, self.draw_conditions(len(indices), rng)))
        return torch.cat(bits).mean().item()

    def draw(self, row: dict, history: dict[str, list[float]]) -> None:
        self.samples.draw(self.prior, row["epoch"])
        print(f"Epoch: {row['epoch']}")
        self.run.say(f"Bits an image: {row['bits']:.0f}")
        self.run.say(f"Bits of a validation image: {row['validation_bits']:.0f}")
        bits = history["bits"]
        rows = self.run.rows_of(self.name)
        title = "Training of the autoregressive prior"
        columns = ("bits", "validation_bits")
        unit = "bits an image"
        self.samples.figures.losses("autoregressive_losses.png", bits, rows, title, *columns, unit=unit)
        self.samples.print_measures(rows)

    def save_weights(self) -> None:
        files.save(self.prior.checkpoint(), self.run.folder / "autoregressive.pth")

    def extra_state(self) -> dict:
        return self.samples.state_dict() | {"frame": self.frame._asdict()}
