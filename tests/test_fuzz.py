"""Files with random damage: each loads or is refused by our own error, without a traceback, a hang or much memory.

PNGs, checkpoints and resume.pth; test_fuzz_formats.py has the other formats. At most 200 of each by default, and 10,000
with `make fuzz`.
"""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png_of, refused, run_program
from fuzzing import FUZZ, bounded, changed, damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset import DataError, read_png
from modules import VQVAE, Generator, UNet
from support.console import UserError
from support.device import FastPath
from support.run import Run
from training.config import Config
from training.prior import FlowPrior, GeneratorPrior, load_prior
from training.vqvae import load_vqvae


def png(mode: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (256, 256), np.uint8)
    pixels[: 40 * seed] = 0
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    image.save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


PNGS = [png(mode, seed) for seed, mode in enumerate(("L", "1", "P", "LA", "RGB", "RGBA", "I;16"))]


@st.composite
def damaged_chunks(draw) -> bytes:
    """A PNG whose chunks were changed, left out or repeated, with checksums that are right again."""
    content, chunks, at = draw(st.sampled_from(PNGS)), [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    kinds = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"zTXt", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"eXIf")
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, max(len(chunks) - 1, 0)))
        new = (draw(st.sampled_from(kinds)), draw(st.binary(max_size=40)))
        match draw(st.sampled_from(("insert", "leave out", "repeat", "change"))):
            case "insert":
                chunks.insert(i, new)
            case "leave out":
                del chunks[i : i + 1]
            case "repeat":
                chunks[i:i] = chunks[i : i + 1]
            case "change":
                for kind, data in chunks[i : i + 1]:
                    place = draw(st.integers(0, len(data)))
                    chunks[i] = (kind, data[:place] + new[1] + data[place + len(new[1]) :])
    return png_of(chunks)


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


@FUZZ
@given(content=st.one_of(damaged_chunks(), st.binary(max_size=200)))
def test_a_strange_png_is_read_or_refused(path, content):
    try_to_read(path, content)


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
    torch.save(model.state_dict(), buffer := io.BytesIO())
    return buffer.getvalue()


@FUZZ
@given(choices=st.data())
def test_a_damaged_checkpoint_is_read_as_it_was_or_refused(path, model, checkpoint, choices):
    path = path.with_suffix(".pth")
    path.write_bytes(choices.draw(damaged([checkpoint])))
    with bounded():
        try:
            found = load_vqvae(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()
            return
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items())


@pytest.fixture(scope="module", params=["generator", "flow"])
def prior(request, latents, vqvae):
    torch.manual_seed(0)
    if request.param == "generator":
        return GeneratorPrior(Generator(embeddings_dim=8), latents.scale, vqvae)
    return FlowPrior(UNet(), 0.8, latents.scale, vqvae)


@settings(FUZZ, max_examples=FUZZ.max_examples // 2)
@given(choices=st.data())
def test_a_strange_prior_samples_or_is_refused(path, prior, vqvae, choices):
    path = path.with_suffix(".pth")
    torch.save(choices.draw(changed(prior.checkpoint())), path)
    try:
        found = load_prior(path, vqvae)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable()
        return
    if isinstance(found, GeneratorPrior):
        assert found.sample(found.noise(1, torch.Generator())).shape == (1, 64, 64)


@pytest.fixture(scope="module")
def saved_run(data, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run after its first epoch, as far as `train.py --resume --dry-run` looks, and its resume.pth."""
    folder = tmp_path_factory.mktemp("run")
    row = {"stage": "vqvae", "epoch": 1, "updates": 4, "seconds": 1.0, "ssim_mean": 0.5}
    state = {"epoch": 1, "history": {"training_loss": [0.1]}, "networks": {}, "extra": {}}
    run = Run(Config(data=str(data)), folder, {"vqvae": state}, [row], fast_path=FastPath("cpu"))
    run.save()
    return folder, torch.load(folder / "resume.pth", weights_only=True)


@settings(FUZZ, max_examples=FUZZ.max_examples // 2)
@given(choices=st.data())
def test_a_strange_resume_file_resumes_or_is_refused(saved_run, choices):
    folder, contents = saved_run
    torch.save(choices.draw(changed(contents)), folder / "resume.pth")
    done = run_program("train.py", "--resume", folder, "--dry-run", cwd=folder)
    if done.returncode:
        refused(done)
        assert done.stderr.count("\n") == 1
