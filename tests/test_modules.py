"""The networks against the report's printed structures, brute force, and the definitions of the losses."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from modules import VQVAE, Discriminator, Generator, ResidualBlock, VectorQuantizer, dcgan_init
from training import codebook

STRUCTURES = Path(__file__).parent / "structures"  # as printed in the report


@pytest.mark.parametrize("network", [VQVAE, Generator, Discriminator])
def test_structure_is_the_reports(network):
    assert str(network()) + "\n" == (STRUCTURES / f"{network.__name__}.txt").read_text()


def test_state_dict_has_the_keys_of_the_structure_and_no_others():
    layers = {"encoder.layers": [(0, True), (2, True)], "decoder.layers": [(0, True), (3, True), (5, True)]}
    blocks = {"encoder.layers": (3, 4), "decoder.layers": (1, 2)}
    expected = {"conv1.weight", "conv1.bias", "vector_quantizer.embedding.weight"}
    for part, numbers in layers.items():
        expected |= {f"{part}.{i}.{kind}" for i, _ in numbers for kind in ("weight", "bias")}
        expected |= {f"{part}.{i}._residual_block.{j}.weight" for i in blocks[part] for j in (1, 3)}
    assert set(VQVAE().state_dict()) == expected


def test_shapes_and_ranges(images):
    vqvae, x = VQVAE(), images[:2]
    vq_loss, x_hat, z_q, codes = vqvae(x)
    assert vq_loss.shape == () and x_hat.shape == (2, 1, 256, 256) and z_q.shape == (2, 64, 64, 64)
    assert codes.shape == (2, 64, 64) and codes.dtype == torch.int64
    assert vqvae.latents(x).shape == (2, 64, 64, 64)
    fake = Generator()(torch.randn(2, 128, 1, 1))
    assert fake.shape == (2, 64, 64, 64) and fake.abs().max() <= 1
    probability = Discriminator()(fake)
    assert probability.shape == (2, 1) and (probability > 0).all() and (probability < 1).all()


def test_residual_block_is_its_formula():
    block, x = ResidualBlock(), torch.randn(2, 64, 8, 8)
    first, second = block._residual_block[1].weight, block._residual_block[3].weight
    expected = x + F.conv2d(F.relu(F.conv2d(F.relu(x), first, padding=1)), second)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    "codes, said",
    [
        (torch.zeros(1, 64, 64), "integers"),
        (torch.zeros(1, 4096, dtype=torch.long), r"\(1, 4096\)"),
        (torch.full((1, 64, 64), 512), "from 0 to 511"),
        (torch.full((1, 64, 64), -1), "from 0 to 511"),
    ],
)
def test_what_are_no_codes_is_refused(codes, said):
    with pytest.raises(ValueError, match=said):
        VQVAE().decode(codes)


def test_encode_and_decode_are_the_two_halves_of_forward(images):
    vqvae = VQVAE().eval()
    with torch.no_grad():
        codebook.start_from(vqvae.vector_quantizer, vqvae.latents(images), torch.Generator().manual_seed(0))
        _, x_hat, _, codes = vqvae(images)
    assert torch.equal(vqvae.encode(images), codes)
    assert codes.unique().numel() > 50  # else the comparison would show little
    torch.testing.assert_close(vqvae.decode(codes), x_hat, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_nearest_against_brute_force(scale):
    torch.manual_seed(0)
    quantizer = VectorQuantizer()
    z = torch.randn(3, 64, 20, 20) * scale
    torch.nn.init.normal_(quantizer.embedding.weight, std=scale)
    codes = quantizer.nearest(z)
    latents, embeddings = z.permute(0, 2, 3, 1).reshape(-1, 64).double(), quantizer.embedding.weight.detach().double()
    distances = (latents[:, None] - embeddings[None]).square().sum(2)
    chosen = distances.gather(1, codes.view(-1, 1))[:, 0]
    # by distance, since two embeddings may be equally near
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n_embeddings, at_once", [(16, 4), (512, 4), (1024, 2), (65536, 1)])
def test_distances_to_a_large_codebook_are_held_for_fewer_images_at_once(n_embeddings, at_once, monkeypatch):
    sizes, convolve = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda part, *args: sizes.append(len(part)) or convolve(part, *args))
    codes = VectorQuantizer(n_embeddings, 2).nearest(torch.randn(8, 2, 2, 2))
    assert codes.shape == (8, 2, 2) and sizes == [at_once] * (8 // at_once)


def test_vq_loss_is_its_definition():
    torch.manual_seed(0)
    quantizer, z_e = VectorQuantizer(32, 8, beta=0.7), torch.randn(2, 8, 6, 6)
    vq_loss, z_q, codes = quantizer(z_e)
    total = 0.0
    for b in range(2):
        for i in range(6):
            for j in range(6):
                e = quantizer.embedding.weight[codes[b, i, j]].double()
                torch.testing.assert_close(z_q[b, :, i, j].double(), e, atol=1e-6, rtol=0)
                total += (z_e[b, :, i, j].double() - e).square().sum().item()
    assert vq_loss.item() == pytest.approx(1.7 * total / z_e.numel(), rel=1e-5)


def test_gradient_of_each_loss_term():
    torch.manual_seed(0)
    quantizer, z_e = VectorQuantizer(32, 8, beta=0.25), torch.randn(2, 8, 6, 6, requires_grad=True)
    codebook = quantizer.embedding.weight
    vq_loss, z_q, codes = quantizer(z_e)
    embeddings = codebook[codes].permute(0, 3, 1, 2)

    # the reconstruction: straight through to the encoder, nothing to the codebook
    upstream = torch.randn_like(z_q)
    to_encoder, to_codebook = torch.autograd.grad(
        (z_q * upstream).sum(), (z_e, codebook), retain_graph=True, allow_unused=True
    )
    assert torch.equal(to_encoder, upstream)
    assert to_codebook is None or not to_codebook.any()

    # the vq loss: to the encoder from the commitment alone, to the codebook from the codebook term alone
    to_encoder, to_codebook = torch.autograd.grad(vq_loss, (z_e, codebook))
    torch.testing.assert_close(to_encoder, 0.25 * 2 * (z_e - embeddings).detach() / z_e.numel())
    expected = torch.zeros_like(codebook)
    pulls = 2 * (embeddings - z_e).detach().permute(0, 2, 3, 1) / z_e.numel()
    for k in range(32):
        expected[k] = pulls[codes == k].sum(0)
    torch.testing.assert_close(to_codebook, expected)


def test_quantizer_stays_float32_under_autocast():
    torch.manual_seed(0)
    quantizer, z_e = VectorQuantizer(), torch.randn(1, 64, 16, 16)
    plain = quantizer(z_e)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(z_e)
        assert torch.equal(quantizer.nearest(z_e), plain[2])
    assert mixed[0].dtype == mixed[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_discriminator_logits_of_coefficients_are_those_of_latents_with_all_their_gradients():
    torch.manual_seed(0)
    discriminator, found = Discriminator().apply(dcgan_init).double(), []
    mix = torch.linalg.qr(torch.randn(64, 9, dtype=torch.double))[0]
    c = torch.randn(3, 9, 64, 64, dtype=torch.double, requires_grad=True)
    for logits in (discriminator.net[:-1](torch.einsum("dk,bkhw->bdhw", mix, c)), discriminator.logits(c, mix)):
        (slope,) = torch.autograd.grad(logits.sum(), c, create_graph=True)
        of_weights = torch.autograd.grad(logits.mean() + slope.square().mean(), discriminator.parameters())
        found.append([logits, slope, *of_weights])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_dcgan_init():
    torch.manual_seed(0)
    generator = Generator().apply(dcgan_init)
    weight, gain = generator.net[1][0].weight, generator.net[0][1].weight
    assert weight.mean().abs() < 1e-3 and weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert gain.mean().item() == pytest.approx(1, abs=0.01) and gain.std().item() == pytest.approx(0.02, rel=0.2)
