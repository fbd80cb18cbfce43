"""Files with random damage: each loads or is refused by our own error, without a traceback, a hang or much memory.

PNGs and checkpoints; test_fuzz_formats.py has the other formats. At most 200 of each by default, and 10,000
with `make fuzz`.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import FUZZ, bounded, damaged
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset import DataError, read_png
from modules import VQVAE
from priors.checkpoints import load_vqvae
from support.console import UserError


def png(mode: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (256, 256), np.uint8)
    pixels[: 40 * seed] = 0
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    image.save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


PNGS = [png(mode, seed) for seed, mode in enumerate(("L", "1", "P", "LA", "RGB", "RGBA", "I;16"))]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "case_001_slice_0.nii.png"


@pytest.fixture(scope="module")
def undamaged(path) -> list[bytes]:
    pixels = []
    for content in PNGS:
        path.write_bytes(content)
        pixels.append(read_png(path).tobytes())
    return pixels


@FUZZ
@given(content=damaged(PNGS))
def test_a_damaged_png_is_read_as_it_was_or_refused(path, undamaged, content):
    found = try_to_read(path, content)
    assert found is None or found.tobytes() in undamaged  # checksums tell


def try_to_read(path, content: bytes) -> np.ndarray | None:
    path.write_bytes(content)
    with bounded():
        try:
            pixels = read_png(path)
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()
            return None
    assert pixels.shape == (256, 256) and pixels.dtype == np.uint8
    return pixels


@pytest.fixture(scope="module")
def model() -> VQVAE:
    return VQVAE(8, 4)


@pytest.fixture(scope="module")
def checkpoint(model) -> bytes:
    return saved(model.state_dict())


def saved(contents) -> bytes:
    torch.save(contents, buffer := io.BytesIO())
    return buffer.getvalue()


def try_to_load(path: Path, load, *words):
    """`load(path, *words)`, or None if it is refused in one line that names the file."""
    with bounded():
        try:
            return load(path, *words)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()


@FUZZ
@given(choices=st.data())
def test_a_damaged_checkpoint_is_read_as_it_was_or_refused(path, model, checkpoint, choices):
    path = path.with_suffix(".pth")
    path.write_bytes(choices.draw(damaged([checkpoint])))
    found, state = try_to_load(path, load_vqvae), model.state_dict()
    assert found is None or all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
