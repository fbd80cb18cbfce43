"""The training loop, shared by all stages."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import Dataset

from dataset import make_loader
from report import page
from support import console, distributed, files, seeds
from support.console import UserError
from support.device import exact_float32
from support.run import Run, restoring

CHECK_EVERY = 50  # steps between checks for NaN and infinity (each check synchronizes a GPU)


class Stage:
    """What `fit` trains. A stage sets the attributes and implements `step`; other methods are optional.

    Attributes:
        name, title: in files (and a key of `support.seeds.STREAMS`), and on the console.
        columns: tuple of names of the values that `step` returns; their means over images go into metrics.csv.
        epochs, batch_size: number of epochs, and images in a step of all processes together.
        data: the data set that batches are drawn from.
        average_decay: of the exponential moving average (EMA) of the weights.
        chosen_by: the column of metrics.csv that chooses the epoch whose weights are kept, `max` or `min`, and a text
            in which its value is put.
        networks, optimizers: dicts of what is trained, by name.
        averages: dict of the EMA copies of networks, under the same names.
    """

    chosen_by: tuple[str, Callable, str]
    data: Dataset

    def __init__(self, run: Run):
        self.run = run

    def start(self) -> None:
        """Prepare training: what depends on the data, and figures before the first epoch. Skipped where it is saved.

        A long one may call `save_start` with complete=False, and go on from there.
        """

    @classmethod
    def kept_row(cls, rows: list[dict]) -> dict:
        """The row of the epoch whose weights are kept, among a stage's rows of metrics.csv; of equal ones the last.

        Rows without the measure that chooses do not count, unless all lack it.
        """
        column, best, _ = cls.chosen_by
        measured = [row for row in rows if math.isfinite(row.get(column, math.nan))]
        return best(reversed(measured), key=lambda row: row[column]) if measured else rows[-1]

    @property
    def n_steps(self) -> int:
        """Number of steps of all epochs."""
        return self.epochs * len(batch_sizes(len(self.data), self.batch_size))

    def step(self, batch: Tensor, n: int, step: int, rng: torch.Generator) -> Tensor:
        """Update the networks once.

        Args:
            batch: this process's part of a batch of n images.
            step: 0, 1, … of this stage, across epochs.
            rng: the epoch's random generator, on the CPU and the same on all ranks.

        Returns:
            (len(columns),): the values of `columns` of this process's part.
        """
        raise NotImplementedError

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Return further columns of metrics.csv; called on all ranks after each epoch."""
        return {}

    def draw(self, row: dict, history: dict[str, list[float]]) -> None:
        """Print and draw an epoch; called on rank 0.

        `row` is the epoch's row of metrics.csv, the last of `run.rows`; `history` has each column's values by step.
        """

    def save_weights(self) -> None:
        """Write the weights that a user loads; called on rank 0, after `draw`, if the epoch is the best so far."""

    def extra_state(self) -> dict:
        """What resuming needs besides networks, averages and optimizers; called on all ranks; rank 0's is saved."""
        return {}

    def load_extra_state(self, state: dict) -> None:
        """Restore what `extra_state` returned."""

    def state_dict(self) -> dict[str, dict]:
        """Everything that resuming needs, under the same keys for every stage."""
        state = {}
        for key in ("networks", "averages", "optimizers"):
            state[key] = {name: each.state_dict() for name, each in getattr(self, key).items()}
        return state | {"extra": self.extra_state()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Restore what `state_dict` returned."""
        for key in ("networks", "averages"):
            for name, network in getattr(self, key).items():
                files.load_state(network, state[key][name])
        for name, optimizer in self.optimizers.items():
            self.run.fast_path.load_adam(optimizer, state["optimizers"][name])
        self.load_extra_state(state["extra"])


def fit(stage: Stage, run: Run) -> None:
    """Train a stage to its last epoch, resuming after the last complete one, or after its start.

    Prints the epoch whose weights are kept.

    Raises UserError if a loss or weight is not finite, or if the run's state does not fit the stage.
    """
    done = run.epochs_of(stage.name)
    history = {column: [] for column in stage.columns}
    saved = run.state.get(stage.name)
    started = False
    if saved:
        with restoring(run.folder):
            stage.load_state_dict(saved)
            started = bool(saved["started"])
            history = {column: [float(value) for value in saved["history"][column]] for column in stage.columns}
    if not started:
        with exact_float32():
            stage.start()
        save_start(stage, run)

    for epoch in range(done + 1, stage.epochs + 1):
        # Train.
        began = time.perf_counter()
        losses = train_epoch(stage, epoch, run.options.seed)
        trained = time.perf_counter()
        seconds = trained - began

        # Evaluate.
        sizes = batch_sizes(len(stage.data), stage.batch_size)
        row = {"stage": stage.name, "epoch": epoch, "updates": len(losses), "seconds": round(seconds, 2)}
        row |= {"images_per_second": round(len(stage.data) / seconds, 2)}
        row |= {column: mean_over_images(losses[:, i], sizes) for i, column in enumerate(stage.columns)}
        with exact_float32():
            row |= stage.evaluate(epoch)
        evaluated = time.perf_counter()
        for i, column in enumerate(stage.columns):
            history[column] += losses[:, i].tolist()
        state = {"epoch": epoch, "started": True, "history": history} | stage.state_dict()

        # Draw and save. The epoch is complete when run.save() returns; interrupted before, it is trained again.
        if distributed.is_first():
            run.rows.append(row)
            with exact_float32():
                stage.draw(row, history)
            if row is stage.kept_row(run.rows_of(stage.name)):
                stage.save_weights()
            row["evaluation_seconds"] = round(evaluated - trained, 2)
            row["other_seconds"] = round(run.take_seconds() - (evaluated - began), 2)
            run.state[stage.name] = state
            run.save()
            page.write_run(run.folder)
    if distributed.is_first():
        column, _, text = stage.chosen_by
        row = stage.kept_row(run.rows_of(stage.name))
        value = row.get(column, math.nan)
        why = text.format(value) if math.isfinite(value) else "the last one, because none was measured"
        run.say(f"Best epoch: {row['epoch']}, {why}")


def save_start(stage: Stage, run: Run, complete: bool = True) -> None:
    """Save a stage before its first epoch. One whose start is not complete is asked to `start` again on resuming."""
    history = {column: [] for column in stage.columns}
    state = {"epoch": 0, "started": complete, "history": history} | stage.state_dict()
    if distributed.is_first():
        run.state[stage.name] = state
        run.save()


def train_epoch(stage: Stage, epoch: int, seed: int) -> Tensor:
    """Train one epoch. Returns the values of each step, means over its batch: (steps, columns) on the CPU."""
    data = stage.data
    rng = seeds.generator(seed, stage.name, epoch)
    loader = make_loader(data, stage.batch_size, rng)
    sizes = batch_sizes(len(data), stage.batch_size)
    where = f"{stage.title} epoch {epoch}"
    step = (epoch - 1) * len(loader)
    values = []
    for network in stage.networks.values():
        network.train()
    with console.progress(total=len(data), desc=f"{where}/{stage.epochs}", unit=" images") as bar:
        for batch, n in zip(loader, sizes, strict=True):
            losses = stage.step(batch, n, step, rng)
            values.append(losses * distributed.weight(n))
            step += 1
            for name, average in stage.averages.items():
                update_average(average, stage.networks[name], step, stage.average_decay)
            if step % CHECK_EVERY == 0:
                check_finite(losses[None], where, step)
            bar.update(n)
            console.stop_if_signalled()
    values = distributed.total(torch.stack(values)).cpu()
    check_finite(values, where, step)
    for network in (*stage.networks.values(), *stage.averages.values()):
        # losses precede the last update, which may have made weights infinite
        check_finite(torch.cat([p.detach().flatten().float() for p in network.parameters()])[None], where, step)
    return values


def rate_factor(step: int, n_steps: int, constant: float, last: float) -> float:
    """The learning rate in step 0, 1, … of n_steps, divided by the highest one.

    It is 1 for a share `constant` of the steps and then falls to `last` along half a period of a cosine (Loshchilov and
    Hutter 2017, arXiv 1608.03983, eq. 5). After n_steps it stays there.
    """
    progress = (step / n_steps - constant) / max(1 - constant, 1e-9)  # 1 never falls
    return last + (1 - last) * (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, step: int, decay: float) -> None:
    """Update the EMA of the weights and of BatchNorm's statistics after step 1, 2, … of a stage.

    Early in training it decays faster than by `decay`: the mean age of the weights in it is a quarter of all steps.
    """
    averaged = average.state_dict()
    current = network.state_dict()
    floats = [name for name, value in averaged.items() if value.is_floating_point()]
    update = get_ema_multi_avg_fn(min(decay, (1 + step) / (4 + step)))
    update([averaged[name] for name in floats], [current[name] for name in floats], None)  # on CUDA in one operation
    for name in averaged.keys() - set(floats):  # BatchNorm's count of batches
        averaged[name].copy_(current[name])


def check_finite(values: Tensor, where: str, step: int) -> None:
    """Raise UserError if a value is not finite. `values` has one row for each step, the last one for `step`."""
    bad = ~values.isfinite().reshape(len(values), -1).all(1)
    if bad.any():
        first = step - len(values) + 1 + int(bad.nonzero()[0])
        raise UserError(f"{where}, step {first}: loss or weights not finite; try a lower learning rate")


def batch_sizes(n_images: int, batch_size: int) -> list[int]:
    """Number of images in each step of an epoch. The last batch may be smaller."""
    return [min(batch_size, n_images - start) for start in range(0, n_images, batch_size)]


def mean_over_images(values: Tensor, sizes: list[int]) -> float:
    """The mean over images, given the means of batches (steps,) on the CPU."""
    return (values.double() @ torch.tensor(sizes).double()).item() / sum(sizes)
