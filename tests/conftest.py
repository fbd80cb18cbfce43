"""Phantoms and helpers for the tests. Nothing here needs OASIS data or the network."""

import csv
import io
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ["TQDM_DISABLE"] = "1"  # no progress bars; read when tqdm is imported
os.environ.pop("OASIS_DIR", None)

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import evaluation.__main__ as scoring
import predict
import train
from dataset import OasisDataset
from modules import VQVAE
from preparation import images as any_images
from preparation import oasis, phantoms
from priors.latent_cache import LatentCache
from priors.latent_space import LatentSpace
from report.plots import Figures
from support import console, files
from training import codebook

PROJECT = Path(__file__).parent.parent
PRETRAINED = PROJECT / "resources" / "pretrained"
CASES = {"train": range(1, 4), "validate": range(4, 6), "test": range(6, 8)}


LONGEST = ("test_train", "test_distributed", "test_interruption", "test_disk", "test_benchmarks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two workers end at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """An OASIS-shaped folder of phantoms: 15 training, 10 validation and 10 test images."""
    folder = tmp_path_factory.mktemp("data")
    phantoms.write(folder, CASES, slices=5)
    return folder


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Six brain-like images (6, 1, 256, 256) in [0, 1]."""
    slices = [phantoms.make_pair(case, s)[0] for case, s in ((1, 0), (1, 20), (2, 8), (3, 15), (4, 27), (5, 31))]
    return torch.from_numpy(np.stack(slices)[:, None]).float() / 255


@pytest.fixture(scope="session")
def train_set(data) -> OasisDataset:
    return OasisDataset(data, "train")


@pytest.fixture(scope="session")
def splits(data, train_set) -> tuple[OasisDataset, OasisDataset]:
    """The training and the validation split. Not to be changed."""
    return train_set, OasisDataset(data, "validate")


@pytest.fixture(scope="session")
def vqvae(train_set) -> VQVAE:
    """A small VQ-VAE whose encoder is not trained; its 64 embeddings of 8 fit the training split."""
    torch.manual_seed(0)
    model = VQVAE(64, 8).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z_e = model.latents(train_set.batch(range(15)))
    codebook.start_from(model.vector_quantizer, z_e, rng)
    for _ in range(3):
        codebook.k_means_step(model.vector_quantizer, z_e, rng)
    return model


@pytest.fixture(scope="session")
def latents(vqvae, train_set) -> LatentCache:
    """The training split's latents, as the balanced DCGAN learns them."""
    return LatentCache(vqvae, train_set, LatentSpace.fit(vqvae, train_set, 4, 0.5))


@pytest.fixture
def without_figures(monkeypatch):
    """Figures are begun but not rendered and written, which takes half of the time of a small run."""
    monkeypatch.setattr(Figures, "_save", close)


def close(figures: Figures, figure: plt.Figure, name: str, mode: str = "RGB") -> None:
    plt.close(figure)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Done(NamedTuple):
    """What a program did: its exit status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_program(script: str, *words, cwd: Path) -> Done:
    """`python script words` in the folder cwd, but in this process, which has imported PyTorch already."""
    mains = {"train.py": train, "predict.py": predict, "preparation.oasis": oasis}
    mains |= {"preparation.images": any_images, "evaluation": scoring}
    main = mains[script].main
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        for name, stream in (("stdout", out), ("stderr", err), ("__stderr__", err)):
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "argv", [script, *map(str, words)])
        try:
            console.run_program(lambda: main([str(word) for word in words]), script)
            code = 0
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # sys.exit prints it
                code = print(stop.code, file=err) or 1
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return Done(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


CONVERSION = ("--slices", 2, "--least-brain", 0.8, "--workers", 1)  # of `write_heads`


def write_heads(folder: Path, n: int = 3) -> np.ndarray:
    """Write n small volumes as sub-<i>.nii, bright in the middle. Returns the first's voxels (24, 24, 24) int16."""
    folder.mkdir(exist_ok=True)
    grid = np.stack(np.meshgrid(*3 * [np.arange(24) - 11.5], indexing="ij"))
    distance = np.linalg.norm(grid, axis=0)
    head = ((1000 + 20 * grid[0] + 3 * grid[1] + grid[2]) * (distance < 9)).astype(np.int16)
    for i in range(n):
        nib.save(nib.Nifti1Image(np.roll(head, i, 0), np.eye(4)), folder / f"sub-{i + 1}.nii")
    return head


@pytest.fixture(scope="session")
def heads(tmp_path_factory) -> Path:
    """A folder of three small volumes. Not to be changed."""
    folder = tmp_path_factory.mktemp("heads")
    write_heads(folder)
    return folder


@pytest.fixture(scope="session")
def start():
    """`start(folder, main, *words)`: calls main with the words in a new process, without the seconds of importing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "predict", "preparation.oasis", "nibabel", "pytest", "skimage.metrics"])

    def start(folder: Path, main: Callable[[list[str]], None], *words) -> multiprocessing.Process:
        arguments = (str(folder), torch.get_num_threads(), main, [str(word) for word in words])
        process = context.Process(target=in_a_child, args=arguments)
        process.start()
        return process

    return start


def in_a_child(folder: str, threads: int, main: Callable[[list[str]], None], words: list[str]) -> None:
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(threads)
    for name in ("fsync", "replace"):  # a pause before each, so that kills fall between them
        setattr(os, name, partial(after_a_pause, getattr(os, name)))
    main(words)


def after_a_pause(function, *words):
    time.sleep(0.005)
    return function(*words)


def train_in_a_child(words: list[str]) -> None:
    """train.py, whose output goes to files with this ending, the first word. Figures are not rendered."""
    ending, *words = words
    sys.stdout, sys.stderr = (open(f"{name}_{ending}", "w", buffering=1) for name in ("printed", "errors"))
    sys.__stderr__ = sys.stderr
    Figures._save = close
    console.run_program(partial(train.main, words), "train.py")


def train_as_one_of_two(words: list[str]) -> None:
    """The first words are the rank and the port where the processes meet."""
    rank, port, *words = words
    two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= two | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    train_in_a_child([rank, *words])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_two(start: Callable, folder: Path, *words) -> list[multiprocessing.Process]:
    """Two processes of one run, as torchrun starts them. What they say is in `printed_0`, `errors_0` and so on."""
    port = free_port()
    return [start(folder, train_as_one_of_two, rank, port, *words) for rank in range(2)]


def kill_after(start: Callable, folder: Path, words, line: str, number: int = signal.SIGKILL) -> tuple[int, str]:
    """Begin `train.py words` in another process and send it a signal when it has printed a line.

    By default it is killed, as by a power cut. Returns its exit status and what it wrote to standard error.
    """
    printed, errors = folder / "printed_txt", folder / "errors_txt"
    process = start(folder, train_in_a_child, "txt", *words)
    while process.is_alive() and not (printed.exists() and f"\n{line}" in printed.read_text()):
        time.sleep(0.001)
    assert process.is_alive(), errors.read_text()
    os.kill(process.pid, number)
    process.join()
    said = errors.read_text()
    printed.unlink()
    errors.unlink()
    if number == signal.SIGKILL:
        assert process.exitcode == -number
    return process.exitcode, said


def refused(done: Done, *words: str) -> None:
    """The program ended with one line that has these words, and without a traceback."""
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "error: " in last and "Traceback" not in done.stderr
    for word in words:
        assert word in last


def new_run(done: Done, out: Path) -> Path:
    """The folder under `out` of a run that train.py says is done."""
    assert done.returncode == 0, done.stderr
    return out / re.search(r"Done\. Look at .*/(\S+)/index\.html$", done.stdout, re.M)[1]


def rows(run: Path, stage: str) -> list[dict[str, str]]:
    """The rows of metrics.csv of one stage."""
    with open(run / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["stage"] == stage]


def resume_file(run: Path) -> dict:
    return torch.load(run / "resume.pth", weights_only=True)


def assert_nothing_is_torn(folder: Path) -> None:
    """Each file in a folder of what programs wrote is complete, but for those with temporary names."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_dir():
            continue  # a temporary name
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".pth":
            torch.load(path, weights_only=True)
        elif path.suffix == ".html":
            assert path.read_text().endswith("</html>\n")
        elif path.suffix == ".json":
            assert files.read_json(path)
        elif path.suffix == ".npz":
            assert len(np.load(path)["codes"]) == 10
        elif path.suffix == ".csv":
            assert all(None not in row.values() for row in csv.DictReader(path.open(newline="")))
        else:
            assert path.suffix == ".txt", path


def assert_same_weights(one: Path, other: Path, names=("vqvae.pth", "generator.pth", "discriminator.pth")):
    def flat(contents):
        parts = ((key, part if isinstance(part, dict) else {"": part}) for key, part in contents.items())
        return {(key, name): value for key, part in parts for name, value in part.items()}

    for name in names:
        a, b = (flat(torch.load(run / name, weights_only=True)) for run in (one, other))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key], (name, key)


def assert_same_history(one: Path, other: Path, stages=("vqvae", "dcgan")) -> None:
    """Except for times."""
    for stage in stages:
        kept = [
            [{k: v for k, v in row.items() if "second" not in k} for row in rows(run, stage)] for run in (one, other)
        ]
        assert kept[0] == kept[1] != []


SMALL = ("--batch-size", 4, "--dcgan-batch-size", 6, "--n-embeddings", 64, "--device", "cpu")
EPOCHS = ("--epochs", 2, "--dcgan-epochs", 2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where `trained` was run."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="session")
def trained(data, folder) -> tuple[Done, Path]:
    """A complete run of both stages: what it printed, and its folder. Not to be changed."""
    done = run_program("train.py", "--data", data, *SMALL, *EPOCHS, "--seed", 5, cwd=folder)
    return done, new_run(done, folder / "gen_imgs")
