"""The flow: noise -> coefficients."""

import math
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import UNet
from priors.prior import Prior
from support import console

STEPS, FINER = 20, 1.5  # of the flow's solver (docs/results.md)
STEP_COUNT = console.Number(int, 1, "a whole number from 1 to 1000", below=1001)  # far above, times coincide
GUIDE_WIDTHS, GUIDANCE = (24, 32, 40, 40), 0.5  # of the U-Net that guides it


class FlowPrior(Prior):
    """The flow from noise (4K, 32, 32) to coefficients, 2x2 positions as channels, times `factor`.

    It solves dx/dt = v(x, t) from t = 0 to 1 (arXiv 2210.02747, eq. 1) in `steps` steps: the first is Heun's, the
    others are those of the two-step Adams-Bashforth method, which reuses the slope of the step before (Hairer, Nørsett
    and Wanner 1993, section III.5). They get finer towards the end: t = 1 - (1 - s)^FINER, in equal steps of s.

    A smaller network of the same training, the guide, is expected to make the same faults, but greater ones. So samples
    lead away from it: they follow v + guidance (v - v_guide) (autoguidance, arXiv 2406.02507, section 4).
    """

    kind, guidance = "flow", GUIDANCE

    def __init__(self, network: UNet, guide: UNet, factor: float, *words, steps: int = STEPS, **settings):
        super().__init__(network, *words, **settings)
        self.guide, self.factor, self.steps, self.autocast = guide, factor, steps, nullcontext

    @property
    def networks(self) -> dict[str, nn.Module]:
        return super().networks | {"guide": self.guide}

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        h, w = self.space.support.shape
        return 4 * self.space.rank, h // 2, w // 2

    def packed(self, c: Tensor) -> Tensor:
        """Coefficients (B, K, 64, 64) -> what the network learns, (B, 4K, 32, 32)."""
        return F.pixel_unshuffle(c * self.factor, 2).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def coefficients(self, noise: Tensor) -> Tensor:
        for network in self.networks.values():
            network.eval()
        x = noise.contiguous(memory_format=torch.channels_last)
        times = (1 - (1 - torch.linspace(0, 1, self.steps + 1)) ** FINER).tolist()
        before = None  # the time and the slope of the step before
        for t, later in pairwise(times):
            step, slope = later - t, self.velocity(x, t)
            if before:
                rate = (slope - before[1]) / (t - before[0])
            else:
                rate = (self.velocity(x + step * slope, later) - slope) / step
            x = x + step * (slope + step / 2 * rate)
            before = t, slope
            console.stop_if_signalled()
        return F.pixel_shuffle(x, 2) / self.factor * self.space.support

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """That of samples x at one time, guided: (B, 4K, 32, 32) float32."""
        words = x, x.new_full((len(x),), t)
        with self.autocast():
            v = self.network(*words).float()
            return v + self.guidance * (v - self.guide(*words).float())

    def checkpoint(self) -> dict:
        contents = super().checkpoint() | {"factor": self.factor}
        weights = {key: {name: value.half() for name, value in contents[key].items()} for key in self.networks}
        return contents | weights | {"shift": contents["shift"].half()}

    @classmethod
    def untrained(cls, contents: dict, *words) -> "FlowPrior":
        space, factor = words[0], contents["factor"]
        if "guide" not in contents:
            raise ValueError("it is a flow without a guide, of an earlier version; train it anew")
        if not isinstance(factor, float) or not 0 < factor < math.inf:
            raise ValueError("its 'factor' is not a positive number")
        channels = 4 * space.rank
        return cls(UNet(channels), UNet(channels, GUIDE_WIDTHS), factor, *words)
