"""Choice of the device, its free memory, exact float32, and settings that make training fast."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from support import distributed
from support.console import UserError, one_line


def choose_device(name: str) -> torch.device:
    """The named device. "auto" is CUDA if available, else MPS, else the CPU. Each of several processes has its own GPU.

    Raises UserError if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # set by torchrun
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError
        torch.zeros(1, device=device)
    except Exception:  # torch reports a missing device in many ways
        raise UserError(f"--device {one_line(name)}: no such device here; try --device cpu") from None
    return device


def fits(n_bytes: int, device: torch.device) -> bool:
    """Whether so many bytes are at most half of the free memory of the device."""
    return n_bytes <= free_memory(device) / 2


def free_memory(device: torch.device) -> int:
    """Bytes of memory that this process can still have on a device; 8 GiB where the system does not say."""
    if device.type == "cuda":  # what PyTorch's allocator has cached is free, too
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    free = []
    try:
        (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")]
        free.append(int(line.split()[1]) * 1024)
        (line,) = [line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
        group = Path("/sys/fs/cgroup") / line.removeprefix("0::").lstrip("/")
        for folder in (group, *group.parents):  # a container's or a cluster's job may be limited at each level
            with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
                limit, used, stat = ((folder / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
                cache = dict(line.split() for line in stat.splitlines())["inactive_file"]  # given back when needed
                free.append(int(limit) - int(used) + int(cache))
    except (OSError, ValueError):
        pass
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")  # set by torchrun, for one machine
    return min(free, default=8 * 2**30) // max(int(processes) if processes.isdecimal() else 1, 1)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on a device, not waited for on CUDA. On MPS that may read freed memory (pytorch issue 189690)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Exact float32 (no TF32) and deterministic cuDNN algorithms, so that scores are reproducible.

    Also a decorator, as in `@exact_float32()`.
    """
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = False, False, False, True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A single thread on the CPU, for thousands of small steps: more would wait for one another. Also a decorator."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


class FastPath(NamedTuple):
    """What makes training fast: chosen once for a run and kept when it is resumed on the same type of device.

    Attributes:
        device: the type of device that it was chosen for.
        plain: --plain: standard layout, float32 without TF32, the C library's default allocation.
        bfloat16: the networks run under autocast, except the quantizer and the decoder's last layer.
    """

    device: str
    plain: bool = False
    bfloat16: bool = False

    def __str__(self) -> str:
        if self.plain:
            return "standard layout, float32 (--plain)"
        float32 = "float32 (TF32)" if self.device == "cuda" else "float32"
        precision = "bfloat16 but for quantizer and last layer" if self.bfloat16 else float32
        layout = "channels_last" if self.layout == torch.channels_last else "standard layout"
        return f"{layout}, {precision}"

    @property
    def layout(self) -> torch.memory_format:
        # on MPS, BatchNorm's backward fails in channels_last before mid-2026 (pytorch PR 188371)
        return torch.contiguous_format if self.plain or self.device == "mps" else torch.channels_last

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)

    def adam(self, network: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Adam:
        fused = None if self.plain else True  # None leaves the choice to PyTorch, False would rule out foreach as well
        return torch.optim.Adam(network.parameters(), lr=lr, betas=betas, fused=fused)

    def load_adam(self, optimizer: torch.optim.Adam, saved: dict) -> None:
        """Load the moments of an optimizer's `state_dict`; rates, and whether it is fused, stay as they are here."""
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})

    def set_up(self) -> None:
        """Make the settings that hold for the whole process."""
        torch.backends.cudnn.allow_tf32 = not self.plain  # for convolutions
        torch.backends.cuda.matmul.allow_tf32 = False  # the quantizer's distances, whatever the environment says
        torch.backends.cudnn.benchmark = not self.plain
        if not self.plain:
            keep_freed_memory()


def choose_fast_path(device: torch.device, precision: str, plain: bool) -> FastPath:
    """The fast path for a device, the same in all processes.

    "auto" is bfloat16 on GPUs from Ampere on (older ones emulate it slowly), on CPUs with AMX, and on AMD's with
    AVX512_BF16 (on others it is slower than float32).
    """
    if plain:
        return FastPath(device.type, plain=True)
    auto = precision == "auto" and distributed.from_first(lambda: has_fast_bfloat16(device))
    return FastPath(device.type, bfloat16=auto or precision == "bfloat16")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device is faster in bfloat16 than in float32. Nothing is timed, so the answer is always the same."""
    if device.type == "cpu":
        # PyTorch multiplies matrices by oneDNN, which this variable keeps from using newer instructions
        allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
        has = cpu_capabilities()
        if torch.cpu._is_amx_tile_supported():
            sufficient = ("AMX",)
        elif has.get("avx512_bf16") and has["cpu_name"].startswith("AMD"):  # Intel's was slower than float32
            sufficient = ("BF16", "FP16", "AMX")
        else:
            return False
        return allowed in ("", "ALL", "DEFAULT") or any(name in allowed for name in sufficient)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_capabilities() -> dict:
    """What PyTorch knows of the processor: `cpu_name`, and flags of its instructions; {} before PyTorch 2.10."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step instead of returning it to the system.

    A training step allocates and frees about a hundred tensors of 30 MB. glibc returns blocks of that size at once, and
    the system then fills each new page with zeros: a third of a step's time. (See mallopt(3), which is glibc's own.)
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
        mallopt(m_top_pad, 256 * 2**20)
