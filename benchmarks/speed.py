"""Ours and its peers side by side, on one machine in one run.

    pip install -r benchmarks/requirements.txt           # the peers; sides whose package is missing are left out
    python benchmarks/speed.py                           # every part, about twelve minutes on two cores
    python benchmarks/speed.py step dcgan --rounds 20    # some parts; --help lists them
    python benchmarks/speed.py --json speed.json

Each side runs in a process of its own, so that none profits from another's settings. The processes wait while one of
them works, and take turns: in each round every side does its work once. Before the first round each does it three
times (compiling, caches, allocators). What is printed is the median over rounds, with the smallest and the largest.
"""

import argparse
import json
import os
import platform
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
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import ToTensor

from dataset import OasisDataset, make_loader
from evaluation import reconstruction
from modules import VQVAE
from preparation import phantoms
from priors.latent_cache import LatentCache
from priors.latent_space import LatentSpace
from support.device import choose_device, keep_freed_memory
from support.run import Run, Saved, environment
from training.begin import choose_run_fast_path
from training.codebook import KMeans
from training.dcgan import DCGANStage
from training.fit import update_average
from training.options import Options
from training.vqvae import VQVAEStage

BATCH = 32


class Work(NamedTuple):
    """What a side does in a round.

    Attributes:
        once: does the work for n images.
        n: how many images that is; 1 where the work is not one of images.
        network: x -> (vq_loss, x_hat), to count its floating-point operations.
        limit: the matrix product that its speed is set against.
    """

    once: Callable[[], object]
    n: int
    network: Callable | None = None
    limit: str = "float32"


class Side(NamedTuple):
    text: str
    make: Callable[[torch.device, Path], Work]


def images(folder: Path, device, n: int = BATCH) -> torch.Tensor:
    return OasisDataset(folder, "train", device).batch(range(n))


# --- one training step of the VQ-VAE


def start_codebook(vqvae: VQVAE, x: torch.Tensor) -> None:
    """A codebook in use, as after the first steps."""
    with torch.no_grad():
        KMeans(vqvae.vector_quantizer, None).before_lookup(0, vqvae.latents(x), len(x), torch.Generator())


def new_run(device, **fast_path) -> Run:
    """A run with default options whose folder is never made."""
    chosen = choose_run_fast_path(Saved(Options()), device, 9664)._replace(**fast_path)
    run = Run(Options(), Path(), fast_path=chosen, device=device)
    if device.type == "cuda":  # whether compiling works was tried, which is not to be measured
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return run


def our_step(change: dict, device, folder: Path, keep_memory: bool = True, whole: bool = False) -> Work:
    """A step of `train_vqvae` with the average of the weights and the counts of codes; on whole slices if asked for.

    Left out: revival, which is one step in ten and only where a code is dead, and the DataLoader, which is a part of
    its own.
    """
    run = new_run(device, **change)
    if keep_memory:
        run.fast_path.set_up()
    train_set = OasisDataset(folder, "train", device)
    stage = VQVAEStage(run, train_set, train_set)
    if whole:
        stage.box = slice(None), slice(None)
    x = train_set.batch(range(BATCH))
    start_codebook(stage.vqvae, x)

    def once() -> None:
        stage.step(x, BATCH, 101, torch.Generator())  # neither a k-means step nor a revival
        update_average(stage.average, stage.vqvae, 1000, stage.average_decay)

    return Work(
        once, BATCH, lambda x: stage.vqvae(x[..., *stage.box])[:2], "bfloat16" if run.fast_path.bfloat16 else "float32"
    )


def peer_step(make_network: Callable, device, folder: Path) -> Work:
    network, x = make_network().to(device), images(folder, device)
    step = peers.vqvae_step(network)
    return Work(lambda: step(x), BATCH, network)


def report_style() -> torch.nn.Module:
    return peers.Autoencoder(peers.ReportStyleQuantizer())


def matrix_product(dtype: torch.dtype, device, folder: Path) -> Work:
    """The most that the machine computes: TF32 on a GPU, as convolutions do there."""
    torch.backends.cuda.matmul.allow_tf32 = True
    a, b = (torch.randn(4096, 4096, device=device).to(dtype) for _ in range(2))
    return Work(lambda: a @ b, 1)


PRODUCT_FLOPS = 2 * 4096**3
LIMITS = {
    "float32": Side("matrix product, 4096 x 4096 x 4096", partial(matrix_product, torch.float32)),
    "bfloat16": Side("matrix product, 4096 x 4096 x 4096", partial(matrix_product, torch.bfloat16)),
}
STEP = {
    "ours": Side("the default", partial(our_step, {})),
    "ours, whole slices": Side("the same, with the black frame", partial(our_step, {}, whole=True)),
    "ours, float32": Side("the same, --precision float32", partial(our_step, {"bfloat16": False})),
    "ours, compiled": Side("the same, compiled", partial(our_step, {"compiled": True})),
    "ours, not compiled": Side("the same, not compiled", partial(our_step, {"compiled": False})),
    "ours, bfloat16": Side("the same, --precision bfloat16", partial(our_step, {"bfloat16": True})),
    "ours, freed memory given back": Side(
        "the same, the C library's allocator as it comes", partial(our_step, {}, keep_memory=False)
    ),
    "ours, --plain": Side(
        "NCHW, float32, eager, allocator as it comes",
        partial(our_step, {"plain": True, "bfloat16": False, "compiled": False}, keep_memory=False),
    ),
    "report's style": Side("NCHW, one-hot matrix, eager", partial(peer_step, report_style)),
    "vector-quantize-pytorch": Side(
        "the report's networks, VectorQuantize(dim=64, codebook_size=512)",
        partial(peer_step, lambda: peers.Autoencoder(peers.PeerQuantizer())),
    ),
    "MONAI VQVAE": Side(
        "channels=(32, 64), num_res_layers=2, num_res_channels=(32, 32), 512 x 64", partial(peer_step, peers.Monai)
    ),
}

# --- validation: the network and SSIM


def our_validation(device, folder: Path) -> Work:
    keep_freed_memory()
    validate_set, model = OasisDataset(folder, "validate", device), VQVAE().to(device)
    return Work(lambda: reconstruction.score(model, validate_set), len(validate_set))


def peer_validation(device, folder: Path) -> Work:
    x = OasisDataset(folder, "validate", device).batch(range(64))
    network = report_style().to(device)
    return Work(lambda: peers.validate(network, x), len(x))


VALIDATION = {
    "ours": Side("reconstruction.score: float32, batches of 32, scikit-image in threads", our_validation),
    "report's style": Side("network and scikit-image, image by image", peer_validation),
}

# --- one training step of the DCGAN


def few_images(device, folder: Path) -> tuple[VQVAE, OasisDataset]:
    torch.manual_seed(0)
    vqvae, train_set = VQVAE(), OasisDataset(folder, "train", device)
    vqvae.to(device, memory_format=torch.channels_last)  # as `load_vqvae` gives it
    start_codebook(vqvae, images(folder, device))
    train_set.files, train_set.images = train_set.files[: 4 * BATCH], train_set.images[: 4 * BATCH]
    return vqvae, train_set


def real_batches(kept: LatentCache) -> Callable[[], torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return lambda: kept.batch(torch.randint(len(kept), (BATCH,), generator=rng).tolist())


def our_dcgan(stored: bool, device, folder: Path, **fast_path) -> Work:
    run = new_run(device, **fast_path)
    run.fast_path.set_up()
    vqvae, train_set = few_images(device, folder)
    stage = DCGANStage(run, vqvae, train_set, train_set)
    real_batch, rng = real_batches(LatentCache(vqvae, train_set, stage.space, stored=stored)), torch.Generator()

    def once() -> None:
        stage.step(real_batch(), BATCH, 100, rng)
        update_average(stage.average, stage.networks["generator"], 100, stage.average_decay)

    return Work(once, BATCH)


def plain_dcgan(stored: bool, device, folder: Path) -> Work:
    vqvae, train_set = few_images(device, folder)
    latents = LatentCache(vqvae, train_set, LatentSpace.fit(vqvae, train_set), stored=stored)
    batch = real_batches(latents)
    return Work(peers.dcgan_step(lambda: latents.space.mixed(batch()), device), BATCH)


DCGAN = {
    "ours": Side("the default: latents encoded once, kept in half precision", partial(our_dcgan, True)),
    "ours, bfloat16": Side("the same, --precision bfloat16", partial(our_dcgan, True, bfloat16=True)),
    "ours, re-encoding": Side("the same, each batch encoded when it is asked for", partial(our_dcgan, False)),
    "plain": Side("NCHW, eager, allocator as it comes; latents kept", partial(plain_dcgan, True)),
    "plain, re-encoding": Side("the same, each batch encoded", partial(plain_dcgan, False)),
}

# --- loading


class Files(Dataset):
    """PNG files, each decoded when it is asked for, as tutorials do it."""

    def __init__(self, folder: Path):
        self.files = sorted((folder / "keras_png_slices_train").glob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.files[i]) as image:
            return ToTensor()(image.convert("L"))


def read_all(device, folder: Path) -> Work:
    n = len(Files(folder))
    return Work(lambda: OasisDataset(folder, "train", device), n)


def read_all_peer(device, folder: Path) -> Work:
    files = Files(folder)
    return Work(lambda: torch.stack([files[i] for i in range(len(files))]), len(files))


def our_batches(device, folder: Path) -> Work:
    train_set = OasisDataset(folder, "train", device)
    return Work(lambda: [None for _ in make_loader(train_set, BATCH, torch.Generator())], len(train_set))


def peer_batches(workers: int, device, folder: Path) -> Work:
    loader = DataLoader(Files(folder), BATCH, shuffle=True, num_workers=workers)
    return Work(lambda: [batch.to(device) for batch in loader], len(loader.dataset))


READING = {
    "ours": Side("OasisDataset: PNG files to one uint8 tensor, in threads", read_all),
    "Pillow + ToTensor": Side("one file after another", read_all_peer),
}
BATCHES = {
    "ours": Side("make_loader", our_batches),
    "DataLoader": Side("Pillow + ToTensor, no worker processes", partial(peer_batches, 0)),
    "DataLoader, 2 workers": Side("Pillow + ToTensor, two worker processes", partial(peer_batches, 2)),
}

# --- start-up


def command(*words) -> Callable:
    return lambda device, folder: Work(lambda: subprocess.run([sys.executable, *words], check=True, cwd=PROJECT), 1)


START = {
    "ours": Side("import train", command("-c", "import train")),
    "torch": Side("import torch: what every side begins with", command("-c", "import torch")),
    "MONAI": Side("from monai.networks.nets import VQVAE", command("-c", "from monai.networks.nets import VQVAE")),
    "vector-quantize-pytorch": Side("import vector_quantize_pytorch", command("-c", "import vector_quantize_pytorch")),
}

PARTS = {
    "step": STEP | LIMITS,
    "validation": VALIDATION,
    "dcgan": DCGAN,
    "reading": READING,
    "batches": BATCHES,
    "start": START,
}
TITLES = {
    "step": "VQ-VAE, a training step",
    "validation": "Validation: network and SSIM",
    "dcgan": "DCGAN, a training step",
    "reading": "First read of the PNG files",
    "batches": "An epoch's batches",
    "start": "Start-up",
}


def flops_an_image(network: Callable, device) -> float:
    """Floating-point operations of a training step's forward and backward pass, as torch counts them."""
    x = torch.rand(2, 1, 256, 256, device=device)
    with FlopCounterMode(display=False) as counter:
        vq_loss, x_hat = network(x)
        (x_hat.square().mean() + vq_loss).backward()
    return counter.get_total_flops() / len(x)


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
    side = PARTS[part][name]
    try:
        work = side.make(device, folder)
    except ImportError as error:
        print(json.dumps({"missing": error.name}), flush=True)
        return

    started = time.perf_counter()
    for _ in range(3):
        timed(work, device)
    print(json.dumps({"n": work.n, "limit": work.limit, "warm_up": time.perf_counter() - started}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed(work, device)), flush=True)
    peak = peak_memory(device) if part in ("step", "validation", "dcgan") else None  # elsewhere it says nothing
    flops = flops_an_image(work.network, device) if work.network else None
    print(json.dumps({"peak": peak, "flops_an_image": flops}), flush=True)


def measure(part: str, sides: dict[str, Side], o, folder: Path) -> dict[str, dict]:
    """Start a process for each side, let them take turns, and collect what each took."""
    running, found = {}, {}
    for name in sides:
        words = [sys.executable, __file__, "--worker", part, name, str(folder), "--device", o.device]
        environment = os.environ | {"OMP_NUM_THREADS": str(o.threads)}
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        answer = json.loads(process.stdout.readline() or "{}")
        if "n" not in answer:
            print(f"  {name}: left out ({answer.get('missing', 'it failed')})", flush=True)
            continue
        running[name], found[name] = process, answer | {"seconds": []}
    for _ in range(o.rounds):
        for name, process in running.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            found[name]["seconds"].append(json.loads(process.stdout.readline()))
    for name, process in running.items():
        process.stdin.close()
        found[name] |= json.loads(process.stdout.readline())
        process.wait()
    for result in found.values():
        seconds = result["seconds"]
        rates = [result["n"] / s for s in (statistics.median(seconds), max(seconds), min(seconds))]
        result["rate"], result["rate_least"], result["rate_most"] = rates
    return found


def report(part: str, found: dict[str, dict]) -> None:
    """A table in Markdown: speed, how many times as fast the first side is, and for steps the share of the limit."""
    limits = {name: PRODUCT_FLOPS * found[name]["rate"] for name in LIMITS if name in found}
    unit = "starts/s" if part == "start" else "images/s"
    columns = [TITLES[part], "configuration", unit, "least to most", "ours / this", "warm-up / s", "peak memory / GB"]
    columns += ["GFLOP an image", "share of the limit"] if part == "step" else []
    print("\n| " + " | ".join(columns) + " |\n|---|---|" + "---:|" * (len(columns) - 2))
    first = next(iter(found.values()))["rate"]
    for name, r in found.items():
        if name in limits:
            continue
        cells = [name, PARTS[part][name].text, f"{r['rate']:.4g}", f"{r['rate_least']:.4g} to {r['rate_most']:.4g}"]
        cells += [f"{first / r['rate']:.2f}", f"{r['warm_up']:.1f}", f"{r['peak'] / 1e9:.2f}" if r["peak"] else ""]
        if part == "step":
            share = r["rate"] * r["flops_an_image"] / limits[r["limit"]]
            cells += [f"{r['flops_an_image'] / 1e9:.2f}", f"{share:.0%} of {r['limit']}"]
        print("| " + " | ".join(cells) + " |")
    for name, limit in limits.items():
        least, most = (PRODUCT_FLOPS * found[name][key] / 1e9 for key in ("rate_least", "rate_most"))
        print(f"\nLimit, {name}: {limit / 1e9:.0f} GFLOP/s ({least:.0f} to {most:.0f}), {LIMITS[name].text}.")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: 10)")
    parser.add_argument("--subjects", type=int, default=16, help="phantoms to train on, 32 images each (default: 16)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: what torch takes)")
    parser.add_argument("--device", default="auto", help="(default: auto)")
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    o = parser.parse_args()
    device = choose_device(o.device)
    if o.worker:
        part, name, folder = o.worker
        return worker(part, name, device, Path(folder))
    unknown = set(o.parts) - set(PARTS)
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such part; there are {', '.join(PARTS)}")

    machine = environment(device) | {"processor": processor(), "cores": os.cpu_count(), "threads": o.threads}
    print(json.dumps(machine, indent=2))
    print(f"Batch {BATCH}, 256x256 phantoms, {o.rounds} rounds, fast path: ", end="")
    print(new_run(device).fast_path)
    with tempfile.TemporaryDirectory() as folder:
        first = o.subjects + 1  # of those that are not trained on
        cases = {"train": range(1, first), "validate": range(first, first + max(2, o.subjects // 4))}
        phantoms.write(Path(folder), cases)
        found = {}
        for part in o.parts or PARTS:
            found[part] = measure(part, PARTS[part], o, Path(folder))
            report(part, found[part])
    if o.json:
        o.json.write_text(json.dumps({"machine": machine, "rounds": o.rounds, "parts": found}, indent=2) + "\n")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
