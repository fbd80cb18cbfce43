"""Between VQ-VAE and DCGAN: the scale of latents, encoding a split, snapping to codes, generator.pth."""

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import PRETRAINED

from dataset import OasisDataset
from modules import VQVAE, Generator
from support import device
from training import codebook
from training.latents import Latents, LatentScale, Prior, brightness, codebook_hash, walk
from training.vqvae import load_vqvae


@pytest.fixture(scope="module")
def train_set(data):
    return OasisDataset(data, "train")


@pytest.fixture(scope="module")
def vqvae(train_set):
    torch.manual_seed(0)
    model = VQVAE(64, 8).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z_e = model.latents(train_set.batch(range(15)))
    codebook.start_from(model.vector_quantizer, z_e, rng)
    for _ in range(3):
        codebook.k_means_step(model.vector_quantizer, z_e, rng)
    return model


@pytest.fixture(scope="module")
def latents(vqvae, train_set):
    return Latents(vqvae, train_set, LatentScale.fit(vqvae, train_set))


def test_scale_maps_there_and_back():
    scale = LatentScale(torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 1.0], [0.0, 4.0]]))
    t = torch.stack([torch.linspace(-1, 1, 9), torch.linspace(1, -1, 9) ** 3]).view(1, 2, 3, 3)
    z = scale.from_tanh(t)
    expected = [[0.5 * a + b + 1, 4 * b - 2] for a, b in t[0].flatten(1).T.tolist()]
    torch.testing.assert_close(z[0].flatten(1).T, torch.tensor(expected))
    torch.testing.assert_close(scale.to_tanh(z), t)
    assert scale.to_tanh(z + 100).max() == 1  # clipped, not beyond what tanh can give


def test_scale_is_fitted_as_defined(vqvae, train_set, latents):
    with torch.no_grad():
        z_e = vqvae.latents(train_set.batch(range(15))).permute(0, 2, 3, 1).reshape(-1, 8).double()
    codes = vqvae.encode(train_set.batch(range(15))).flatten()
    background = codes.mode().values
    shift = vqvae.vector_quantizer.embedding.weight[background].detach()
    torch.testing.assert_close(latents.scale.shift, shift)
    scale, difference = latents.scale.scale.double(), z_e[codes != background] - shift.double()
    factor = difference.square().mean().sqrt() / 0.4
    torch.testing.assert_close(scale.T @ scale, factor**2 * torch.eye(8).double(), rtol=1e-3, atol=1e-5)  # a rotation
    in_range = difference @ torch.linalg.inv(scale).T
    assert in_range.square().mean().sqrt().item() == pytest.approx(0.4, rel=1e-3)
    # the direction of greatest variance, by SciPy, is spread evenly: all channels have the same share of it
    first = torch.from_numpy(scipy.linalg.svd(difference.numpy(), full_matrices=False)[2][0].copy())
    shares = (torch.linalg.inv(scale) @ first).abs()
    torch.testing.assert_close(shares, shares.mean().expand(8), rtol=1e-3, atol=0)


def test_scale_of_the_codebook_fits_it_into_tanhs_range(vqvae):
    scale = LatentScale.of_codebook(vqvae)
    embeddings = vqvae.vector_quantizer.embedding.weight.detach()
    t = scale.to_tanh(embeddings[:, :, None, None])
    torch.testing.assert_close(t[:, :, 0, 0], embeddings / embeddings.abs().max())
    assert t.abs().max() == pytest.approx(1)


def test_a_codebook_of_one_used_code_has_a_scale(train_set):
    model = VQVAE(1, 4)
    scale = LatentScale.fit(model, train_set)
    assert scale.scale.isfinite().all() and torch.linalg.matrix_rank(scale.scale) == 4


def test_quantized_latents_are_embeddings(vqvae, train_set):
    scale = LatentScale.of_codebook(vqvae)
    found = scale.from_tanh(Latents(vqvae, train_set, scale, quantized=True).batch([4]))
    expected = vqvae.vector_quantizer.look_up(vqvae.encode(train_set.batch([4])))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # half precision


def test_stored_latents_equal_encoding_afresh(vqvae, train_set, latents, monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda device: 0)
    afresh = Latents(vqvae, train_set, latents.scale)
    assert latents.stored and not afresh.stored
    first, second = latents.batch([3, 11, 0]), afresh.batch([3, 11, 0])
    assert first.shape == (3, 8, 64, 64) and first.dtype == torch.float32 and first.abs().max() <= 1
    torch.testing.assert_close(first, second, atol=4e-3, rtol=0)  # both rounded to half precision
    assert (first == second).float().mean() > 0.99
    assert not Latents(vqvae, train_set, latents.scale, stored=False).stored


def test_latents_decode_to_the_image(vqvae, train_set, latents):
    codes = vqvae.vector_quantizer.nearest(latents.scale.from_tanh(latents.batch([2])))
    expected = vqvae.encode(train_set.batch([2]))
    assert (codes == expected).float().mean() > 0.95  # but for values that were clipped or fell across a boundary


def test_samples_are_snapped_to_the_codebook(vqvae, latents):
    torch.manual_seed(0)
    prior = Prior(Generator(embeddings_dim=8).eval(), latents.scale, vqvae)
    noise = prior.noise(5, torch.Generator().manual_seed(0))
    codes = prior.sample(noise)
    continuous = latents.scale.from_tanh(prior.generator(noise)).detach().permute(0, 2, 3, 1).reshape(-1, 8)
    nearest = torch.cdist(continuous.double(), vqvae.vector_quantizer.embedding.weight.double()).argmin(1)
    assert codes.shape == (5, 64, 64) and (codes.flatten() == nearest).float().mean() > 0.999
    images = prior.sample_images(noise, size=2)
    assert images.shape == (5, 1, 256, 256) and 0 <= images.min() and images.max() <= 1
    torch.testing.assert_close(images, vqvae.decode(codes).clamp(0, 1), atol=1e-5, rtol=0)


def test_calibration_gives_generated_brains_the_brightness_real_ones(train_set):
    vqvae = load_vqvae(PRETRAINED / "vqvae.pth")
    latents = Latents(vqvae, train_set, LatentScale.fit(vqvae, train_set))

    class Weak(torch.nn.Module):
        """A generator that draws real latents at 0.7 of their amplitude: its noise holds their numbers."""

        def forward(self, noise):
            return 0.7 * latents.batch([int(n) for n in noise[:, 0, 0, 0]])

    prior = Prior(Weak().eval(), latents.scale, vqvae)
    noise = torch.arange(15.0).view(15, 1, 1, 1)
    real = vqvae.decode(vqvae.encode(train_set.batch(range(15)))).clamp(0, 1)
    wanted = np.sqrt(np.mean(real.double().numpy().reshape(15, 16, 16, 16, 16).mean((2, 4)) ** 2))
    assert brightness(real) == pytest.approx(wanted, rel=1e-5)
    dark = brightness(prior.sample_images(noise))
    for _ in range(2):  # a second time changes nothing
        prior.calibrate(wanted, latents.scale, noise)
        assert brightness(prior.sample_images(noise)) == pytest.approx(wanted, rel=0.01)
    assert dark < 0.95 * wanted
    assert (prior.scale.scale / latents.scale.scale).mean().item() == pytest.approx(1 / 0.7, rel=0.05)
    assert torch.equal(prior.scale.shift, latents.scale.shift)


def test_walk_goes_from_one_noise_vector_to_the_other_in_equal_angles():
    rng = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 128, 1, 1, generator=rng)
    steps = walk(start, 1.5 * end, 7)
    assert steps.shape == (7, 128, 1, 1)
    torch.testing.assert_close(steps[0], start)
    torch.testing.assert_close(steps[-1], 1.5 * end)
    lengths = steps.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.linspace(start.norm(), 1.5 * end.norm(), 7))
    units = (steps.flatten(1) / lengths[:, None]).double()
    angles = torch.acos((units[:-1] * units[1:]).sum(1))
    torch.testing.assert_close(angles, angles[:1].expand(6), rtol=1e-4, atol=0)
    torch.testing.assert_close(walk(start, start, 3), start.expand(3, -1, -1, -1))


def test_checkpoint_there_and_back(vqvae, latents, tmp_path):
    prior = Prior(Generator(embeddings_dim=8), latents.scale, vqvae)
    torch.save(prior.checkpoint(), tmp_path / "generator.pth")
    again = Prior.from_checkpoint(torch.load(tmp_path / "generator.pth", weights_only=True), vqvae)
    noise = torch.randn(2, 128, 1, 1)
    assert torch.equal(prior.sample(noise), again.sample(noise))


def test_checkpoint_of_another_codebook_is_refused(vqvae, latents):
    contents = Prior(Generator(embeddings_dim=8), latents.scale, vqvae).checkpoint()
    other = VQVAE(64, 8)
    assert codebook_hash(other) != codebook_hash(vqvae)
    with pytest.raises(ValueError, match="another codebook"):
        Prior.from_checkpoint(contents, other)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("state_dict", 3, "weights of a Generator"),
        ("state_dict", {}, "is missing"),
        ("shift", 1.0, "'shift'"),
        ("shift", torch.zeros(7), "'shift'"),
        ("scale", torch.full((8, 8), torch.nan), "'scale'"),
        ("scale", torch.eye(7), "'scale' is not 8 x 8"),
    ],
)
def test_spoiled_checkpoint_is_refused(vqvae, latents, key, value, message):
    contents = Prior(Generator(embeddings_dim=8), latents.scale, vqvae).checkpoint() | {key: value}
    with pytest.raises(ValueError, match=message):
        Prior.from_checkpoint(contents, vqvae)


@pytest.mark.parametrize("contents", [{}, [], {"state_dict": {}}, VQVAE(64, 8).state_dict()])
def test_what_is_no_generator_is_refused(vqvae, contents):
    with pytest.raises(ValueError, match="no generator"):
        Prior.from_checkpoint(contents, vqvae)
