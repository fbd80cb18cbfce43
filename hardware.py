"""What the machine offers: the memory that is free, and what makes training fast there."""

import contextlib
import ctypes
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

# Compiling takes about half a minute. On a CPU it saves nothing once freed memory is kept (benchmarks/speed.py).
COMPILING_REPAYS = 1000  # updates on a GPU


def fits(n_bytes: int, device: torch.device) -> bool:
    """Whether so many bytes are at most half of the memory that is free on the device."""
    return n_bytes <= free_memory(device) / 2


def free_memory(device: torch.device) -> int:
    """Bytes of memory that this process can still have on a device; where the system does not say, 8 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")]
        free.append(int(line.split()[1]) * 1024)
        (line,) = [line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
        group = Path("/sys/fs/cgroup") / line.removeprefix("0::").lstrip("/")
        for folder in (group, *group.parents):  # a container's or a cluster's job may be limited at each level
            with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
                limit, used = ((folder / f"memory.{name}").read_text() for name in ("max", "current"))
                free.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun's, on one machine
    return min(free, default=8 * 2**30) // max(int(processes) if processes.isdecimal() else 1, 1)


class FastPath(NamedTuple):
    """How the networks are trained: chosen once for a run, kept when it is resumed on the same kind of device.

    Attributes:
        device: the kind of device that it was chosen for.
        plain: nothing of all this: standard layout, float32 without TF32, eager, each library as it comes.
        bfloat16: the encoder's convolutions run under autocast. What follows does not: where the black background's
            grey level is off by 0.003, SSIM falls by 8 %, and bfloat16 is that coarse.
        compiled: encoder and decoder are compiled.
    """

    device: str
    plain: bool = False
    bfloat16: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        if self.plain:
            return "standard layout, float32, not compiled (--plain)"
        precision = "encoder in bfloat16" if self.bfloat16 else "float32" + " (TF32)" * (self.device == "cuda")
        return f"channels_last, {precision}, {'compiled' if self.compiled else 'not compiled'}"

    @property
    def layout(self) -> torch.memory_format:
        return torch.contiguous_format if self.plain else torch.channels_last

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)

    def adam(self, network: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Adam:
        fused = not self.plain and self.device in ("cpu", "cuda")
        return torch.optim.Adam(network.parameters(), lr=lr, betas=betas, fused=fused)

    def compile(self, vqvae: nn.Module) -> None:
        """Compile encoder and decoder if that was chosen: in place, so that structure and keys of the weights stay."""
        if self.compiled:
            vqvae.encoder.compile()
            vqvae.decoder.compile()

    def restore(self, optimizer: torch.optim.Adam, saved: dict) -> None:
        """Load an optimizer's state_dict; whether it is fused is this path's, not that of the run that saved it."""
        for group in saved["param_groups"]:
            group["fused"] = optimizer.defaults["fused"]
        optimizer.load_state_dict(saved)

    def set_up(self) -> None:
        """Set what holds for the whole process."""
        torch.backends.cudnn.allow_tf32 = not self.plain  # of convolutions; the quantizer's distances stay float32
        torch.backends.cudnn.benchmark = not self.plain
        if not self.plain:
            keep_freed_memory()


def choose_fast_path(device: torch.device, precision: str, plain: bool, n_updates: int) -> FastPath:
    """The fast path for a device and a run of so many updates; precision "auto" is bfloat16 on GPUs that have it."""
    cuda = device.type == "cuda"
    if precision == "auto":
        precision = "bfloat16" if cuda and torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    if plain:
        return FastPath(device.type, plain=True)
    compiled = cuda and n_updates >= COMPILING_REPAYS and can_compile(device)
    return FastPath(device.type, bfloat16=precision == "bfloat16", compiled=compiled)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, found out by trying: it needs a C++ compiler, on a GPU Triton too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(nn.ReLU())(torch.zeros(8, device=device))
        return True
    except Exception:  # each part that can be missing has an error of its own
        return False


def keep_freed_memory() -> None:
    """Let the C library keep what training frees for the next update, instead of asking the system for it each time.

    A training step allocates and frees some hundred tensors of 30 MB. glibc returns such sizes to the system at once,
    which then fills each new page with zeros: a third of a step's time. (See mallopt(3); other C libraries lack it.)
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
        mallopt(m_top_pad, 256 * 2**20)
