"""Power spectra and covariances of coefficients in rings of equal frequency, and linear maps that match them."""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_FACTOR = 2.0  # by which calibration changes an amplitude


def power_spectrum(c: Tensor) -> Tensor:
    """Mean power of coefficients c (B, K, H, W) by radial frequency, at each frequency of rfft2: (K, H, W // 2 + 1).

    The diagonals of `covariance_spectrum`; their logarithms are averaged over three rings.
    """
    mean = covariance_spectrum(c).diagonal(dim1=1, dim2=2).T.clamp(min=1e-12).log()
    smooth = F.avg_pool1d(F.pad(mean[None], (1, 1), mode="replicate"), 3, 1)[0].exp()
    return smooth[:, _rings(c)[:, : c.shape[-1] // 2 + 1]].contiguous()


def covariance_spectrum(c: Tensor) -> Tensor:
    """Covariance about 0 of the coefficients c (B, K, H, W) at each radial frequency: (R, K, K) for R rings.

    No mean is subtracted. Rings are one cycle per image wide, the constant part belongs to the first.
    """
    ring = _rings(c).flatten()
    total = c.new_zeros(int(ring.max()) + 1, c.shape[1], c.shape[1])
    for part in c.split(32):
        f = torch.view_as_real(torch.fft.fft2(part, norm="ortho").flatten(2))
        total.index_add_(0, ring, torch.einsum("bkpc,blpc->pkl", f, f))
    return total / (len(c) * torch.bincount(ring))[:, None, None]


def multiply_spectrum(c: Tensor, matrices: Tensor) -> Tensor:
    """Multiply the Fourier transform of c (B, K, H, W) at each frequency by its ring's matrix, from (R, K, K)."""
    gain = matrices[_rings(c)[:, : c.shape[-1] // 2 + 1]]
    f = torch.einsum("hwkl,blhwc->bkhwc", gain, torch.view_as_real(torch.fft.rfft2(c)))
    return torch.fft.irfft2(torch.view_as_complex(f.contiguous()), s=c.shape[-2:])


def _rings(c: Tensor) -> Tensor:
    """The ring of each frequency of the Fourier transform of c (B, K, H, H), from 0: (H, H)."""
    size = c.shape[-1]
    frequency = torch.fft.fftfreq(size, device=c.device)
    return (torch.hypot(frequency[:, None], frequency) * size).round().long().clamp(min=1) - 1


def transport(generated: Tensor, real: Tensor) -> Tensor:
    """The symmetric matrices T (R, K, K) with T A T = B, for covariances A and B (R, K, K) about 0.

    Of all linear maps from A to B they change values least, in mean square (Peyré and Cuturi 2019, arXiv 1803.00567,
    remark 2.31). Their eigenvalues are clamped to [1 / LARGEST_FACTOR, LARGEST_FACTOR], so T A T = B may not hold.
    """
    least = 1e-9 * torch.eye(generated.shape[-1], dtype=torch.double)  # what is 0 on both sides is kept
    a, b = (each.cpu().double() + least for each in (generated, real))  # MPS has no float64
    root = _matrix_power(a, 0.5)
    inverse = _matrix_power(a, -0.5)
    values, vectors = torch.linalg.eigh(inverse @ _matrix_power(root @ b @ root, 0.5) @ inverse)
    values = values.clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return (vectors * values[:, None] @ vectors.mT).float().to(generated.device)


def _matrix_power(a: Tensor, exponent: float) -> Tensor:
    """Powers of symmetric matrices (R, K, K) with positive eigenvalues."""
    values, vectors = torch.linalg.eigh(a)
    return vectors * values.clamp(min=1e-30).pow(exponent)[:, None] @ vectors.mT  # rounding may make them negative
