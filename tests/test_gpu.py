"""The paths for CUDA and MPS: on a pretended GPU everywhere, and on a real one where there is one (make gpu-check)."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import SMALL, new_run, rows, run_program

from dataset import OasisDataset
from evaluation import generation, reconstruction
from modules import VQVAE
from preparation import phantoms
from priors.latent_cache import LatentCache
from priors.latent_space import LatentSpace
from support import files
from support.device import FastPath, exact_float32
from support.run import Run
from training import codebook, dcgan
from training.fit import update_average
from training.options import Options
from training.recipes import DCGAN
from training.vqvae import VQVAEStage

try:
    from pretended_gpu import pretended
except (ImportError, AttributeError):  # it is made of private parts of PyTorch
    pretended = None

REAL = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]


class Gpu(NamedTuple):
    name: str
    waited: Callable[[Callable], list[str]]  # for what the host waits for the GPU in a call


@pytest.fixture(params=["pretended cuda", "pretended mps", *REAL])
def gpu(request):
    name = request.param.split()[-1]
    if request.param in REAL:

        def waited(work: Callable) -> list[str]:
            if name == "mps":  # which cannot tell
                return work() and []
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    work()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            return [str(each.message) for each in caught if "synchroniz" in str(each.message)]

        with exact_float32():  # what is compared with the CPU must not be TF32's
            yield Gpu(name, waited)
        return
    if pretended is None:
        pytest.skip(f"torch {torch.__version__} has other private parts than tests/pretended_gpu.py needs")
    with pretended(name) as waits:

        def waited(work: Callable) -> list[str]:
            waits.clear()
            work()
            return list(waits)

        yield Gpu(name, waited)


def new_stage(make, data, name: str, tmp_path, **options):
    """A stage on a device, with small networks, and its training images."""
    chosen = Options(n_embeddings=16, embeddings_dim=8, batch_size=4, dcgan_batch_size=4, **options)
    device = torch.device(name)
    run = Run(chosen, tmp_path, device=device, fast_path=FastPath(device.type))
    train_set, validate_set = (OasisDataset(data, split, device) for split in ("train", "validate"))
    return make(run, train_set, validate_set)


def new_gan(run, train_set, validate_set):
    torch.manual_seed(0)
    vqvae = VQVAE(16, 8).eval().to(run.device)
    with torch.no_grad():
        codebook.start_from(vqvae.vector_quantizer, vqvae.latents(train_set.batch(range(4))), torch.Generator())
    return dcgan.DCGANStage(run, vqvae, train_set, validate_set)


def update(stage, batch, step: int) -> torch.Tensor:
    """One step as in `fit`, on what `part` has left of the images."""
    stage.box = slice(None), slice(None)
    values = stage.step(batch, len(batch), step, torch.Generator().manual_seed(step))
    for name, average in stage.averages.items():
        update_average(average, stage.networks[name], step, stage.average_decay)
    return values


def part(images: torch.Tensor) -> torch.Tensor:
    """The middle of images where they are computed on a CPU, all of them on a real GPU."""
    return images if REAL else images[..., 64:192, 64:192]


def assert_a_run_can_move(stage, new: Callable, folder, batch: torch.Tensor) -> None:
    """A stage's state goes to the CPU and back to its device: nothing is lost, the next step's losses are the same."""
    state, back, there = through_a_file(stage, folder), new("cpu"), new(batch.device.type)
    back.load_state_dict(state)
    there.load_state_dict(through_a_file(back, folder))
    assert equal(through_a_file(there, folder), through_a_file(stage, folder))
    losses = [update(each, batch.detach().to(each.run.device), 111).cpu() for each in (stage, back, there)]
    for found in losses[1:]:  # the fourth, of the generator, follows an update that amplifies rounding
        torch.testing.assert_close(found[:3], losses[0][:3], rtol=0.01, atol=0)


def equal(one, other) -> bool:
    """Whether two states have the same keys and values, but for learning rates, which a step sets."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(key == "lr" or equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def through_a_file(stage, folder) -> dict:
    """A stage's state, as a resumed run loads it."""
    files.save(stage.state_dict(), folder / "state.pth")
    return files.load(folder / "state.pth")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder of four images in each split, of two subjects."""
    folder = tmp_path_factory.mktemp("few")
    phantoms.write(folder, {"train": [1, 2], "validate": [3, 4], "test": [5, 6]}, slices=2)
    return folder


@pytest.mark.parametrize("method", codebook.METHODS)
def test_the_vqvae_waits_only_to_revive_codes_and_has_the_losses_of_the_cpu(gpu, method, few, tmp_path):
    stage, on_cpu = (new_stage(VQVAEStage, few, name, tmp_path, codebook=method) for name in (gpu.name, "cpu"))
    losses = []
    for step in (0, 1, 101, 110):  # k-means twice, nothing, revival
        batch = part(stage.data.batch([0, 2]))
        if step == 110 and method == "kmeans":
            assert stage.codebook.usage.sum() == 3 * batch[:, :, ::4, ::4].numel()
            for each in (stage, on_cpu):
                each.codebook.usage.copy_(torch.arange(16).div(3, rounding_mode="floor"))  # so that three are dead
            before = stage.codebook.embeddings.cpu().clone()
        waits = gpu.waited(lambda step=step, batch=batch: losses.append(update(stage, batch, step)))
        assert waits == [] or step != 101 and (method == "kmeans" or step == 0)
        expected = update(on_cpu, batch.cpu(), step)
        torch.testing.assert_close(losses[-1].cpu(), expected, rtol=0.01, atol=0)
    for found in stage.vqvae.state_dict().values():
        assert found.device.type == gpu.name and found.isfinite().all()
    if method == "kmeans":
        moved = (stage.codebook.embeddings.cpu() - before).abs().amax(1) > 0.002  # a step of Adam is of 0.001
        assert moved[:3].any() and not moved[3:].any()
    new = partial(new_stage, VQVAEStage, few, tmp_path=tmp_path, codebook=method)
    assert_a_run_can_move(stage, new, tmp_path, batch)
    if gpu.name == "cuda" and "cuda" in REAL and torch.cuda.get_device_capability() >= (8, 0):
        stage.fast_path = stage.fast_path._replace(bfloat16=True)
        assert gpu.waited(lambda: update(stage, batch, 120)) == []


@pytest.mark.parametrize("method", DCGAN)
def test_the_dcgan_never_waits(gpu, method, few, tmp_path, monkeypatch):
    stage = new_stage(new_gan, few, gpu.name, tmp_path, dcgan_training=method)
    latents = stage.data
    assert latents.coefficients.device.type == gpu.name and stage.space.shift.device.type == gpu.name
    update(stage, latents.batch([0, 1, 2]), 0)
    assert gpu.waited(lambda: update(stage, latents.batch([3, 0, 1]), 1)) == []
    monkeypatch.setattr("priors.latent_cache.fits", lambda n_bytes, device: False)
    beside = LatentCache(stage.prior.vqvae, stage.samples.train_set, stage.space, stage.recipe.quantized)
    assert beside.coefficients.device.type == "cpu"
    assert gpu.waited(lambda: update(stage, beside.batch([3, 0, 1]), 2)) == []
    torch.testing.assert_close(latents.batch([2]).cpu(), beside.batch([2]).cpu(), atol=2e-3, rtol=0)
    monkeypatch.undo()
    new = partial(new_stage, new_gan, few, tmp_path=tmp_path, dcgan_training=method)
    assert_a_run_can_move(stage, new, tmp_path, latents.batch([1, 2]))
    if gpu.name == "cuda" and "cuda" in REAL and torch.cuda.get_device_capability() >= (8, 0):
        stage.autocast = partial(torch.autocast, "cuda", torch.bfloat16)
        assert gpu.waited(lambda: update(stage, latents.batch([3, 0, 1]), 4)) == []


def test_measures_are_those_of_the_cpu(gpu, few):
    torch.manual_seed(0)
    vqvae = VQVAE(16, 8).eval()
    found, expected = [], []
    for name, results in ((gpu.name, found), ("cpu", expected)):
        train, held_out = (OasisDataset(few, split, name) for split in ("train", "validate"))
        model = vqvae.to(name)
        scores = reconstruction.score(model, held_out)
        results += [*scores[:3], torch.tensor(list(reconstruction.codebook_usage(scores).values()))]
        x = held_out.batch(range(4))
        fake = generation.of_arrays(generation.to_bytes(x.flip(3)))
        compared = generation.compare(held_out.as_images(), fake, model, train.as_images())
        results.append(torch.tensor([(row.fake.value, row.real.value) for row in compared.rows]))
        space = LatentSpace.fit(model, train, 4, 0.5)
        results.append(space.shift)
    for one, other in zip(found, expected, strict=True):
        assert one.device.type in ("cpu", gpu.name)
        torch.testing.assert_close(one.cpu().double(), other.double(), rtol=1e-2, atol=1e-4, equal_nan=True)


def test_the_programs_use_the_gpu(gpu, few, tmp_path, without_figures):
    words = ("--data", few, *SMALL[:-2], "--epochs", 1, "--dcgan-epochs", 1, "--device", gpu.name)
    done = run_program("train.py", *words, cwd=tmp_path)
    run = new_run(done, tmp_path / "gen_imgs")
    assert f"Device: {gpu.name}. " in done.stdout and len(rows(run, "dcgan")) == 1
    words, codes = ("predict.py", run / "vqvae.pth", "--split", "validate"), []
    done = run_program(*words, "--device", gpu.name, cwd=tmp_path)
    assert f"SSIM mean: {float(rows(run, 'vqvae')[0]['ssim_mean']):.4f}" in done.stdout, done.stderr
    for device in (gpu.name, "cpu"):
        assert not run_program(*words, "--export-codes", "codes.npz", "--device", device, cwd=tmp_path).returncode
        codes.append(np.load(tmp_path / "codes.npz")["codes"])
    assert (codes[0] == codes[1]).mean() > 0.99
    words = ("predict.py", run / "vqvae.pth", "--prior", run / "generator.pth", "--samples", 2)
    assert "Decoded 2 new slices" in run_program(*words, "--device", gpu.name, cwd=tmp_path).stdout
