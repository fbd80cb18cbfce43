"""Between VQ-VAE and DCGAN: the scale of latents, encoding a split, snapping to codes, generator.pth."""

import pytest
import torch
from conftest import quiet

import codebook
import hardware
from dataset import OasisDataset
from modules import VQVAE, Generator
from prior import Latents, LatentScale, Prior, codebook_hash


@pytest.fixture(scope="module")
def train_set(data):
    return OasisDataset(data, "train", progress=quiet)


@pytest.fixture(scope="module")
def vqvae(train_set):
    torch.manual_seed(0)
    model = VQVAE(64, 8).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z_e = model.latents(train_set.__getitems__(range(15)))
    codebook.start_from(model.vector_quantizer, z_e, random)
    for _ in range(3):
        codebook.k_means_step(model.vector_quantizer, z_e, random)
    return model


@pytest.fixture(scope="module")
def latents(vqvae, train_set):
    return Latents(vqvae, train_set, quiet)


def test_scale_maps_there_and_back():
    scale = LatentScale(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0]))
    z = torch.stack([torch.linspace(0.5, 1.5, 9), torch.linspace(-6, 2, 9)]).view(1, 2, 3, 3)
    t = scale.to_tanh(z)
    assert t.min() == -1 and t.max() == 1
    torch.testing.assert_close(scale.from_tanh(t), z)
    assert scale.to_tanh(z + 100).max() == 1  # clipped, not beyond what tanh can give


def test_scale_is_fitted_as_defined(vqvae, train_set, latents):
    with torch.no_grad():
        z_e = vqvae.latents(train_set.__getitems__(range(15))).permute(0, 2, 3, 1).reshape(-1, 8).double()
    codes = vqvae.encode(train_set.__getitems__(range(15))).flatten()
    background = codes.mode().values
    shift = vqvae.vector_quantizer.embedding.weight[background].detach()
    assert torch.equal(latents.scale.shift, shift)
    others = z_e[codes != background] - shift.double()
    torch.testing.assert_close(latents.scale.scale.double(), 2.5 * others.square().mean(0).sqrt(), rtol=1e-3, atol=0)


def test_stored_latents_equal_encoding_afresh(vqvae, train_set, latents, monkeypatch):
    monkeypatch.setattr(hardware, "free_memory", lambda device: 0)
    afresh = Latents(vqvae, train_set, quiet)
    assert latents.stored and not afresh.stored
    first, second = latents.__getitems__([3, 11, 0]), afresh.__getitems__([3, 11, 0])
    assert first.shape == (3, 8, 64, 64) and first.dtype == torch.float32 and first.abs().max() <= 1
    torch.testing.assert_close(first, second, atol=4e-3, rtol=0)  # both rounded to half precision
    assert (first == second).float().mean() > 0.99
    assert not Latents(vqvae, train_set, quiet, stored=False).stored


def test_latents_decode_to_the_image(vqvae, train_set, latents):
    codes = vqvae.vector_quantizer.nearest(latents.scale.from_tanh(latents.__getitems__([2])))
    expected = vqvae.encode(train_set.__getitems__([2]))
    assert (codes == expected).float().mean() > 0.95  # but for values that were clipped or fell across a boundary


def test_samples_are_snapped_to_the_codebook(vqvae, latents):
    torch.manual_seed(0)
    prior = Prior(Generator(embeddings_dim=8).eval(), latents.scale, vqvae)
    noise = torch.randn(5, prior.noise_dim, 1, 1)
    codes = prior.sample(noise)
    continuous = latents.scale.from_tanh(prior.generator(noise)).detach().permute(0, 2, 3, 1).reshape(-1, 8)
    nearest = torch.cdist(continuous.double(), vqvae.vector_quantizer.embedding.weight.double()).argmin(1)
    assert codes.shape == (5, 64, 64) and (codes.flatten() == nearest).float().mean() > 0.999
    images = prior.sample_images(noise, at_once=2, progress=quiet)
    assert images.shape == (5, 1, 256, 256) and 0 <= images.min() and images.max() <= 1
    torch.testing.assert_close(images, vqvae.decode(codes).clamp(0, 1), atol=1e-5, rtol=0)


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
        ("scale", torch.full((8,), torch.nan), "'scale'"),
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
