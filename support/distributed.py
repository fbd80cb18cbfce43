"""Several processes, as torchrun starts them: rank, shares of a batch, sums over processes.

A batch is divided among the processes, so that N processes make the same step as one, up to rounding. (A batch with
fewer images than processes is the exception in the DCGAN: BatchNorm then sees an image twice.) Only rank 0 writes and
prints. With one process, every function here returns its input or does nothing.
"""

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

GRACE = 5  # seconds before another rank reports an error: rank 0 usually has the same one and says it first


def start() -> None:
    """Join the processes that torchrun started, if any. Only rank 0 prints from then on, except for errors."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ.get(name, "") for name in names}
    if not all(value.isdecimal() or name == "MASTER_ADDR" and value for name, value in values.items()):
        sys.exit(f"error: WORLD_SIZE is set, but not all of {', '.join(names[1:])}; start with torchrun, or unset it")
    local_rank = int(values["LOCAL_RANK"])
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    where = f"{values['MASTER_ADDR']}:{values['MASTER_PORT']}"
    line = f"Waiting for all {values['WORLD_SIZE']} processes (WORLD_SIZE) to meet at {where} (MASTER_ADDR) …"
    waiting = threading.Timer(GRACE, print, (line,), {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    waiting.start()
    # while processes wait for one another, Python's own handlers do not run
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # rank 0 alone makes the generator's start, which takes hours on a slow CPU
    dist.init_process_group(backend, timeout=timedelta(days=1))
    waiting.cancel()
    for number, handler in handlers.items():
        if handler is not None:  # None where it was not installed from Python
            signal.signal(number, handler)
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = _print_after_grace


def _print_after_grace(*error) -> None:
    # If rank 0 has failed as well, torchrun ends this process while it sleeps, and the error is printed once.
    time.sleep(GRACE)
    traceback.print_exception(*error, file=sys.__stderr__)


def stop() -> None:
    """Leave the group when all processes have finished."""
    if world_size() > 1:
        dist.barrier()
        gc.collect()  # frees references to the group: gloo's threads must end before Python does (pytorch issue 190489)
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    return rank() == 0


def share(n: int, of: int | None = None) -> slice:
    """The slice of n items that belongs to this process, or to rank `of`. Slices differ in length by at most one."""
    r = rank() if of is None else of
    return slice(n * r // world_size(), n * (r + 1) // world_size())


def part(batch):
    """This process's share of a batch (a list or a tensor); its first element where there are too few for all."""
    mine = batch[share(len(batch))]
    return mine if len(mine) else batch[:1]


def weight(n: int) -> float:
    """This process's share of a batch of n images as a fraction: the weight of its mean in the mean of the batch."""
    part = share(n)
    return (part.stop - part.start) / n


def from_first(make: Callable[[], Any]) -> Any:
    """Call `make` on rank 0 only and return its result on every rank."""
    made = [make() if is_first() else None]
    if world_size() > 1:
        dist.broadcast_object_list(made)
    return made[0]


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def is_lost(error: Exception) -> bool:
    """Whether an error means that another process has ended."""
    text = str(error).lower()
    return world_size() > 1 and ("closed by peer" in text or "connection reset" in text)


def gather(part: Tensor, n: int) -> Tensor:
    """A batch (n, …) from the parts that `share` gave to each process."""
    if world_size() == 1:
        return part
    parts = []
    for r in range(world_size()):
        cut = share(n, r)
        if cut.stop > cut.start:
            parts.append(part.contiguous() if r == rank() else part.new_empty(cut.stop - cut.start, *part.shape[1:]))
            dist.broadcast(parts[-1], r)
    return torch.cat(parts)


def copy_first(tensor: Tensor) -> None:
    """Overwrite a tensor with that of rank 0."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


def sum_gradients(network: nn.Module) -> None:
    """Add up a network's gradients over all processes, in one message."""
    if world_size() > 1:
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        flat = total(torch.cat([g.flatten() for g in gradients]))
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def synchronize_batch_norm(network: nn.Module) -> nn.Module:
    """Replace each BatchNorm2d so that its training statistics are over the batches of all processes together.

    torch.nn.SyncBatchNorm does the same but cannot be differentiated twice, which a gradient penalty needs. Parameters
    and buffers are shared with the layers that are replaced, so the keys of the `state_dict` stay.
    """
    if world_size() > 1:
        for name, child in network.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(network, name, _SynchronizedBatchNorm2d(child))
            else:
                synchronize_batch_norm(child)
    return network


class _SynchronizedBatchNorm2d(nn.BatchNorm2d):
    def __init__(self, layer: nn.BatchNorm2d):
        super().__init__(layer.num_features, layer.eps, layer.momentum)
        self._parameters, self._buffers = layer._parameters, layer._buffers

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = (0, 2, 3)
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))  # sums and counts of a batch need its digits
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums = _Sum.apply(torch.cat([x.sum(dims), count]))  # one message
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = x - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dims)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        gain = self.weight * (variance + self.eps).rsqrt()
        return (centred * gain[:, None, None] + self.bias[:, None, None]).to(dtype)


class _Sum(torch.autograd.Function):
    """Sum over all processes. Each of them adds to the gradient, so backward is a sum as well."""

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)
