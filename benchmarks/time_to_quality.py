"""Minutes of training until validation SSIM passes some levels: ours, the report's style and two packages.

    pip install -r benchmarks/requirements.txt       # the packages; sides whose package is missing are left out
    python benchmarks/time_to_quality.py --data DIR --out FOLDER        # up to two hours on two cores

Each side trains on the CPU in a process of its own, one after another, on the same batches with the report's batch
size, Adam and learning rate, as its own documentation has it; ours as `train.py` does, in a run of 12 epochs, and on
some processors in bfloat16. Every 50 steps SSIM is measured on one validation image of each subject, by
`evaluation.reconstruction.ssim`; that is not counted as training. A side ends when it has passed every level, or at the
first such measurement after half an hour.

FOLDER gets time_to_quality.png and time_to_quality.csv; the table is printed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peers
import torch
from speed import new_run
from torch import Tensor, nn

from dataset import OasisDataset, describe, make_loader
from evaluation import reconstruction
from preparation import phantoms
from report.plots import Figures
from support import console, files, seeds
from support.console import UserError
from support.device import exact_float32
from training.fit import update_average
from training.options import Options
from training.vqvae import VQVAEStage

LEVELS = {"the report, 12 epochs": 0.8407, "0.90": 0.90, "0.95": 0.95}
EVERY = 50  # steps
MOST_SECONDS = 1800.0


def batches(train_set: OasisDataset) -> Iterator[Tensor]:
    """Batches without end, the same for every side."""
    epoch = 0
    while True:
        epoch += 1
        yield from make_loader(train_set, Options.batch_size, seeds.generator(0, "vqvae", epoch))


def ours(train_set: OasisDataset, validate_set: OasisDataset) -> tuple[Callable[[Tensor], None], nn.Module]:
    """A step of train.py on a batch, and the averaged network that it scores."""
    run = new_run(torch.device("cpu"))
    run.fast_path.set_up()
    stage = VQVAEStage(run, train_set, validate_set)
    rng = seeds.generator(0, "vqvae", 1)
    n_steps = 0

    def step(x: Tensor) -> None:
        nonlocal n_steps
        stage.step(x, len(x), n_steps, rng)
        n_steps += 1
        update_average(stage.average, stage.vqvae, n_steps, stage.average_decay)

    stage.vqvae.train()
    print(f"ours: {run.fast_path}", file=sys.stderr)
    return step, stage.average


def peer(name: str) -> tuple[Callable[[Tensor], None], nn.Module]:
    torch.manual_seed(0)
    network = peers.VQVAES[name]()
    return peers.vqvae_step(network), network


SIDES = ("ours", *peers.VQVAES)


@exact_float32()
@torch.no_grad()
def mean_ssim(network: nn.Module, images: Tensor) -> float:
    """Mean SSIM of images (N, 1, 256, 256); the network's mode stays."""
    training = network.training
    network.eval()
    x_hat = torch.cat([network(x)[1].float() for x in images.split(16)])
    network.train(training)
    return reconstruction.ssim(images, x_hat).mean().item()


def train(step: Callable, network: nn.Module, train_set: OasisDataset, images: Tensor, most: float) -> list[tuple]:
    """Rows of steps, seconds of training and SSIM until the highest level is passed, or `most` seconds."""
    rows = []
    seconds = 0.0
    for n, x in enumerate(batches(train_set), 1):
        started = time.perf_counter()
        step(x)
        seconds += time.perf_counter() - started
        if n % EVERY == 0:
            rows.append((n, seconds, mean_ssim(network, images)))
            print(f"{n} steps, {seconds:.0f} s: SSIM {rows[-1][2]:.4f}", file=sys.stderr)
            if rows[-1][2] > max(LEVELS.values()) or seconds > most:
                return rows


def train_side(name: str, data: str, most: float) -> list[tuple]:
    """The rows of `train` of one side. Raises UserError if its package is missing."""
    train_set, validate_set = (OasisDataset(data, split) for split in ("train", "validate"))
    subjects = [validate_set.subject(i) for i in range(len(validate_set))]
    first = [subjects.index(subject) for subject in dict.fromkeys(subjects)]
    # one plane further up from subject to subject, so that all are seen
    images = validate_set.batch([i + k % subjects.count(subjects[i]) for k, i in enumerate(first)])
    print(f"Data: {describe(train_set, validate_set)}; SSIM of {len(images)} images", file=sys.stderr)
    try:
        step, network = ours(train_set, validate_set) if name == "ours" else peer(name)
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; see benchmarks/requirements.txt") from None
    return train(step, network, train_set, images, most)


def first_passing(rows: list[tuple], level: float) -> str:
    """Minutes until SSIM was first above a level, as text."""
    return next((f"{seconds / 60:.1f}" for _, seconds, ssim in rows if ssim > level), "not reached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", required=True, help="OASIS folder")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="folder of the figure, which exists")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="(default: all)")
    parser.add_argument("--seconds", type=float, default=MOST_SECONDS, help=f"(default: {MOST_SECONDS:.0f})")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # this process's own
    o = parser.parse_args()
    if not o.out.is_dir():
        parser.error(f"--out {o.out}: no such folder")
    if o.side:
        print(json.dumps(train_side(o.side, o.data, o.seconds)))
        return
    measured = {}
    for name in o.sides:
        print(f"{name} …", flush=True)
        command = [sys.executable, __file__, "--data", o.data, "--out", o.out, "--seconds", o.seconds, "--side", name]
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name}: left out, for it failed")
            continue
        measured[name] = json.loads(done.stdout.splitlines()[-1])

    print(
        "\n| minutes until SSIM passes | " + " | ".join(LEVELS) + " | last SSIM |\n|---|" + "---:|" * (len(LEVELS) + 1)
    )
    for name, rows in measured.items():
        cells = [first_passing(rows, level) for level in LEVELS.values()]
        print(f"| {name} | " + " | ".join(cells) + f" | {rows[-1][2]:.4f} |")
    table = [(name, *row) for name, rows in measured.items() for row in rows]
    files.write_csv(o.out / "time_to_quality.csv", ("side", "steps", "seconds", "ssim"), table)
    curves = {name: ([s / 60 for _, s, _ in rows], [ssim for *_, ssim in rows]) for name, rows in measured.items()}
    label = f"minutes of training on {torch.get_num_threads()} threads (log scale)"
    title = "Validation SSIM by time of training, an image of each subject"
    Figures(o.out, phantoms.are_in(o.data)).curves("time_to_quality.png", curves, title, label, LEVELS)


if __name__ == "__main__":
    console.run_program(main, "time_to_quality.py")
