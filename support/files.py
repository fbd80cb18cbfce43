"""Files that are written completely or not at all, and checkpoints that are checked for damage when loaded."""

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
    if fcntl is None:
        print(f"{folder}: this system has no locks; let no other process write there", file=sys.stderr)
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is at work there; wait for it or stop it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


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
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise UserError(f"{path}: is no file; name a .pth file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses about damaged files: the error below is enough
            with open(path, "rb") as file:
                if not zipfile.is_zipfile(file):  # perhaps torch's format of before 2020, which has no checksums
                    raise ValueError("is damaged, or is not a checkpoint of torch 1.6 or later")
                if zipfile.ZipFile(file).testzip() is not None:  # torch does not look at checksums
                    raise ValueError("is damaged")
            contents = torch.load(path, map_location="cpu", weights_only=True)
        return build(contents)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: is not a checkpoint, or holds more than weights; it was not loaded") from None
    except Exception as error:  # a file of another origin can hold anything: sparse, quantized, complex tensors, …
        if is_out_of_memory(error):
            raise UserError(f"{path}: does not fit into memory") from None
        raise UserError(f"{path}: is damaged, or does not hold what is expected here; it was not loaded") from None


def cpu_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's `state_dict` as it is written to files: on the CPU, in standard layout."""
    return {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}


def load_state(network: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` that also raises ValueError where keys or shapes differ, or a value is not finite."""
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(one_line(error)) from None
    for key, value in network.state_dict().items():
        if state[key].dtype.is_floating_point != value.dtype.is_floating_point:
            raise ValueError(f"its '{key}' is {state[key].dtype}, not {value.dtype}")
        if not value.isfinite().all():
            raise ValueError(f"its '{key}' holds values that are not finite")


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
        raise UserError(f"{path}: holds something else than expected here; repair or remove it")
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
