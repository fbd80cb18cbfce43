"""Random changes of what the discriminator sees, so that it does not learn the training split by heart.

Real and generated coefficients are changed alike, in the updates of both networks (arXiv 2006.10738). Some images stay
as they are, so that a generator does not gain by imitating the changes (arXiv 2006.06676, section 3).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MOVED = 0.8  # share of images that are turned, zoomed and shifted
ANGLE, ZOOM, SHIFT = 5.0, 0.05, 0.03  # at most: degrees, change of size, share of the image's width
CUT = 0.8  # share of images that lose a square
SQUARE = 0.375  # its side, as a share of the image's width
NUMBERS = 8  # random numbers that an image needs


def changed(c: Tensor, numbers: Tensor) -> Tensor:
    """Turn, zoom and shift images, and cut squares out of them.

    Args:
        c: coefficients (B, K, 64, 64).
        numbers: (B, NUMBERS) in [0, 1), which decide what happens to each image.
    """
    moved, cut = numbers[:, 0] < MOVED, numbers[:, 1] < CUT
    angle, zoom, x, y = ((2 * numbers[:, 2:6] - 1) * moved[:, None]).unbind(1)
    turn = torch.polar((ZOOM * zoom).exp(), math.radians(ANGLE) * angle)
    rows = turn.real, -turn.imag, 2 * SHIFT * x, turn.imag, turn.real, 2 * SHIFT * y  # in half widths, as x and y are
    with torch.autocast(c.device.type, enabled=False):  # it multiplies matrices, and positions need their precision
        grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3).to(c.dtype), list(c.shape), align_corners=False)
    c = F.grid_sample(c, grid, "bicubic", align_corners=False)
    at = torch.arange(c.shape[-1], device=c.device) + 0.5
    inside = (at - numbers[:, 6:, None] * c.shape[-1]).abs() < SQUARE / 2 * c.shape[-1]
    square = inside[:, 0, :, None] & inside[:, 1, None, :] & cut[:, None, None]
    return c.masked_fill(square[:, None], 0).contiguous(memory_format=torch.channels_last)
