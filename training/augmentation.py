"""Augmentation for the flow: moved images, and where their positions were, which the network is told."""

import torch
import torch.nn.functional as F
from torch import Tensor

MOVED, MIRRORED = 0.5, 0.5  # shares of images
ANGLE, ZOOM, SHIFT = 8.0, 0.08, 0.06  # at most: degrees, change of size, share of half the image's width


def drawn_moves(n: int, rng: torch.Generator) -> Tensor:
    """Random moves of n images (n, 2, 3): affine maps from a position of the moved image to that in the image.

    Positions are (column, row, 1) as in `torch.nn.functional.affine_grid`: -1 and 1 are the borders of an image. Half
    of the images are turned, zoomed and shifted, half mirrored left to right, a quarter neither.
    """
    numbers = 2 * torch.rand(n, 4, generator=rng) - 1
    numbers *= torch.rand(n, 1, generator=rng) < MOVED
    moves = affine(ANGLE * numbers[:, 0], ZOOM * numbers[:, 1], SHIFT * numbers[:, 2:])
    moves[torch.rand(n, generator=rng) < MIRRORED, 0] *= -1
    return moves


def affine(angle: Tensor, zoom: Tensor, shift: Tensor) -> Tensor:
    """The maps (n, 2, 3) that turn by degrees (n,), zoom by e to the power of `zoom` (n,), and then shift by (n, 2)."""
    turn = torch.polar(zoom.exp(), torch.deg2rad(angle))
    column, row = torch.stack([turn.real, -turn.imag], 1), torch.stack([turn.imag, turn.real], 1)
    return torch.cat([torch.stack([column, row], 1), shift[:, :, None]], 2)


def moved(x: Tensor, moves: Tensor) -> Tensor:
    """Images (B, 1, H, W) in [0, 1], moved: the same shape and range."""
    device = "cpu" if x.device.type == "mps" else x.device  # bicubic sampling came late to MPS
    grid = F.affine_grid(moves.to(device), list(x.shape), align_corners=False)
    return F.grid_sample(x.to(device), grid, "bicubic", align_corners=False).clamp(0, 1).to(x.device)


def positions(moves: Tensor, size: int) -> Tensor:
    """Where each position of moved images lies in the images: column and row (B, 2, size, size).

    From -1, the centre of the first position of an image that is not moved, to 1, the centre of the last.
    """
    shift = moves[:, :, 2:] * size / (size - 1)  # in `moves`, -1 and 1 are the borders
    grid = F.affine_grid(torch.cat([moves[:, :, :2], shift], 2), [len(moves), 1, size, size], align_corners=True)
    return grid.permute(0, 3, 1, 2)
