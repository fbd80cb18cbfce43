"""Phantoms and helpers for the tests. Nothing here needs OASIS data or the network."""

import csv
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import phantom

quiet = partial(tqdm, disable=True)
PROJECT = Path(__file__).parent.parent
CASES = {"train": range(1, 4), "validate": range(4, 6), "test": range(6, 8)}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """An OASIS-shaped folder of phantoms: 15 training, 10 validation and 10 test images."""
    folder = tmp_path_factory.mktemp("data")
    phantom.write(folder, CASES, slices=5, progress=quiet)
    return folder


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Six brain-like images (6, 1, 256, 256) in [0, 1]."""
    slices = [phantom.make_slice(case, s) for case, s in ((1, 0), (1, 20), (2, 8), (3, 15), (4, 27), (5, 31))]
    return torch.from_numpy(np.stack(slices)[:, None]).float() / 255


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def run_program(script: str, *words, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a program of the project as a user does, from the folder cwd."""
    environment = {key: value for key, value in os.environ.items() if key != "OASIS_DIR"} | variables
    command = [sys.executable, PROJECT / script, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def new_run(done: subprocess.CompletedProcess, out: Path) -> Path:
    """The folder under `out` of a run that train.py says is done."""
    assert done.returncode == 0, done.stderr
    return out / re.search(r"Done\. Look at .*/(\S+)$", done.stdout, re.M)[1]


def rows(run: Path, stage: str) -> list[dict[str, str]]:
    """The rows of metrics.csv of one stage."""
    with open(run / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["stage"] == stage]


def assert_same_weights(one: Path, other: Path, names=("vqvae.pth", "generator.pth", "discriminator.pth")):
    def flat(contents):
        return {**contents.pop("state_dict", {}), **contents}

    for name in names:
        a, b = (flat(torch.load(run / name, weights_only=True)) for run in (one, other))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key], (name, key)


def assert_same_history(one: Path, other: Path) -> None:
    """Apart from what a clock says."""
    for stage in ("vqvae", "gan"):
        kept = [
            [{k: v for k, v in row.items() if "second" not in k} for row in rows(run, stage)] for run in (one, other)
        ]
        assert kept[0] == kept[1] != []
