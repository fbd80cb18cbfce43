"""Files that are written completely or not at all, and checkpoints that are validated when loaded."""

import contextlib
import csv
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.console import UserError, is_out_of_memory, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


VERSION = (Path(__file__).parent.parent / "VERSION").read_text().strip()  # of this project, in what it writes
MOST_VALUES = 10_000_000  # in a checkpoint, beside those of tensors; of losses by step there may be a million


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """`with atomically(path) as temporary`: what is written to `temporary` gets the name `path` when it is complete."""
    path = Path(path)
    # another process, perhaps on another machine, may be writing the same file
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows cannot flush what is open for reading
            os.fsync(file.fileno())  # otherwise a power cut may leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # the temporary name means nothing to a reader
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder. Raises UserError if one does; without locks, does nothing."""
    handle = lock(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def lock(folder: Path) -> int | None:
    """Lock a folder until the handle that is returned is closed, or the process ends."""
    if fcntl is None:
        print(f"{folder}: this system has no locks; let no other process write there", file=sys.stderr)
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{folder}: another process is at work there; wait for it or stop it") from None
    except OSError:  # a file system without locks
        pass
    return handle


def save(contents: Any, path: Path) -> None:
    """`torch.save` that never leaves an incomplete file."""
    buffer = io.BytesIO()  # torch's own writer hides that a disk is full
    torch.save(contents, buffer)
    with atomically(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: str | Path, build: Callable[[Any], Any] = lambda contents: contents) -> Any:
    """Return `build(contents)` of a file that `save` wrote. Only tensors and plain values are read, never code.

    Raises:
        UserError: the file cannot be read, is not a checkpoint, or `build` refuses its contents with a ValueError.
    """
    if Path(path).is_fifo():  # which would be waited for
        raise UserError(f"{path}: is a pipe, not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses about damaged files: the error below is enough
            with open(path, "rb") as file:
                if not zipfile.is_zipfile(file):  # perhaps torch's format of before 2020, which has no checksums
                    raise ValueError
                archive = zipfile.ZipFile(file)
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):  # torch never does
                    raise ValueError
                if archive.testzip() is not None:  # torch does not look at checksums
                    raise ValueError
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name the file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: is not a checkpoint, or holds more than weights; it was not loaded") from None
    except Exception as error:  # a damaged archive shows itself in many ways: RuntimeError, EOFError, KeyError, …
        if is_out_of_memory(error):
            raise UserError(f"{path}: does not fit into memory") from None
        raise UserError(
            f"{path}: is damaged, or is not a checkpoint of torch 1.6 or later; it was not loaded"
        ) from None
    try:
        _refuse_what_grows(contents)
        return build(contents)
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    except Exception as error:  # a file of another origin can hold anything: sparse, quantized, complex tensors, …
        if is_out_of_memory(error):
            raise UserError(f"{path}: does not fit into memory") from None
        raise UserError(f"{path}: does not hold what is expected here; it was not loaded") from None


def _refuse_what_grows(contents: Any) -> None:
    """Raise ValueError if using a file's contents could take far more time or memory than its size suggests.

    A tensor may repeat a few numbers or have none, and a list may hold another one many times.
    """
    parts = [[contents]]
    n = 0
    while parts:
        part = parts.pop()
        if isinstance(part, Tensor):
            if part.is_meta or part.nbytes > part.untyped_storage().nbytes():
                raise ValueError("a tensor in it repeats its numbers, or has none; save it with .contiguous()")
        else:
            n += 50 + len(part)  # a list takes as much time as 50 numbers
            if n > MOST_VALUES:
                raise ValueError("it holds too many lists or values")
            values = part.values() if isinstance(part, dict) else part
            parts += [value for value in values if isinstance(value, Tensor | dict | list | tuple)]


def cpu_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's `state_dict` as it is written to files: on the CPU, in standard layout."""
    return {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}


def load_state(network: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` that reports a mismatch in one line.

    Raises ValueError if a key is missing or unknown, a shape or dtype differs, or a value is not finite.
    """
    name = type(network).__name__
    expected = network.state_dict()
    if not isinstance(state, dict):
        raise ValueError(f"it does not hold the weights of a {name}")
    for key in sorted(expected.keys() | state.keys(), key=str):
        if key not in state:
            raise ValueError(f"it does not hold the weights of this {name} ('{key}' is missing)")
        if key not in expected:
            raise ValueError(f"it holds more than the weights of this {name} ('{str(key)[:99]}')")
        if not isinstance(state[key], Tensor) or state[key].shape != expected[key].shape:
            raise ValueError(f"its '{key}' does not have the shape {tuple(expected[key].shape)} of this {name}")
        if state[key].is_floating_point() != expected[key].is_floating_point():
            raise ValueError(f"its '{key}' is {state[key].dtype}, not {expected[key].dtype}")
        if not state[key].to(expected[key].dtype).isfinite().all():  # a float64 may be too large for float32
            raise ValueError(f"its '{key}' holds values that are not finite")
    network.load_state_dict(state)


def digest(values: Tensor) -> str:
    """SHA-256 of float32 values."""
    return hashlib.sha256(values.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()


def write_json(path: Path, contents: dict) -> None:
    """Write a dict as JSON; what JSON does not know is written as text."""
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict:
    """The dict in a JSON file; {} if there is no such file.

    Raises UserError if the file exists but cannot be read, or holds something else.
    """
    try:
        contents = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); repair or remove it") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: was not written by train.py; repair or remove it")
    return contents


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Sequence]) -> None:
    """Write rows as CSV with a header; None is left empty."""
    with atomically(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def natural(name: str) -> list[str | int]:
    """A key that sorts names by the numbers in them: text and digits in turn."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


def find(path: str | Path) -> Path:
    """`path` as given if it exists, else `path` under gen_imgs/. Raises UserError if it is in neither place."""
    for candidate in (Path(path), Path("gen_imgs") / path):
        if candidate.exists():
            return candidate
    raise UserError(f"{path}: no such file or folder, here or under gen_imgs/")
