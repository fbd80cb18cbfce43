"""The networks: a VQ-VAE that turns a 256x256 slice into 64x64 codes and back, and what priors of these codes learn.

Sources: van den Oord et al. 2017, "Neural Discrete Representation Learning", arXiv 1711.00937 (VQ-VAE);
Radford et al. 2015, "Unsupervised Representation Learning with Deep Convolutional GANs", arXiv 1511.06434 (DCGAN).
B is the batch size throughout.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Images whose distances to 512 embeddings are held at once, 8 MB each: about a CPU's cache; one large kernel on a GPU.
IMAGES_AT_ONCE = {"cpu": 4, "cuda": 64}

HIDDEN, RESIDUAL_HIDDEN = 64, 32  # channels of the VQ-VAE's hidden layers, and within its residual blocks

# Constants of the prior over codes.
STRIDES = (8, 4, 2, 1)  # of its grids; each contains the coarser ones
WINDOW = 2  # rows above a code, and columns on either side, whose codes the perceptron takes
CODE_FEATURES, PLACE_FEATURES = 16, 64  # channels that embed a code, and the position of a slice in the head
FEATURES_SHARE = 0.1  # initial weights of logits: this factor times the codes' features
IGNORED = -100  # target of positions outside the grid, for cross_entropy's ignore_index
N_PLANES = 32  # of the report's set, 1 mm apart
NOISE = 128  # channels of the DCGAN's noise
MOST_DISTANCE = 16  # between a slice and a neighbour: half the planes


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))) at constant resolution: (B, C, H, W) -> (B, C, H, W).

    C is HIDDEN; between the convolutions there are RESIDUAL_HIDDEN channels.
    """

    def __init__(self):
        super().__init__()
        self._residual_block = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(HIDDEN, RESIDUAL_HIDDEN, (3, 3), (1, 1), (1, 1), bias=False),
            nn.ReLU(),
            nn.Conv2d(RESIDUAL_HIDDEN, HIDDEN, (1, 1), (1, 1), bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self._residual_block(x)


class Encoder(nn.Module):
    """Image (B, 1, H, W) in [0, 1] -> features (B, HIDDEN, H/4, W/4)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, HIDDEN // 2, (4, 4), (2, 2), (1, 1)),
            nn.ReLU(inplace=True),
            nn.Conv2d(HIDDEN // 2, HIDDEN, (4, 4), (2, 2), (1, 1)),
            ResidualBlock(),
            ResidualBlock(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Decoder(nn.Module):
    """Latents (B, embeddings_dim, h, w) -> image (B, 1, 4h, 4w), not clamped to [0, 1]."""

    def __init__(self, embeddings_dim: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(embeddings_dim, HIDDEN, (3, 3), (1, 1), (1, 1)),
            ResidualBlock(),
            ResidualBlock(),
            nn.ConvTranspose2d(HIDDEN, HIDDEN // 2, (4, 4), (2, 2), (1, 1)),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(HIDDEN // 2, 1, (4, 4), (2, 2), (1, 1)),
        )

    def forward(self, z_q: Tensor) -> Tensor:
        hidden = self.layers[:-1](z_q)
        # In float32 under autocast too: bfloat16 has steps of up to 0.004 in grey values, and where black is off by
        # 0.003, SSIM in the background falls by 8 %.
        with torch.autocast(z_q.device.type, enabled=False):
            return self.layers[-1](hidden.to(self.layers[-1].weight.dtype))


class VectorQuantizer(nn.Module):
    """Replace each latent vector by the nearest vector of a learned codebook (arXiv 1711.00937, eq. 1 and 2).

    With the mean squared error of the reconstruction, its loss is eq. 3, in means over numbers instead of norms.

    The embeddings start uniform in ±1/n_embeddings. Most would then never be used: `training.codebook` moves them.

    `n_embeddings` is the size of the codebook, `embeddings_dim` the length D of an embedding, `beta` the weight β of
    the commitment term (eq. 3).
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
            z_q: (B, D, H, W), the chosen embeddings up to rounding; its gradient is passed to z_e unchanged.
            codes: (B, H, W) int64 in [0, n_embeddings).
        """
        with torch.autocast(z_e.device.type, enabled=False):
            z_e = z_e.float()
            codes = self.nearest(z_e)
            e = self.look_up(codes)
            vq_loss = F.mse_loss(e, z_e.detach()) + self.beta * F.mse_loss(z_e, e.detach())
            z_q = z_e + (e - z_e).detach()  # straight through: the gradient of z_q is that of z_e
        return vq_loss, z_q, codes

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Codes (B, H, W) int64 of the embeddings nearest to z (B, D, H, W) (eq. 1); in float32, under autocast too."""
        codebook = self.embedding.weight.float()
        half_norms = codebook.square().sum(1) / -2

        def best(part: Tensor) -> Tensor:
            # |z - e|² is smallest where z·e - |e|²/2 is largest: one matrix product. On a CPU a 1x1 convolution
            # computes it 1.5 times as fast, and NumPy's argmax, which has one thread, is faster than two of PyTorch's;
            # on a GPU a convolution would use TF32.
            if part.device.type == "cpu":
                similarity = F.conv2d(part, codebook[:, :, None, None], half_norms).permute(0, 2, 3, 1)
                few = torch.get_num_threads() <= 2
                return torch.from_numpy(similarity.numpy().argmax(-1)) if few else similarity.argmax(-1)
            similarity = torch.addmm(half_norms, rows(part), codebook.T)
            return similarity.argmax(1).view(len(part), *part.shape[2:])

        with torch.autocast(z.device.type, enabled=False):
            parts = z.float().contiguous(memory_format=torch.channels_last)
            at_once = IMAGES_AT_ONCE.get(z.device.type, 4) * 512 // max(512, len(codebook))
            parts = parts.split(max(1, at_once))
            return torch.cat([best(part) for part in parts])

    def look_up(self, codes: Tensor) -> Tensor:
        """Embeddings (B, D, H, W) of codes (B, H, W)."""
        return self.embedding(codes).permute(0, 3, 1, 2)


def rows(z: Tensor) -> Tensor:
    """Latents (B, D, H, W) as float32 vectors (B·H·W, D), in the order of codes (B, H, W)."""
    return z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])


class VQVAE(nn.Module):
    """Vector-quantized autoencoder of (B, 1, 256, 256) images in [0, 1] with (B, 64, 64) codes.

    The arguments are those of `VectorQuantizer`.

    Example:
        >>> vqvae = VQVAE()
        >>> codes = vqvae.encode(torch.rand(2, 1, 256, 256))  # (2, 64, 64) int64 in [0, 512)
        >>> images = vqvae.decode(codes)                      # (2, 1, 256, 256)
    """

    def __init__(self, n_embeddings: int = 512, embeddings_dim: int = 64, beta: float = 0.25):
        super().__init__()
        self.encoder = Encoder()
        self.conv1 = nn.Conv2d(HIDDEN, embeddings_dim, (1, 1), (1, 1))
        self.vector_quantizer = VectorQuantizer(n_embeddings, embeddings_dim, beta)
        self.decoder = Decoder(embeddings_dim)

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

        Raises ValueError if codes have another shape, or are not indices of embeddings.
        """
        n = self.vector_quantizer.embedding.num_embeddings
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(f"codes must be integers (B, 64, 64), not {codes.dtype} {tuple(codes.shape)}")
        codes = codes.long()  # uint16, as exported, supports few operations
        low, high = torch.stack([codes.min(), codes.max()]).tolist() if codes.numel() else (0, 0)  # one wait for a GPU
        if low < 0 or high >= n:
            raise ValueError(f"codes must be from 0 to {n - 1}, not from {low} to {high}")
        return self.decoder(self.vector_quantizer.look_up(codes))


class BatchNorm2d(nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, printed as in the report: torch 2.15 and later would add "bias=True"."""

    def extra_repr(self) -> str:
        return super().extra_repr().replace(", bias=True", "")


_down = partial(nn.Conv2d, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1), bias=False)  # half the resolution
_up = partial(nn.ConvTranspose2d, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1), bias=False)  # twice the resolution


def _block(convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, BatchNorm2d(convolution.out_channels), nn.LeakyReLU(0.2, inplace=True))


class Generator(nn.Module):
    """DCGAN generator: noise (B, NOISE, 1, 1) -> (B, embeddings_dim, 64, 64) in [-1, 1].

    A `priors.latent_space.LatentSpace` maps its output to latents.
    """

    def __init__(self, embeddings_dim: int = 64):
        super().__init__()
        self.net = nn.Sequential(
            _block(nn.ConvTranspose2d(NOISE, 512, (4, 4), (1, 1), bias=False)),  # 4 x 4
            _block(_up(512, 256)),  # 8 x 8
            _block(_up(256, 128)),  # 16 x 16
            _block(_up(128, 64)),  # 32 x 32
            _up(64, embeddings_dim),  # 64 x 64
            nn.Tanh(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        return self.net(noise)


class Discriminator(nn.Module):
    """DCGAN discriminator: generated or real (B, embeddings_dim, 64, 64) -> probability (B, 1) of being real."""

    def __init__(self, embeddings_dim: int = 64):
        super().__init__()
        self.net = nn.Sequential(
            _block(_down(embeddings_dim, 32)),  # 32 x 32
            _block(_down(32, 64)),  # 16 x 16
            _block(_down(64, 128)),  # 8 x 8
            _block(_down(128, 256)),  # 4 x 4
            nn.Conv2d(256, 1, (4, 4), (1, 1), bias=False),
            nn.Flatten(),
            nn.Sigmoid(),
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.net(t)

    def logits(self, x: Tensor, mix: Tensor) -> Tensor:
        """The input of the Sigmoid, (B, 1). A loss computed from it is finite even where the Sigmoid rounds to 0 or 1.

        The network sees mix @ x at each position, of coefficients x (B, K, 64, 64) and mix (embeddings_dim, K).
        """
        conv = self.net[0][0]  # with fewer channels it computes the same in less time
        x = F.conv2d(x, torch.einsum("ocij,ck->okij", conv.weight, mix), None, conv.stride, conv.padding)
        return self.net[1:-1](self.net[0][1:](x))


def dcgan_init(module: nn.Module) -> None:
    """Initialise as in arXiv 1511.06434, section 4, for `apply`: weights N(0, 0.02²), BatchNorm's gains N(1, 0.02²)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class Condition(NamedTuple):
    """What the prior over codes is conditioned on: where slices lie in the head, and neighbouring slices.

    Attributes:
        plane: (B,) int64, the number of the slice from 0, or N_PLANES where it is not known.
        neighbours: (B, 2, H, W) int64, the codes of a slice below and of one above; ignored where `distance` is 0.
        distance: (B, 2) int64, how many planes away these are, at most MOST_DISTANCE; 0 for no neighbour.
    """

    plane: Tensor
    neighbours: Tensor
    distance: Tensor


class DilatedBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), the first kernel dilated: (B, C, H, W) -> (B, C, H, W). Begins as x."""

    def __init__(self, n: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv2d(n, n, (3, 3), (1, 1), dilation, dilation)
        self.conv2 = nn.Conv2d(n, n, (1, 1))
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)  # a block begins as one that adds nothing

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class GridNetwork(nn.Module):
    """Predicts the codes of a grid, one after the other in raster order, given the grid of twice the stride.

    A cell is 2x2 codes. Its upper left code is known from the coarser grid, except in the first grid, which has none. A
    convolutional network computes features of each cell from all that is known beforehand. At each code, a perceptron
    takes these features and the codes just before it: WINDOW rows above, and WINDOW columns on either side.

    Args:
        n_codes, size: number of codes, and the rows and columns of the grid.
        width, dilations: channels and blocks of the convolutional network.
        hidden: units of the perceptron.
        first: whether no grid comes before.
    """

    def __init__(
        self,
        n_codes: int,
        size: tuple[int, int],
        width: int,
        dilations: tuple[int, ...],
        hidden: int,
        first: bool,
    ):
        super().__init__()
        self.predicted = (0, 1, 2, 3) if first else (1, 2, 3)  # positions in a cell, 0 1 above 2 3
        n_known = 2 * 4 * CODE_FEATURES + (0 if first else CODE_FEATURES)
        self.enter = nn.Conv2d(n_known, width, (1, 1))
        self.place = nn.Linear(PLACE_FEATURES, width)
        self.position = nn.Parameter(torch.zeros(width, *(-(-length // 2) for length in size)))
        self.blocks = nn.Sequential(*(DilatedBlock(width, dilation) for dilation in dilations))
        self.context = nn.Conv2d(width, len(self.predicted) * hidden, (1, 1))
        window = CODE_FEATURES, WINDOW + 1, 2 * WINDOW + 1
        self.before = nn.ParameterList(torch.empty(hidden, *window) for _ in self.predicted)
        for weight in self.before:
            nn.init.kaiming_uniform_(weight, math.sqrt(5))  # as nn.Conv2d does
        causal = torch.ones(window[1:])
        causal[-1, WINDOW:] = 0
        self.register_buffer("causal", causal, persistent=False)
        self.hidden, self.last = nn.Linear(hidden, hidden), nn.Linear(hidden, n_codes)

    def contexts(self, coarse: Tensor | None, near: Tensor, place: Tensor) -> Tensor:
        """What is known beforehand, at each code that is predicted: (B, h, w, places, hidden), for h x w cells.

        `coarse` (B, CODE_FEATURES, h, w) are the codes of the coarser grid, `near` (B, 2 CODE_FEATURES, H, W) those of
        neighbouring slices, `place` is (B, PLACE_FEATURES).
        """
        near = F.pixel_unshuffle(_whole_cells(near), 2)
        known = near if coarse is None else torch.cat([coarse, near], 1)
        x = self.enter(known.contiguous(memory_format=torch.channels_last))
        x = x + self.position + self.place(place)[:, :, None, None]
        x = self.context(F.relu(self.blocks(x)))
        return x.permute(0, 2, 3, 1).unflatten(3, (len(self.predicted), -1))

    def logits(self, before: Tensor, context: Tensor) -> Tensor:
        """(…, hidden), from the codes just before and from what is known beforehand -> (…, n_codes)."""
        x = F.relu(before + context)
        return self.last(x + F.relu(self.hidden(x)))

    def forward(self, codes: Tensor, maps: Tensor, near: Tensor, place: Tensor) -> Tensor:
        """-log2 p of codes (B, H, W) with features `maps` (B, CODE_FEATURES, H, W): (B, H, W), 0 if in a coarser grid.

        The other arguments are those of `contexts`.
        """
        first, (height, width) = 0 in self.predicted, codes.shape[1:]
        context = self.contexts(None if first else maps[:, :, ::2, ::2], near, place)
        h, w = context.shape[1:3]
        maps = F.pad(_whole_cells(maps), (WINDOW, WINDOW, WINDOW, 0)).contiguous(memory_format=torch.channels_last)
        before = []
        for weight, position_in_cell in zip(self.before, self.predicted, strict=True):
            row, column = divmod(position_in_cell, 2)
            rows = slice(row, row + 2 * h + WINDOW - 1)
            columns = slice(column, column + 2 * w + 2 * WINDOW - 1)
            before.append(F.conv2d(maps[:, :, rows, columns], weight * self.causal, stride=2).permute(0, 2, 3, 1))
        logits = self.logits(torch.stack(before, 3), context)
        cells = F.pixel_unshuffle(_whole_cells(codes[:, None], IGNORED), 2)[:, self.predicted].permute(0, 2, 3, 1)
        nats = F.cross_entropy(logits.flatten(0, 3).float(), cells.flatten(), ignore_index=IGNORED, reduction="none")
        bits = torch.zeros(len(codes), 4, h, w, device=codes.device)
        bits[:, self.predicted] = nats.view(cells.shape).permute(0, 3, 1, 2) / math.log(2)
        return F.pixel_shuffle(bits, 2)[:, 0, :height, :width]

    def sample(self, noise: Tensor, coarse: Tensor | None, near: Tensor, place: Tensor, code: nn.Embedding) -> Tensor:
        """Codes (B, H, W), each drawn with noise (B, H, W) at its place, given those of the coarser grid (B, h, w)."""
        (n, height, width), first = noise.shape, coarse is None
        context = self.contexts(None if first else code(coarse).permute(0, 3, 1, 2), near, place)
        context = context.permute(1, 2, 3, 0, 4).contiguous()
        before = [(weight * self.causal).permute(0, 2, 3, 1).flatten(1).T.contiguous() for weight in self.before]
        codes = torch.zeros(noise.shape, dtype=torch.long, device=noise.device)
        maps = torch.zeros(n, height + WINDOW, width + 2 * WINDOW, CODE_FEATURES, device=noise.device)
        if not first:
            codes[:, ::2, ::2] = coarse
            maps[:, WINDOW::2, WINDOW : WINDOW + width : 2] = code(coarse)
        for row in range(height):
            for column in range(width):
                position_in_cell = 2 * (row % 2) + column % 2
                if position_in_cell in self.predicted:
                    index = self.predicted.index(position_in_cell)
                    window = maps[:, row : row + WINDOW + 1, column : column + 2 * WINDOW + 1].flatten(1)
                    logits = self.logits(window @ before[index], context[row // 2, column // 2, index])
                    codes_here = _draw(logits, noise[:, row, column])
                    codes[:, row, column] = codes_here
                    maps[:, row + WINDOW, column + WINDOW] = code(codes_here)
        return codes


class Autoregressive(nn.Module):
    """A distribution over codes (B, H, W), from coarse to fine (arXiv 1711.00937, section 3.3; arXiv 1703.03664).

    The codes at every eighth row and column come first; then the stride is halved three times. In each grid codes come
    one after the other. The probability of an image is the product over its codes.

    Args:
        codebook: (n_codes, D). Features of codes begin as its principal components: without, it takes long to learn
            which codes are alike.
        size: (H, W).
        width, dilations, hidden: of each `GridNetwork`.
    """

    def __init__(self, codebook: Tensor, size: tuple[int, int], width: int, dilations: tuple[int, ...], hidden: int):
        super().__init__()
        self.n_codes = len(codebook)
        self.size = size
        self.settings = {"width": width, "dilations": dilations, "hidden": hidden}
        self.plane = nn.Embedding(N_PLANES + 1, PLACE_FEATURES)
        self.below, self.above = (nn.Embedding(MOST_DISTANCE + 1, PLACE_FEATURES) for _ in range(2))
        self.code, self.neighbour = (nn.Embedding(self.n_codes, CODE_FEATURES) for _ in range(2))
        self.grids = nn.ModuleList()
        for stride in STRIDES:
            grid = tuple(-(-length // stride) for length in size)
            self.grids.append(GridNetwork(self.n_codes, grid, **self.settings, first=stride == STRIDES[0]))
        features = principal_components(codebook)
        with torch.no_grad():
            for embedding in (self.code, self.neighbour):
                embedding.weight.copy_(features)
            for grid in self.grids:
                grid.last.weight[:, :CODE_FEATURES] = FEATURES_SHARE * features[:, :hidden]

    def forward(self, codes: Tensor, condition: Condition) -> Tensor:
        """The information in each of codes (B, H, W) int64: -log2 p, (B, H, W) in bits. The sum is an image's."""
        place, near = self._condition(condition)
        maps = self.code(codes).permute(0, 3, 1, 2)
        bits = torch.zeros(codes.shape, device=codes.device)
        for stride, grid in zip(STRIDES, self.grids, strict=True):
            every = slice(None, None, stride)
            of_grid = grid(codes[:, every, every], maps[:, :, every, every], _pooled(near, stride), place)
            bits[:, every, every] += of_grid
        return bits

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Condition) -> Tensor:
        """Noise (B, H, W), uniform in [0, 1), -> codes (B, H, W) int64, each drawn with the noise at its place."""
        place, near = self._condition(condition)
        codes = None
        for stride, grid in zip(STRIDES, self.grids, strict=True):
            codes = grid.sample(noise[:, ::stride, ::stride], codes, _pooled(near, stride), place, self.code)
        return codes

    def _condition(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """The place (B, PLACE_FEATURES), and the codes of both neighbours (B, 2 CODE_FEATURES, H, W), 0 for none."""
        below, above = condition.distance.T
        place = F.relu(self.plane(condition.plane) + self.below(below) + self.above(above))
        near = self.neighbour(condition.neighbours) * (condition.distance > 0)[:, :, None, None, None]
        return place, near.permute(0, 1, 4, 2, 3).flatten(1, 2)


def principal_components(codebook: Tensor) -> Tensor:
    """Features (n_codes, CODE_FEATURES) of embeddings (n_codes, D): principal components, 0 where there are fewer.

    Each is divided by the root of its standard deviation: a few directions have nearly all of the variance.
    """
    x = (codebook - codebook.mean(0)).cpu().double()
    components = x @ torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, :CODE_FEATURES]
    components = components / components.std(0, correction=0).sqrt().clamp(min=1e-6)
    features = components / components.std(correction=0).clamp(min=1e-6)
    return F.pad(features, (0, CODE_FEATURES - features.shape[1])).float()


def _whole_cells(grid: Tensor, value: int = 0) -> Tensor:
    """(B, C, H, W) with a further row and column where these are odd."""
    return F.pad(grid, (0, grid.shape[3] % 2, 0, grid.shape[2] % 2), value=value)


def _pooled(near: Tensor, stride: int) -> Tensor:
    """The means of squares of `stride` positions, cut at the border: (B, C, H, W) -> (B, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
    return F.avg_pool2d(near, stride, ceil_mode=True)


def _draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Codes (B,) with probabilities softmax(logits), logits (B, n_codes): where their sums pass noise (B,)."""
    sums = logits.to(torch.float if logits.device.type == "mps" else torch.double).softmax(1).cumsum(1)
    return (sums <= noise[:, None]).sum(1).clamp(max=logits.shape[1] - 1)
