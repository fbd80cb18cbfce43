"""Files with random damage: each loads or is refused by our own error, without a traceback, a hang or much memory.

PNGs, checkpoints and resume.pth; test_fuzz_formats.py has the other formats. At most 200 of each by default, and 10,000
with `make fuzz`.
"""

import copy
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png_of, refused, run_program
from fuzzing import FEW, FUZZ, bounded, changed, damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset import DataError, OasisDataset, read_png
from modules import VQVAE, Generator
from priors.checkpoints import load_prior, load_vqvae
from priors.dcgan import DCGANPrior
from support.console import UserError
from support.device import FastPath
from support.run import Run, restoring
from training.options import Options
from training.vqvae import VQVAEStage


def png(mode: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (256, 256), np.uint8)
    pixels[: 40 * seed] = 0
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    image.save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


PNGS = [png(mode, seed) for seed, mode in enumerate(("L", "1", "P", "LA", "RGB", "RGBA", "I;16"))]


def chunks_of(content: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG, each a kind and its data."""
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


@st.composite
def damaged_chunks(draw) -> bytes:
    """A PNG whose chunks were changed, left out or repeated, with checksums that are right again."""
    chunks = chunks_of(draw(st.sampled_from(PNGS)))
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


@st.composite
def damaged_rows(draw) -> bytes:
    """A PNG whose rows were damaged, or whose header says other things of them, compressed with right checksums."""
    chunks = chunks_of(draw(st.sampled_from(PNGS)))
    rows = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
    if draw(st.booleans()):
        rows = draw(damaged([rows]))
    header = bytearray(dict(chunks)[b"IHDR"])
    if draw(st.booleans()):  # bit depth, colour type, compression, filter, interlacing
        header[draw(st.integers(8, 12))] = draw(st.sampled_from((0, 1, 2, 3, 4, 6, 8, 16, 255)))
    if draw(st.booleans()):
        size = draw(st.sampled_from((0, 1, 255, 256, 257, 2**16, 2**31 - 1, 2**32 - 1)))
        header[(at := draw(st.sampled_from((0, 4)))) : at + 4] = struct.pack(">I", size)
    body = [chunk for chunk in chunks if chunk[0] not in (b"IHDR", b"IDAT", b"IEND")]
    return png_of([(b"IHDR", bytes(header)), *body, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


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
@given(content=st.one_of(damaged_chunks(), damaged_rows(), st.binary(max_size=200)))
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


@st.composite
def repacked(draw, checkpoint: bytes) -> bytes:
    """A checkpoint one of whose parts was damaged, with a checksum that is right again."""
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    described = [name for name in parts if name.endswith("data.pkl")]  # what the tensors are
    name = draw(st.sampled_from(described * len(parts) + list(parts)))
    parts[name] = draw(damaged([parts[name]]))
    kind = draw(st.sampled_from((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,)))
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", kind) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@FUZZ
@given(choices=st.data())
def test_a_strange_checkpoint_is_read_or_refused(path, model, checkpoint, choices):
    path = path.with_suffix(".pth")
    path.write_bytes(choices.draw(st.one_of(repacked(checkpoint), changed(model.state_dict()).map(saved))))
    found = try_to_load(path, load_vqvae)
    assert found is None or all(value.isfinite().all() for value in found.state_dict().values())


@pytest.fixture(scope="module")
def stage(data, tmp_path_factory) -> tuple[VQVAEStage, dict]:
    """Of a small VQ-VAE, after a step; and its state then."""
    run = Run(Options(n_embeddings=8, embeddings_dim=4), tmp_path_factory.mktemp("stage"), fast_path=FastPath("cpu"))
    stage = VQVAEStage(run, *(OasisDataset(data, split) for split in ("train", "validate")))
    stage.step(stage.train_set.batch([0, 1]), 2, 0, torch.Generator().manual_seed(0))
    return stage, copy.deepcopy(stage.state_dict())


@FEW
@given(choices=st.data())
def test_a_strange_state_of_a_stage_trains_or_does_not_fit(stage, choices):
    """It may be of numbers that do not make sense. What it may not do is to write beyond the end of a tensor."""
    stage, state = stage
    strange = choices.draw(changed(state))
    try:
        with bounded(), restoring(stage.run.folder):
            stage.load_state_dict(strange)
    except UserError as error:
        assert "does not fit this run" in str(error) and str(error).isprintable()
        return
    stage.step(stage.train_set.batch([0, 1]), 2, 0, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def prior(latents, vqvae):
    torch.manual_seed(0)
    gain = torch.eye(6).repeat(45, 1, 1)
    return DCGANPrior(Generator(embeddings_dim=8), latents.space, vqvae, gain=gain)


@settings(FUZZ, max_examples=FUZZ.max_examples // 2)
@given(choices=st.data())
def test_a_strange_prior_samples_or_is_refused(path, prior, vqvae, choices):
    path = path.with_suffix(".pth")
    torch.save(choices.draw(changed(prior.checkpoint())), path)
    found = try_to_load(path, load_prior, vqvae)
    if found is not None:
        assert found.sample(found.noise(1, torch.Generator())).shape == (1, 64, 64)


@pytest.fixture(scope="module")
def saved_run(data, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run after its first epoch, as far as `train.py --resume --dry-run` looks, and its resume.pth."""
    folder = tmp_path_factory.mktemp("run")
    row = {"stage": "vqvae", "epoch": 1, "updates": 4, "seconds": 1.0, "ssim_mean": 0.5}
    state = {"epoch": 1, "history": {"training_loss": [0.1]}, "networks": {}, "extra": {}}
    run = Run(Options(data=str(data)), folder, {"vqvae": state}, [row], fast_path=FastPath("cpu"))
    run.save()
    return folder, torch.load(folder / "resume.pth", weights_only=True)


@settings(FUZZ, max_examples=FUZZ.max_examples // 2)
@given(choices=st.data())
def test_a_strange_resume_file_resumes_or_is_refused(saved_run, choices):
    folder, contents = saved_run
    torch.save(choices.draw(changed(contents)), folder / "resume.pth")
    with bounded():
        done = run_program("train.py", "--resume", folder, "--dry-run", cwd=folder)
    if done.returncode:
        refused(done)
        assert done.stderr.count("\n") == 1
