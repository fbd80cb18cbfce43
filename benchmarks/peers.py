"""The other sides of benchmarks that compare: the report's style written plainly, and packages from the index."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import Decoder, Discriminator, Encoder, Generator, dcgan_init


class ReportStyleQuantizer(nn.Module):
    """The quantizer as the report's system and many tutorials write it: all distances, a one-hot matrix, a product."""

    def __init__(self, n_embeddings: int = 512, embeddings_dim: int = 64, beta: float = 0.25):
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(n_embeddings, embeddings_dim)

    def forward(self, z_e: Tensor) -> tuple[Tensor, Tensor]:
        z = z_e.permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, z.shape[-1])
        weight = self.embedding.weight
        distances = flat.square().sum(1, keepdim=True) + weight.square().sum(1) - 2 * flat @ weight.T
        codes = distances.argmin(1, keepdim=True)
        one_hot = torch.zeros(len(codes), len(weight), device=z.device, dtype=z.dtype)
        one_hot.scatter_(1, codes, 1)
        z_q = (one_hot @ weight).view(z.shape)
        loss = F.mse_loss(z_q, z.detach()) + self.beta * F.mse_loss(z, z_q.detach())
        return loss, (z + (z_q - z).detach()).permute(0, 3, 1, 2).contiguous()


class PeerQuantizer(nn.Module):
    """vector-quantize-pytorch's quantizer as it comes: exponential moving averages, commitment loss."""

    def __init__(self):
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.quantize = VectorQuantize(dim=64, codebook_size=512, accept_image_fmap=True, commitment_weight=0.25)

    def forward(self, z_e: Tensor) -> tuple[Tensor, Tensor]:
        z_q, _, loss = self.quantize(z_e)
        return loss.sum(), z_q


class Autoencoder(nn.Module):
    """The report's networks around a quantizer: image (B, 1, 256, 256) -> (vq_loss, x_hat)."""

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.encoder = Encoder()
        self.conv1 = nn.Conv2d(64, 64, (1, 1))
        self.decoder = Decoder()
        self.vector_quantizer = quantizer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loss, z_q = self.vector_quantizer(self.conv1(self.encoder(x)))
        return loss, self.decoder(z_q)


class Monai(nn.Module):
    """MONAI's VQVAE with our widths, strides, codebook and number of residual layers."""

    def __init__(self):
        super().__init__()
        from monai.networks.nets import VQVAE

        self.net = VQVAE(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            channels=(32, 64),
            num_res_layers=2,
            num_res_channels=(32, 32),
            downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
            upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
            num_embeddings=512,
            embedding_dim=64,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, loss = self.net(x)
        return loss, x_hat


VQVAES = {
    "report's style": lambda: Autoencoder(ReportStyleQuantizer()),
    "vector-quantize-pytorch": lambda: Autoencoder(PeerQuantizer()),
    "MONAI VQVAE": Monai,
}


def vqvae_step(network: nn.Module):
    """A training step as tutorials write it, as a function of a batch."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def step(x: Tensor) -> None:
        vq_loss, x_hat = network(x)
        loss = F.mse_loss(x_hat, x) + vq_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def dcgan_step(real_batch, device):
    """A step with R1 in standard layout, eager, as tutorials write it; `real_batch()` gives what D sees of latents."""
    generator, discriminator = (kind().apply(dcgan_init).to(device) for kind in (Generator, Discriminator))
    g_optimizer, d_optimizer = (
        torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (generator, discriminator)
    )
    bce = nn.BCELoss()

    def step() -> None:
        real = real_batch().requires_grad_(True).clone(memory_format=torch.contiguous_format)
        fake = generator(torch.randn(len(real), 128, 1, 1, device=device))
        ones = torch.ones(len(real), 1, device=device)
        zeros = torch.zeros(len(real), 1, device=device)
        d_real = discriminator(real)
        (gradient,) = torch.autograd.grad(d_real.logit().sum(), real, create_graph=True)
        loss = bce(d_real, ones) + bce(discriminator(fake.detach()), zeros)
        loss = loss + gradient.square().sum((1, 2, 3)).mean() / 2
        d_optimizer.zero_grad()
        loss.backward()
        d_optimizer.step()
        g_loss = bce(discriminator(fake), ones)
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()

    return step
