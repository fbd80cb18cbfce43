"""Training steps and scoring, ours beside others', and beside what the machine can do.

    pip install -r benchmarks/requirements.txt           # the peers; sides whose package is missing are left out
    python benchmarks/speed.py                           # every part, about ten minutes on two cores
    python benchmarks/speed.py dcgan --rounds 20         # some parts; --help lists them

Each side runs in a process of its own, so that none profits from another's settings. The processes wait while one of
them works, and take turns: in each round every side does its work once. Before the first round each does it three
times (caches, allocators). What is printed is the median over rounds, with the smallest and the largest. Where the
default is bfloat16, float32 is measured too.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

import peers
import torch
from torch.utils.flop_counter import FlopCounterMode

from dataset import OasisDataset
from modules import VQVAE
from preparation import phantoms
from priors.latent_cache import LatentCache
from priors.latent_space import LatentSpace
from support import console
from support.device import choose_device, has_fast_bfloat16
from support.run import Run, Saved, environment
from training.autoregressive import AutoregressiveStage
from training.begin import choose_run_fast_path
from training.codebook import KMeans
from training.dcgan import DCGANStage
from training.fit import Stage, update_average
from training.options import COUNT, Options
from training.recipes import BALANCED
from training.vqvae import VQVAEStage

BATCH = 32
PRODUCT = 4096  # rows and columns of the matrices whose product is the limit


class Work(NamedTuple):
    """What a side does in a round.

    Attributes:
        once: does the work for n images.
        n: how many images that is; 1 for a matrix product.
        limit: the matrix product that its speed is set against.
    """

    once: Callable[[], object]
    n: int = BATCH
    limit: str = "float32"


# --- ours


def new_run(device, **fast_path) -> Run:
    """A run with default options whose folder is never made."""
    chosen = choose_run_fast_path(Saved(Options()), device)._replace(**fast_path)
    return Run(Options(), Path(), fast_path=chosen, device=device)


def few_images(device, folder: Path) -> tuple[VQVAE, OasisDataset]:
    """A VQ-VAE whose codebook is in use, as after the first steps, and the images of four batches."""
    torch.manual_seed(0)
    vqvae = VQVAE()
    train_set = OasisDataset(folder, "train", device)
    vqvae.to(device, memory_format=torch.channels_last)  # as `load_vqvae` gives it
    start_codebook(vqvae, train_set)
    train_set.files, train_set.images = train_set.files[: 4 * BATCH], train_set.images[: 4 * BATCH]
    return vqvae, train_set


@torch.no_grad()
def start_codebook(vqvae: VQVAE, train_set: OasisDataset) -> None:
    x = train_set.batch(range(BATCH))
    KMeans(vqvae.vector_quantizer, None).before_lookup(0, vqvae.latents(x), len(x), torch.Generator())


def step_of(stage: Stage) -> Work:
    """A step with the average of the weights. Left out: revival of codes, one step in ten, and the DataLoader."""
    rng = torch.Generator().manual_seed(0)
    data = stage.data
    for network in stage.networks.values():
        network.train()

    def once() -> None:
        picked = torch.randint(len(data), (BATCH,), generator=rng).tolist()
        stage.step(data.__getitems__(picked), BATCH, 101, rng)  # neither a k-means step nor a revival
        for name, average in stage.averages.items():
            update_average(average, stage.networks[name], 1000, stage.average_decay)

    return Work(once, limit="bfloat16" if stage.run.fast_path.bfloat16 else "float32")


def our_vqvae(device, folder: Path, whole: bool = False, **change) -> Work:
    run = new_run(device, **change)
    run.fast_path.set_up()
    train_set = OasisDataset(folder, "train", device)
    stage = VQVAEStage(run, train_set, train_set)
    start_codebook(stage.vqvae, train_set)
    if whole:
        stage.box = slice(None), slice(None)
    return step_of(stage)


def our_prior(kind: type, device, folder: Path, **change) -> Work:
    run = new_run(device, **change)
    run.fast_path.set_up()
    vqvae, train_set = few_images(device, folder)
    return step_of(kind(run, vqvae, train_set, train_set))


# --- others


def peer_vqvae(make_network: Callable, device, folder: Path) -> Work:
    network = make_network().to(device)
    x = OasisDataset(folder, "train", device).batch(range(BATCH))
    step = peers.vqvae_step(network)
    return Work(lambda: step(x))


def peer_dcgan(device, folder: Path) -> Work:
    vqvae, train_set = few_images(device, folder)
    latents = LatentCache(vqvae, train_set, LatentSpace.fit(vqvae, train_set, BALANCED.directions, BALANCED.emphasis))
    return Work(peers.dcgan_step(lambda: latents.space.to_channels(latents.batch(range(BATCH))), device))


def matrix_product(dtype: torch.dtype, device, folder: Path) -> Work:
    """The most that the machine computes: TF32 on a GPU, as convolutions do there."""
    torch.backends.cuda.matmul.allow_tf32 = True
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device).to(dtype) for _ in range(2))
    return Work(lambda: a @ b, 1)


PLAIN = {"plain": True, "bfloat16": False}
PARTS: dict[str, dict[str, Callable[..., Work]]] = {
    "vqvae": {
        "ours": our_vqvae,
        "ours, whole slices": partial(our_vqvae, whole=True),
        "ours, float32": partial(our_vqvae, bfloat16=False),
        "ours, --plain": partial(our_vqvae, **PLAIN),
    }
    | {name: partial(peer_vqvae, make) for name, make in peers.VQVAES.items()},
    "dcgan": {
        "ours": partial(our_prior, DCGANStage),
        "ours, float32": partial(our_prior, DCGANStage, bfloat16=False),
        "plain": peer_dcgan,
    },
    "autoregressive": {
        "ours": partial(our_prior, AutoregressiveStage),
        "ours, float32": partial(our_prior, AutoregressiveStage, bfloat16=False),
    },
}
LIMITS = {
    "limit, float32": partial(matrix_product, torch.float32),
    "limit, bfloat16": partial(matrix_product, torch.bfloat16),
}

# --- measuring


def timed(work: Work, device: torch.device) -> float:
    """Seconds that a side's work takes once."""
    started = time.perf_counter()
    work.once()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has had at most: on the GPU, else in main memory (where Linux says it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def worker(part: str, name: str, device: torch.device, folder: Path) -> None:
    """Do a side's work once for each line on standard input; answer with its seconds, at the end with what it took."""
    with contextlib.redirect_stdout(sys.stderr):  # a stage may print

        def answer(contents) -> None:
            print(json.dumps(contents), flush=True, file=sys.__stdout__)

        try:
            work = (PARTS[part] | LIMITS)[name](device, folder)
        except ImportError as error:
            return answer({"missing": error.name})
        for _ in range(3):
            timed(work, device)
        answer({"n": work.n, "limit": work.limit})
        for _ in sys.stdin:
            answer(timed(work, device))
        peak = peak_memory(device)
        with FlopCounterMode(display=False) as counter:
            work.once()
        answer({"peak": peak, "operations": counter.get_total_flops()})


def measure(part: str, o, folder: Path) -> dict[str, dict]:
    """Start a process for each side, let them take turns, and collect what each took."""
    running, results = {}, {}
    sides = PARTS[part] | LIMITS
    if not has_fast_bfloat16(choose_device(o.device)):  # the default is float32, and bfloat16 may be many times slower
        del sides["ours, float32"], sides["limit, bfloat16"]
    for name in sides:
        command = [sys.executable, __file__, "--worker", part, name, str(folder), "--device", o.device]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        answer = json.loads(process.stdout.readline() or "{}")
        if "n" not in answer:
            print(f"  {name}: left out ({answer.get('missing', 'it failed')})", flush=True)
            continue
        running[name] = process
        results[name] = answer | {"seconds": []}
    for _ in range(o.rounds):
        for name, process in running.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            results[name]["seconds"].append(json.loads(process.stdout.readline()))
    for name, process in running.items():
        process.stdin.close()
        results[name] |= json.loads(process.stdout.readline())
        process.wait()
    return results


def report(part: str, results: dict[str, dict]) -> None:
    """A table in Markdown: images a second beside the first side's and the limit's."""
    limits = {name: statistics.median(results.pop(name)["seconds"]) for name in LIMITS if name in results}
    flops = {name: 2 * PRODUCT**3 / seconds for name, seconds in limits.items()}
    columns = [part, "images/s", "least to most", "ours / this", "peak memory / GB", "GFLOP an image", "of the limit"]
    print("\n| " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) - 1))
    first = statistics.median(results["ours"]["seconds"]) / results["ours"]["n"]
    for name, side in results.items():
        middle, least, most = (f(side["seconds"]) / side["n"] for f in (statistics.median, min, max))
        arithmetic = side["operations"] / side["n"]
        cells = [name, f"{1 / middle:.4g}", f"{1 / most:.4g} to {1 / least:.4g}", f"{middle / first:.2f}"]
        cells += [f"{side['peak'] / 1e9:.2f}" if side["peak"] else "", f"{arithmetic / 1e9:.2f}"]
        share = arithmetic / middle / flops[f"limit, {side['limit']}"]
        print("| " + " | ".join([*cells, f"{share:.0%} of {side['limit']}"]) + " |")
    for name, most in flops.items():
        print(f"\n{name.capitalize()}: {most / 1e9:.0f} GFLOP/s ({PRODUCT} x {PRODUCT} x {PRODUCT} matrix product).")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=COUNT, default=10, help="(default: 10)")
    parser.add_argument("--device", default="auto", help="(default: auto)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    o = parser.parse_args()
    device = choose_device(o.device)
    if o.worker:
        part, name, folder = o.worker
        return worker(part, name, device, Path(folder))
    if unknown := set(o.parts) - set(PARTS):
        parser.error(f"{', '.join(unknown)}: no such part; there are {', '.join(PARTS)}")
    print(json.dumps(environment(device), indent=2))
    print(f"Batch {BATCH}, 256x256 phantoms, {o.rounds} rounds, fast path: {new_run(device).fast_path}")
    with tempfile.TemporaryDirectory() as folder:
        phantoms.write(Path(folder), {"train": range(1, 9)})
        for part in o.parts or PARTS:
            report(part, measure(part, o, Path(folder)))


if __name__ == "__main__":
    console.run_program(main, "speed.py")
