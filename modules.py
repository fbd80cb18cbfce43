"""The networks: the VQ-VAE that turns a 256x256 slice into 64x64 codes and back, and the DCGAN of its latents.

Sources: van den Oord et al. 2017, "Neural Discrete Representation Learning", arXiv 1711.00937 (VQ-VAE);
Radford et al. 2015, "Unsupervised Representation Learning with Deep Convolutional GANs", arXiv 1511.06434 (DCGAN).
B is the batch size throughout.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Images whose distances to the codebook are held at once, 8 MB each: near a CPU's cache; on a GPU one piece of work.
IMAGES_AT_ONCE = {"cpu": 4, "cuda": 64}


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))) at constant resolution: (B, C, H, W) -> (B, C, H, W).

    Args:
        n_hiddens: channels in and out, C.
        n_residual_hidden_layers: channels between the two convolutions.
    """

    def __init__(self, n_hiddens: int = 64, n_residual_hidden_layers: int = 32):
        super().__init__()
        self._residual_block = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(n_hiddens, n_residual_hidden_layers, (3, 3), (1, 1), (1, 1), bias=False),
            nn.ReLU(),
            nn.Conv2d(n_residual_hidden_layers, n_hiddens, (1, 1), (1, 1), bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self._residual_block(x)


class Encoder(nn.Module):
    """Image (B, 1, H, W) in [0, 1] -> features (B, n_hiddens, H/4, W/4)."""

    def __init__(self, n_hiddens: int = 64, n_residual_hidden_layers: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, n_hiddens // 2, (4, 4), (2, 2), (1, 1)),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_hiddens // 2, n_hiddens, (4, 4), (2, 2), (1, 1)),
            ResidualBlock(n_hiddens, n_residual_hidden_layers),
            ResidualBlock(n_hiddens, n_residual_hidden_layers),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Decoder(nn.Module):
    """Latents (B, embeddings_dim, h, w) -> image (B, 1, 4h, 4w), not clamped to [0, 1]."""

    def __init__(self, embeddings_dim: int = 64, n_hiddens: int = 64, n_residual_hidden_layers: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(embeddings_dim, n_hiddens, (3, 3), (1, 1), (1, 1)),
            ResidualBlock(n_hiddens, n_residual_hidden_layers),
            ResidualBlock(n_hiddens, n_residual_hidden_layers),
            nn.ConvTranspose2d(n_hiddens, n_hiddens // 2, (4, 4), (2, 2), (1, 1)),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(n_hiddens // 2, 1, (4, 4), (2, 2), (1, 1)),
        )

    def forward(self, z_q: Tensor) -> Tensor:
        # Under autocast too: bfloat16 has steps of up to 0.004, and SSIM in the black background falls by 8 % at 0.003.
        with torch.autocast(z_q.device.type, enabled=False):
            return self.layers(z_q)


class _StraightThrough(torch.autograd.Function):
    """The last two terms of eq. 3, and z_q, from latents z_e and their embeddings e (B, D, H, W).

    loss = mse(sg[z_e], e) + β · mse(z_e, sg[e]) has one value for both terms, (1 + β) · mse(z_e, e). Gradients are
    written out because that takes half the passes over memory that autograd's would: 2 (e - z_e) / n for e, and for
    z_e β times its opposite, plus z_q's own gradient unchanged.
    """

    @staticmethod
    def forward(ctx, z_e: Tensor, e: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z_e, e)
        ctx.beta = beta
        return (1 + beta) * F.mse_loss(e, z_e), e

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient: Tensor, z_q_gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        z_e, e = ctx.saved_tensors
        difference = e - z_e
        factor = loss_gradient * (2 / difference.numel())
        return torch.addcmul(z_q_gradient, difference, -ctx.beta * factor), difference * factor, None


class VectorQuantizer(nn.Module):
    """Replaces each latent vector by the nearest vector of a learned codebook (arXiv 1711.00937, eq. 1 and 2).

    The embeddings start uniform in ±1/n_embeddings. With that start alone nearly all of them stay unused, so training
    moves them (`codebook.KMeans`); nothing here does so by itself.

    Args:
        n_embeddings: size of the codebook.
        embeddings_dim: length D of an embedding.
        beta: weight of the commitment term, β of eq. 3.
    """

    def __init__(self, n_embeddings: int = 512, embeddings_dim: int = 64, beta: float = 0.25):
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(n_embeddings, embeddings_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embeddings, 1 / n_embeddings)

    def forward(self, z_e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize z_e (B, D, H, W), always in float32.

        Returns:
            vq_loss: scalar, mse(sg[z_e], e) + β · mse(z_e, sg[e]): the last two terms of eq. 3.
            z_q: (B, D, H, W), the embeddings chosen; its gradient passes to z_e unchanged (straight through).
            codes: (B, H, W) int64 in [0, n_embeddings).
        """
        with torch.autocast(z_e.device.type, enabled=False):
            z_e = z_e.float()
            codes = self.nearest(z_e)
            vq_loss, z_q = _StraightThrough.apply(z_e, self.look_up(codes), self.beta)
        return vq_loss, z_q, codes

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Codes (B, H, W) int64 of the embeddings nearest in Euclidean distance to z (B, D, H, W) (eq. 1).

        Computed in float32, under autocast too.
        """
        codebook = self.embedding.weight.float()
        half_norms = codebook.square().sum(1) / -2

        def likeness(part: Tensor) -> Tensor:
            # |z - e|² is least where z·e - |e|²/2 is greatest: one matrix product, and |z|² is never needed. On a CPU
            # a 1x1 convolution computes it 1.5 times as fast; on a GPU it would not be float32, but TF32.
            if part.device.type == "cpu":
                return F.conv2d(part, codebook[:, :, None, None], half_norms)
            return torch.addmm(half_norms, rows(part), codebook.T).view(len(part), *part.shape[2:], -1).movedim(-1, 1)

        with torch.autocast(z.device.type, enabled=False):
            parts = z.float().contiguous(memory_format=torch.channels_last)
            parts = parts.split(IMAGES_AT_ONCE.get(z.device.type, 4))
            return torch.cat([likeness(part).argmax(1) for part in parts])

    def look_up(self, codes: Tensor) -> Tensor:
        """Embeddings (B, D, H, W) of codes (B, H, W)."""
        return self.embedding(codes).permute(0, 3, 1, 2)


def rows(z: Tensor) -> Tensor:
    """Latents (B, D, H, W) as float32 vectors (B·H·W, D), in the order of codes (B, H, W)."""
    return z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])


class VQVAE(nn.Module):
    """Vector-quantized autoencoder of (B, 1, 256, 256) images in [0, 1] with (B, 64, 64) codes.

    Args:
        n_embeddings, embeddings_dim, beta: see `VectorQuantizer`.
        n_hiddens: channels of the encoder's and decoder's hidden layers.
        n_residual_hidden_layers: channels inside a residual block.

    Example:
        >>> vqvae = VQVAE()
        >>> codes = vqvae.encode(torch.rand(2, 1, 256, 256))  # (2, 64, 64) int64 in [0, 512)
        >>> images = vqvae.decode(codes)                      # (2, 1, 256, 256)
    """

    def __init__(
        self,
        n_embeddings: int = 512,
        embeddings_dim: int = 64,
        beta: float = 0.25,
        n_hiddens: int = 64,
        n_residual_hidden_layers: int = 32,
    ):
        super().__init__()
        self.encoder = Encoder(n_hiddens, n_residual_hidden_layers)
        self.conv1 = nn.Conv2d(n_hiddens, embeddings_dim, (1, 1), (1, 1))
        self.vector_quantizer = VectorQuantizer(n_embeddings, embeddings_dim, beta)
        self.decoder = Decoder(embeddings_dim, n_hiddens, n_residual_hidden_layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, 1, 256, 256) in [0, 1] -> (vq_loss, x_hat, z_q, codes), as `VectorQuantizer` and `Decoder` say."""
        vq_loss, z_q, codes = self.vector_quantizer(self.latents(x))
        return vq_loss, self.decoder(z_q), z_q, codes

    def latents(self, x: Tensor) -> Tensor:
        """z_e (B, D, 64, 64): the encoder's output before quantization."""
        return self.conv1(self.encoder(x))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, 64, 64) int64 of images x (B, 1, 256, 256) in [0, 1]."""
        return self.vector_quantizer.nearest(self.latents(x))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, 1, 256, 256), not clamped, of integer codes (B, 64, 64): what forward gives as x_hat.

        Raises:
            ValueError: codes have another shape, or are not indices of embeddings.
        """
        n = self.vector_quantizer.embedding.num_embeddings
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(f"codes must be integers (B, 64, 64), not {codes.dtype} {tuple(codes.shape)}")
        codes = codes.long()  # NumPy's uint16 has few operations
        if codes.numel() and not 0 <= codes.min() <= codes.max() < n:
            raise ValueError(f"codes must be from 0 to {n - 1}, not from {codes.min()} to {codes.max()}")
        return self.decoder(self.vector_quantizer.look_up(codes))

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "VQVAE":
        """The network, in eval mode, whose sizes and weights a `state_dict` holds.

        Raises:
            ValueError: `state` is not one of this network, or holds values that are not finite.
        """
        codebook = state.get("vector_quantizer.embedding.weight") if isinstance(state, dict) else None
        shape = getattr(codebook, "shape", ())
        if len(shape) != 2 or not all(1 <= size <= 65536 for size in shape):
            raise ValueError("it holds no VQ-VAE (no codebook 'vector_quantizer.embedding.weight')")
        model = cls(n_embeddings=shape[0], embeddings_dim=shape[1])
        load_checked(model, state)
        return model.eval()


class _Sum(torch.autograd.Function):
    """Sum over all processes. What each of them makes of it adds to the gradient, so backward is a sum as well."""

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's own, printed as in the report: versions from 2.15 on would add "bias=True".

    Where several processes train, its statistics in training are over all their batches together (torch.nn's
    SyncBatchNorm does so too, but cannot be differentiated twice, as a gradient penalty needs).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        dims = (0, 2, 3)
        n = _Sum.apply(x.new_full((), x.numel() / x.shape[1]))
        mean = _Sum.apply(x.sum(dims)) / n
        centred = x - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dims)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        gain = self.weight * (variance + self.eps).rsqrt()
        return centred * gain[:, None, None] + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )


def _block(convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, BatchNorm2d(convolution.out_channels), nn.LeakyReLU(0.2, inplace=True))


class Generator(nn.Module):
    """DCGAN generator: noise (B, noise_dim, 1, 1) -> latents (B, embeddings_dim, 64, 64) in [-1, 1].

    `prior.LatentScale` maps its range to and from the VQ-VAE's latents.
    """

    def __init__(self, noise_dim: int = 128, embeddings_dim: int = 64):
        super().__init__()

        def up(n_in: int, n_out: int) -> nn.Module:
            return nn.ConvTranspose2d(n_in, n_out, (4, 4), (2, 2), (1, 1), bias=False)

        self.net = nn.Sequential(
            _block(nn.ConvTranspose2d(noise_dim, 512, (4, 4), (1, 1), bias=False)),  # 4 x 4
            _block(up(512, 256)),  # 8 x 8
            _block(up(256, 128)),  # 16 x 16
            _block(up(128, 64)),  # 32 x 32
            up(64, embeddings_dim),  # 64 x 64
            nn.Tanh(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        return self.net(noise)


class Discriminator(nn.Module):
    """DCGAN discriminator: latents (B, embeddings_dim, 64, 64) in [-1, 1] -> probability (B, 1) that they are real."""

    def __init__(self, embeddings_dim: int = 64):
        super().__init__()

        def down(n_in: int, n_out: int) -> nn.Module:
            return nn.Conv2d(n_in, n_out, (4, 4), (2, 2), (1, 1), bias=False)

        self.net = nn.Sequential(
            _block(down(embeddings_dim, 32)),  # 32 x 32
            _block(down(32, 64)),  # 16 x 16
            _block(down(64, 128)),  # 8 x 8
            _block(down(128, 256)),  # 4 x 4
            nn.Conv2d(256, 1, (4, 4), (1, 1), bias=False),
            nn.Flatten(),
            nn.Sigmoid(),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.net(latents)

    def logits(self, latents: Tensor) -> Tensor:
        """What the Sigmoid is applied to, (B, 1): the loss computed from it stays finite where D is certain."""
        return self.net[:-1](latents)


def dcgan_init(module: nn.Module) -> None:
    """The start of arXiv 1511.06434, section 4, for `apply`: weights from N(0, 0.02²), BatchNorm's gains around 1."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict as it is written to files: on the CPU, in standard layout."""
    return {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}


def load_checked(model: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` that says in one line what does not fit.

    Raises:
        ValueError: a key is missing or unknown, a shape differs, or a value is not finite.
    """
    name, wanted = type(model).__name__, model.state_dict()
    if not isinstance(state, dict):
        raise ValueError(f"it does not hold the weights of a {name}")
    for key in sorted(wanted.keys() | state.keys(), key=str):
        if key not in state:
            raise ValueError(f"it does not hold the weights of this {name} ('{key}' is missing)")
        if key not in wanted:
            raise ValueError(f"it holds more than the weights of this {name} ('{str(key)[:99]}')")
        if not isinstance(state[key], Tensor) or state[key].shape != wanted[key].shape:
            raise ValueError(f"its '{key}' is not of the shape {tuple(wanted[key].shape)} that this {name} has")
        if state[key].is_floating_point() != wanted[key].is_floating_point():
            raise ValueError(f"its '{key}' is of the kind {state[key].dtype}, not {wanted[key].dtype}")
        if not state[key].to(wanted[key].dtype).isfinite().all():  # a float64 may be too large for float32
            raise ValueError(f"its '{key}' holds values that are not finite")
    model.load_state_dict(state)
