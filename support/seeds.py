"""Seeds for every stream of random numbers, so that a resumed run needs no generator's state."""

import numpy as np
import torch

# Each stream has random numbers of its own, so that the length of one stage never changes the numbers of another. A
# stream's seed depends on its number, so numbers are never used again.
STREAMS = {
    "vqvae weights": 0,
    "vqvae": 1,
    "dcgan weights": 2,
    "dcgan": 3,
    "samples by epoch": 4,
    "samples": 5,
    "measures": 6,
    "measured images": 7,
    "walks": 8,
    "calibration": 9,
    "independent codes": 10,
    "resampling": 11,
    "dcgan start": 12,
    "validation order": 13,
    "autoregressive": 17,
    "autoregressive weights": 18,
    "autoregressive validation": 19,
}


def derived_seed(seed: int, stream: str, epoch: int = 0) -> int:
    """A seed for one stream and epoch of a run."""
    state = np.random.SeedSequence([seed, STREAMS[stream], epoch]).generate_state(2)
    return int(state[0]) << 31 ^ int(state[1])


def generator(seed: int, stream: str, epoch: int = 0) -> torch.Generator:
    """A random generator on the CPU, whatever the device: every device draws the same numbers."""
    return torch.Generator().manual_seed(derived_seed(seed, stream, epoch))
