"""A GPU where there is none: tensors that say they are on "cuda" or "mps", and compute on the CPU.

    with pretended("cuda") as waits:
        x = torch.zeros(3, device="cuda")  # x.device is cuda:0
        x.sum().item()                     # waits is now ["aten._local_scalar_dense.default"]

Inside, the code under test runs as it is. These mistakes are errors, as they are on a GPU:

- tensors of two devices in one operation, where PyTorch does not move them itself;
- a random generator of the CPU for numbers on the GPU;
- float64 on MPS, and copies to MPS with `non_blocking=True`, which may read freed memory (pytorch issue 189690);
- `.numpy()` of a tensor on the GPU.

`waits` lists the operations at which the host would wait for the GPU: results that go to the host, shapes that depend
on values, blocking copies to CUDA. (Copies to MPS always wait.)

It cannot show what the numbers of a GPU are (TF32, bfloat16), memory, or NCCL.

How: `_There` is a wrapper subclass ("Extending PyTorch" in PyTorch's manual). Below autograd, each operation comes to
`_compute`, which runs it on the values. For autograd's C++ code the tensors are on the device "lazy", which has no
driver to ask and no thread of its own. `_Names` puts "lazy" for the GPU's name in all arguments, and back in what is
returned.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
LAZY = torch.device("lazy", 0)
BY_INDEX = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
WAITING = {aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.bincount, aten.equal}
WAITING |= {aten._unique2, aten.unique_dim, aten.repeat_interleave}
MEMORY = 2**33  # bytes, all of them free


class _Gpu:
    """The GPU of the context that is entered."""

    name = ""
    waits: list[str] = []


class _There(Tensor):
    """Says that it is on the GPU. `values` is the tensor on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, values: Tensor) -> "_There":
        place = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        self = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=LAZY, **place)
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict) -> "_There":
        new = _There(self.values.clone()).requires_grad_(self.requires_grad)
        new._is_param = getattr(self, "_is_param", False)
        return memo.setdefault(id(self), new)

    def __reduce_ex__(self, protocol):
        return self.values.__reduce_ex__(protocol)


def _compute(func, args: tuple, kwargs: dict):
    """Run an operation on the values. Its result is on the GPU if `device` says so, or else if an input is there."""
    leaves = tree_leaves((args, kwargs))
    there = [leaf for leaf in leaves if isinstance(leaf, _There)]
    here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, _There)]
    device = kwargs.get("device")
    on_gpu = bool(there) if device is None else torch.device(device).type == LAZY.type
    if func is aten.copy_.default:
        on_gpu = isinstance(args[0], _There)
    _refuse_mistakes(func, args, kwargs, there, here, on_gpu)
    if _waits(func, args, kwargs, there, here, on_gpu):
        _Gpu.waits.append(str(func))
    cpu_args, cpu_kwargs = tree_map(lambda leaf: leaf.values if isinstance(leaf, _There) else leaf, (args, kwargs))
    if device is not None:
        cpu_kwargs["device"] = "cpu"
    known = {id(tensor.values): tensor for tensor in there}  # what works in place returns its input

    def wrap(result):
        if not on_gpu or not isinstance(result, Tensor):
            return result
        if _Gpu.name == "mps" and result.dtype == torch.float64:
            raise TypeError(f"{func}: MPS has no float64")
        return known.get(id(result)) if id(result) in known else _There(result)

    return tree_map(wrap, func(*cpu_args, **cpu_kwargs))


def _refuse_mistakes(func, args: tuple, kwargs: dict, there: list, here: list, on_gpu: bool) -> None:
    copies = func in (aten.copy_.default, aten._to_copy.default)
    indexed = func in BY_INDEX and isinstance(args[0], _There) and not any(t.dim() for t in here if t is args[-1])
    changed = args[:1] if func._schema.is_mutable else ()  # a number of the CPU may be read, but not be written to
    strange = [tensor for tensor in here if tensor.dim() or any(tensor is each for each in changed)]
    if there and strange and not copies and not indexed:
        raise RuntimeError(f"{func}: tensors on the GPU and on the CPU")
    if on_gpu and any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))):
        raise RuntimeError(f"{func}: a random generator of the CPU for the GPU")
    to_gpu = copies and on_gpu and here
    if _Gpu.name == "mps" and to_gpu and (kwargs.get("non_blocking") or True in args[2:]):
        raise RuntimeError(f"{func}: non_blocking to MPS")


def _waits(func, args: tuple, kwargs: dict, there: list, here: list, on_gpu: bool) -> bool:
    if func in (aten.copy_.default, aten._to_copy.default) and here and on_gpu:
        blocking = not (kwargs.get("non_blocking") or True in args[2:])
        return blocking and _Gpu.name == "cuda"
    if not there:
        return False
    if func in BY_INDEX:
        indices = [index for index in args[1] if index is not None]
        filled = func is not aten.index.Tensor and args[2].dim() == 0  # is done as masked_fill
        by_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        return any(index.dim() and not isinstance(index, _There) for index in indices) or by_mask and not filled
    return func.overloadpacket in WAITING or not on_gpu


class _Names(TorchFunctionMode):
    """The GPU's name in, "lazy" through, the GPU's name out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))

        def to_lazy(value):
            is_name = isinstance(value, (str, torch.device)) and str(value).split(":")[0] == _Gpu.name
            return LAZY if is_name else value

        args = tuple(map(to_lazy, args))
        kwargs = {key: to_lazy(value) for key, value in (kwargs or {}).items()}
        if func is Tensor.tolist and isinstance(args[0], _There):
            return args[0].cpu().tolist()
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == LAZY:
            return func(*args, **kwargs | {"device": "cpu"}).to(LAZY)
        result = func(*args, **kwargs)
        return torch.device(_Gpu.name, 0) if isinstance(result, torch.device) and result == LAZY else result


class _Operations(TorchDispatchMode):
    """Operations without an input that is there, such as `torch.zeros`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


@contextlib.contextmanager
def pretended(name: str) -> Iterator[list[str]]:
    """Pretend that there is a GPU, "cuda" or "mps". Yields the list of what waited for it."""
    asked = {
        "torch.cuda": {
            "mem_get_info": lambda device=None: (MEMORY, MEMORY),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "get_device_capability": lambda device=None: (7, 5),  # without bfloat16, whose numbers cannot be shown
            "get_device_name": lambda device=None: "pretended GPU",
            "device_count": lambda: 1,
        },
        "torch.mps": {"recommended_max_memory": lambda: MEMORY, "current_allocated_memory": lambda: 0},
    }
    _Gpu.name, _Gpu.waits = name, []
    # Module.to assigns to `.data` otherwise, which does not reach `values`.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        for module, answers in asked.items():
            stack.enter_context(mock.patch.multiple(module, **answers))
        stack.enter_context(_Operations())
        stack.enter_context(_Names())
        yield _Gpu.waits
