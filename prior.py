"""What lies between the VQ-VAE and the DCGAN: latents to tanh's range and back, snapping to codes, sampling.

The generator ends in tanh, so its range is [-1, 1]; latents have a range of their own. `LatentScale` is the fixed map
between the two, fitted on the training split and kept in generator.pth.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import hardware
from modules import VQVAE, Generator, load_checked, plain_state

# Foreground latents deviate from the background's embedding by this many times their root mean square before they are
# clipped: about 1 % of their values are. Less clips more; more squeezes the anatomy towards the background's zero.
RANGE_IN_RMS = 2.5


class LatentScale(NamedTuple):
    """Latents z <-> tanh's range: t = clip((z - shift) / scale, -1, 1), per channel.

    Attributes:
        shift: (D,), the embedding of the most frequent code, that is the background's: it maps to 0.
        scale: (D,), RANGE_IN_RMS times the root mean square by which all other positions deviate from it.
    """

    shift: Tensor
    scale: Tensor

    def to_tanh(self, z: Tensor) -> Tensor:
        """Latents (B, D, H, W) -> (B, D, H, W) in [-1, 1]."""
        return ((z - self.shift[:, None, None]) / self.scale[:, None, None]).clamp(-1, 1)

    def from_tanh(self, t: Tensor) -> Tensor:
        """(B, D, H, W) in [-1, 1] -> latents (B, D, H, W)."""
        return t * self.scale[:, None, None] + self.shift[:, None, None]


class Latents(Dataset):
    """A split's encoder outputs z_e, mapped to tanh's range: what the DCGAN learns to draw.

    Encoded once and kept in half precision (512 kB an image) where that fits in half of the free memory, on the device
    or else beside it; else each batch is encoded when it is asked for.

    Args:
        vqvae: the trained network, on the device of the data set's batches.
        dataset: an `OasisDataset`.
        progress: called as tqdm is.
        stored: whether the latents are kept; decided by the free memory if None.

    Attributes:
        scale: the `LatentScale` fitted on this split.
        stored: whether the latents are kept.
    """

    def __init__(self, vqvae: VQVAE, dataset: Dataset, progress=tqdm, stored: bool | None = None):
        self.vqvae, self.dataset = vqvae.eval().to(memory_format=torch.channels_last), dataset
        weight = vqvae.vector_quantizer.embedding.weight.detach()
        n, dim = weight.shape
        size = (len(dataset), 64, 64, dim)
        n_bytes = 2 * math.prod(size)
        device, host = weight.device, torch.device("cpu")
        self.stored = hardware.fits(n_bytes, device) or hardware.fits(n_bytes, host) if stored is None else stored
        keep_on = device if hardware.fits(n_bytes, device) else host
        self.kept = torch.empty(size if self.stored else 0, dtype=torch.half, device=keep_on)
        # Sums by code, so that one pass serves: which code is the background's is known only at its end.
        where = host if device.type == "mps" else device  # which has no float64
        count = torch.zeros(n, 1, dtype=torch.double, device=where)
        first, second = torch.zeros(2, n, dim, dtype=torch.double, device=where)
        with progress(total=len(dataset), desc="Encoding", unit=" images") as bar:
            for start in range(0, len(dataset), 32):
                z_e = self._encode(range(start, min(start + 32, len(dataset))))
                rows = z_e.permute(0, 2, 3, 1)
                if self.stored:
                    self.kept[start : start + len(rows)] = rows.half()
                codes = vqvae.vector_quantizer.nearest(z_e).flatten().to(where)
                rows = rows.reshape(-1, dim).to(where).double()
                count[:, 0] += torch.bincount(codes, minlength=n)
                first.index_add_(0, codes, rows)
                second.index_add_(0, codes, rows**2)
                bar.update(len(z_e))
        background = int(count[:, 0].argmax())
        shift = weight[background].to(where).double()
        others = torch.arange(n, device=where) != background
        squares = (second - 2 * shift * first + shift**2 * count)[others].sum(0)
        rms = (squares / count[others].sum(0).clamp(min=1)).clamp(min=1e-12).sqrt()
        self.scale = LatentScale(shift.float().to(device), (RANGE_IN_RMS * rms).float().to(device))

    @torch.no_grad()
    def _encode(self, indices) -> Tensor:
        return self.vqvae.latents(self.dataset.__getitems__(indices))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Tensor:
        """(B, D, 64, 64) float32 in [-1, 1]."""
        if self.stored:
            kept = self.kept[torch.as_tensor(indices).to(self.kept.device, non_blocking=True)]
            z_e = kept.to(self.scale.shift.device, non_blocking=True).permute(0, 3, 1, 2).float()
        else:
            z_e = self._encode(indices).half().float()
        return self.scale.to_tanh(z_e)


class Prior:
    """A generator and what turns its output into brains: the scale of latents and the VQ-VAE they belong to.

    Args:
        generator, scale, vqvae: on one device.
        phantoms: whether it was trained on phantoms, which figures of its samples have to say.
    """

    def __init__(self, generator: Generator, scale: LatentScale, vqvae: VQVAE, phantoms: bool = False):
        self.generator, self.scale, self.vqvae, self.phantoms = generator, scale, vqvae, phantoms

    @property
    def noise_dim(self) -> int:
        return self.generator.net[0][0].in_channels

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Noise (B, noise_dim, 1, 1) -> codes (B, 64, 64): generated latents snapped to the nearest embeddings."""
        latents = self.scale.from_tanh(self.generator.eval()(noise))
        return self.vqvae.vector_quantizer.nearest(latents)

    def sample_images(self, noise: Tensor, at_once: int = 32, progress=tqdm) -> Tensor:
        """Noise (B, noise_dim, 1, 1) -> brains (B, 1, 256, 256) in [0, 1]."""
        images = []
        with progress(total=len(noise), desc="Decoding", unit=" images", leave=False) as bar:
            for part in noise.split(at_once):
                images.append(self.vqvae.decode(self.sample(part)).clamp(0, 1))
                bar.update(len(part))
        return torch.cat(images)

    def checkpoint(self) -> dict:
        """The contents of generator.pth."""
        return {
            "state_dict": plain_state(self.generator),
            "shift": self.scale.shift.cpu(),
            "scale": self.scale.scale.cpu(),
            "codebook": codebook_hash(self.vqvae),
            "phantoms": self.phantoms,
        }

    @classmethod
    def from_checkpoint(cls, contents: dict, vqvae: VQVAE) -> "Prior":
        """What `checkpoint` gave, for the VQ-VAE that it belongs to and on that one's device.

        Raises:
            ValueError: the contents are no generator's, or belong to another codebook.
        """
        if not isinstance(contents, dict) or not {"state_dict", "shift", "scale", "codebook"} <= contents.keys():
            raise ValueError("it holds no generator (name the generator.pth of a run)")
        if contents["codebook"] != codebook_hash(vqvae):
            raise ValueError("it belongs to another codebook; use the vqvae.pth that it was trained with")
        weight = vqvae.vector_quantizer.embedding.weight
        generator = Generator(embeddings_dim=weight.shape[1])
        load_checked(generator, contents["state_dict"])
        for name in ("shift", "scale"):
            value = contents[name]
            if not isinstance(value, Tensor) or value.shape != weight.shape[1:] or not value.is_floating_point():
                raise ValueError(f"its '{name}' is not {weight.shape[1]} numbers")
            if not value.float().isfinite().all() or (name == "scale" and not (value.float() > 0).all()):
                raise ValueError(f"its '{name}' has values that are not finite, or a scale that is not above 0")
        scale = LatentScale(*(contents[name].float().to(weight.device) for name in ("shift", "scale")))
        return cls(generator.to(weight.device).eval(), scale, vqvae, bool(contents.get("phantoms", False)))


def codebook_hash(vqvae: VQVAE) -> str:
    """SHA-256 of the codebook's float32 values."""
    values = vqvae.vector_quantizer.embedding.weight.detach().cpu().float().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
