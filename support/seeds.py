"""Seeds for every stream of random numbers, so that a resumed run needs no generator's state."""

import numpy as np
import torch

# Each stream has random numbers of its own, so that the length of one stage never changes the numbers of another.
# A stream's seed depends on its position: append new ones.
STREAMS = (
    "vqvae weights",
    "vqvae",
    "dcgan weights",
    "dcgan",
    "dcgan samples",
    "samples",
    "measures",
    "measured images",
)
STREAMS += ("walks", "calibration", "independent codes", "resampling", "dcgan start", "judging")
STREAMS += ("flow", "flow weights", "flow validation")
STREAMS += ("autoregressive", "autoregressive weights", "autoregressive validation")


def derived_seed(seed: int, stream: str, epoch: int = 0) -> int:
    """A seed for one stream and epoch of a run."""
    words = np.random.SeedSequence([seed, STREAMS.index(stream), epoch]).generate_state(2)
    return int(words[0]) << 31 ^ int(words[1])


def generator(seed: int, stream: str, epoch: int = 0) -> torch.Generator:
    """A random generator on the CPU, whatever the device: every device draws the same numbers."""
    return torch.Generator().manual_seed(derived_seed(seed, stream, epoch))
