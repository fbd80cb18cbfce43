"""Several processes, as torchrun starts them: who this one is, its share of the work, and what they add up.

A batch is shared out, so that N processes make the update that one would make, to rounding. (A batch with fewer images
than processes is the exception in the DCGAN: its BatchNorm sees an image twice.) The first process alone writes files
and prints. Where there is one process, which is the rule, every function here leaves things as they are.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def start() -> None:
    """Join the processes that torchrun started, if it did; all but the first fall silent, errors apart."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name, "").isdecimal() or name == "MASTER_ADDR" for name in names):
        sys.exit(f"error: WORLD_SIZE is set, but not all of {', '.join(names[1:])}; start with torchrun, or unset it")
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = _say_later


def _say_later(*error) -> None:
    # If the first process has failed too, torchrun ends this one while it sleeps, and the error is said once.
    time.sleep(5)
    traceback.print_exception(*error, file=sys.__stderr__)


def stop() -> None:
    """Part from the other processes, when all have done their work."""
    if world() > 1:
        dist.barrier()
        dist.destroy_process_group()


def run(main: Callable[[], None], name: str, errors: tuple[type[Exception], ...]) -> None:
    """Run a program's `main`. What its user can mend ends it with one line and exit status 1, never with a traceback.

    Args:
        name: the program's, for the line.
        errors: exceptions whose message is that line.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the shell
            stream.reconfigure(errors="backslashreplace")  # names of files may hold what is no character
    try:
        main()
    except errors as error:
        _fail(f"{name}: error: {error}")
    except OSError as error:  # a full disk, a folder that may not be written
        _fail(f"{name}: error: {error.filename or 'output'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        _fail(f"{name}: error: out of memory; try a smaller batch, codebook or number of samples")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    if not is_first():  # where all processes have the same error, the first alone says it
        time.sleep(5)  # as in _say_later
    print(message, file=sys.__stderr__)
    sys.exit(1)


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    return rank() == 0


def share(n: int, of: int | None = None) -> slice:
    """The part of n things that is this process's, or that of process `of`; sizes differ by one at most."""
    r = rank() if of is None else of
    return slice(n * r // world(), n * (r + 1) // world())


def part(batch):
    """This process's share of a batch, a list or a tensor; its first element again where there are too few for all."""
    mine = batch[share(len(batch))]
    return mine if len(mine) else batch[:1]


def weight(n: int) -> float:
    """This process's share of a batch of n images, as a fraction: what its mean counts in the mean of all."""
    part = share(n)
    return (part.stop - part.start) / n


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns in the first process, the only one that calls it, in all processes."""
    made = [make() if is_first() else None]
    if world() > 1:
        dist.broadcast_object_list(made)
    return made[0]


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather(part: Tensor, n: int) -> Tensor:
    """A batch (n, …) from its parts in all processes, as `share` cut it."""
    if world() == 1:
        return part
    parts = []
    for r in range(world()):
        cut = share(n, r)
        if cut.stop > cut.start:
            parts.append(part.contiguous() if r == rank() else part.new_empty(cut.stop - cut.start, *part.shape[1:]))
            dist.broadcast(parts[-1], r)
    return torch.cat(parts)


def copy_first(tensor: Tensor) -> None:
    """Overwrite a tensor with the first process's."""
    if world() > 1:
        dist.broadcast(tensor, 0)


def distributed(network: nn.Module) -> nn.Module:
    """`network`, with gradients that backward averages over all processes; its weights stay where they are."""
    return DistributedDataParallel(network) if world() > 1 else network


def sum_gradients(network: nn.Module) -> None:
    """Add up a network's gradients over all processes, in one message."""
    if world() > 1:
        gradients = [p.grad for p in network.parameters()]
        flat = total(torch.cat([g.flatten() for g in gradients]))
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
