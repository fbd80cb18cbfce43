"""A run's folder: its options and log, files that are never torn, checkpoints loaded with care, and resuming."""

import argparse
import contextlib
import csv
import io
import json
import os
import pickle
import platform
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    fcntl = None

import numpy as np
import torch
from tqdm import tqdm

RESUME_FILE = "resume.pth"
# Each has random streams of its own, so that one stage's length never changes another's numbers.
STREAMS = (
    "vqvae weights",
    "vqvae",
    "gan weights",
    "gan",
    "gan samples",
    "samples",
    "measures",
    "measured images",
    "walks",
    "calibration",
    "independent codes",
)


class RunError(Exception):
    """A run's folder, file or option cannot be used; the message names it and says what to do."""


class Run:
    """The folder of one run of train.py.

    Attributes:
        folder: where everything goes; None until a new run begins.
        options: every option of the run, by name.
        state: what resuming needs besides the options, by stage ("vqvae", "gan"); tensors, numbers and lists only.
        rows: the rows of metrics.csv so far.
        outdated: files that no longer belong to the run; `begin` removes them.
    """

    def __init__(self, folder: Path | None, options: dict, state: dict | None = None, rows: list[dict] | None = None):
        self.folder, self.options = folder, options
        self.state, self.rows = state or {}, rows or []
        self.outdated: list[Path] = []

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """The run in a folder that `save` has written to, as it was after its last complete epoch.

        Raises:
            RunError: the folder holds no run to resume.
        """
        folder = find(path)
        if not (folder / RESUME_FILE).is_file():
            raise RunError(f"{folder}: holds no {RESUME_FILE}, so no epoch to go on from; start a new run instead")
        run = cls(folder, {})
        with restoring(run):
            saved = load(folder / RESUME_FILE)
            run.options, run.state, run.rows = saved["options"], saved["state"], saved["rows"]
            if not isinstance(run.options, dict) or not isinstance(run.rows, list):
                raise ValueError("it was not written by train.py")
            for stage, part in run.state.items():
                epochs = [row["epoch"] for row in run.rows_of(stage)]
                if stage not in ("vqvae", "gan") or epochs != list(range(1, part["epoch"] + 1)):
                    raise ValueError(f"the rows of {stage} are not those of its epochs")
        return run

    def begin(self, device: torch.device, data: dict) -> None:
        """Make the folder of a new run and write run.json; a resumed one's keeps what it recorded at first.

        Raises:
            RunError: the folder cannot be made, or a resumed run's data have other counts of images.
        """
        where = environment(device)
        if self.folder is None:
            self.folder = new_folder(self.options["out"])
            self._lock()
            before = where | {"resumed": []}
        else:
            self._lock()
            before = read_json(self.folder / "run.json")
            images = before.get("data", {}).get("images", data["images"])
            if images != data["images"]:
                raise RunError(f"{data['folder']}: has {data['images']} images, the run began with {images}")
            before["resumed"] = before.get("resumed", []) + [where]
            self.save()  # raised epochs must outlast an interruption
            for path in self.outdated:
                path.unlink(missing_ok=True)
        record = {"options": self.options, "seed": self.options["seed"], "data": data}
        first = {key: before.get(key, value) for key, value in where.items()}
        write_json(self.folder / "run.json", record | first | {"resumed": before["resumed"]})

    def _lock(self) -> None:
        """Keep other processes from writing to the folder, until this one ends.

        Raises:
            RunError: another one is at work there.
        """
        if fcntl is None:  # Windows
            return
        self._folder_handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._folder_handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.folder}: another process is at work on this run; wait for it or stop it") from None
        except OSError:  # a file system without locks
            pass

    def rows_of(self, stage: str) -> list[dict]:
        """The rows of one stage, "vqvae" or "gan"."""
        return [row for row in self.rows if row["stage"] == stage]

    def save(self) -> None:
        """Write resume.pth and metrics.csv; called at the end of each epoch, after the epoch's other files."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with atomically(self.folder / "metrics.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        save({"options": self.options, "state": self.state, "rows": self.rows}, self.folder / RESUME_FILE)


@contextlib.contextmanager
def restoring(run: Run):
    """`with restoring(run):` around what reads a resumed run's state; RunError where that does not fit.

    resume.pth may be damaged in ways that loading does not show, or edited.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        reason = one_line(error)
        path = run.folder / RESUME_FILE
        raise RunError(f"{path}: does not fit this run ({type(error).__name__}: {reason}); start a new run") from None


class atomically:
    """`with atomically(path) as temporary`: what is written to `temporary` takes the name `path` when complete."""

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                with open(self.temporary, "rb") as file:
                    os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
                os.replace(self.temporary, self.path)
        except OSError as failure:
            error = failure
            raise
        finally:
            if isinstance(error, OSError):
                error.filename = str(self.path)  # not the temporary name, which means nothing to a reader
            Path(self.temporary).unlink(missing_ok=True)


def number(kind: type, least: float, what: str, below: float = float("inf")) -> Callable[[str], float]:
    """A `type` for argparse: a number of a kind (int, float) from `least` to below `below`; else "… is not `what`"."""

    def convert(word: str):
        try:
            value = kind(word)
        except ValueError:
            value = float("nan")
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"{word} is not {what}")
        return value

    return convert


def new_folder(out: str | Path, suffix: str = "") -> Path:
    """Make out/<YYYY-MM-DD_HH-MM-SS><suffix>, with _2, _3 … where it exists already.

    Raises:
        RunError: it cannot be made.
    """
    name = time.strftime("%Y-%m-%d_%H-%M-%S") + suffix
    for number in range(1, 1000):
        folder = Path(out) / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                break
        except OSError as error:
            raise RunError(f"{out}: cannot make a folder there ({error.strerror}); name another with --out") from None
    raise RunError(f"{out}: cannot make a folder there; name another with --out")


def find(path: str | Path, out: str | Path = "gen_imgs") -> Path:
    """`path` as given if it exists, else under `out`.

    Raises:
        RunError: it is in neither place.
    """
    for candidate in (Path(path), Path(out) / path):
        if candidate.exists():
            return candidate
    raise RunError(f"{path}: no such file or folder, here or under {out}/")


def save(contents: Any, path: Path) -> None:
    """torch.save that never leaves a torn file."""
    buffer = io.BytesIO()  # torch's own writer hides that a disk is full
    torch.save(contents, buffer)
    with atomically(path) as temporary:
        Path(temporary).write_bytes(buffer.getbuffer())


def load(path: Path, build: Callable[[Any], Any] = lambda contents: contents) -> Any:
    """build(contents) of a file that `save` wrote. Only tensors and plain values are read, never pickled code.

    Raises:
        RunError: the file cannot be read, is no checkpoint, or `build` refuses it with a ValueError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses about damaged files: the error below is enough
            with open(path, "rb") as file:
                if not zipfile.is_zipfile(file):  # perhaps torch's format of before 2020, which has no checksums
                    raise ValueError
                if zipfile.ZipFile(file).testzip() is not None:  # checksums, which torch does not look at
                    raise ValueError
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except IsADirectoryError:
        raise RunError(f"{path}: is a folder; name the file in it") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError:
        raise RunError(f"{path}: is no checkpoint, or holds more than weights; it was not loaded") from None
    except Exception:  # a damaged archive shows itself in many ways: RuntimeError, EOFError, KeyError, …
        raise RunError(f"{path}: is no checkpoint (of torch 1.6 or later), or is damaged; it was not loaded") from None
    try:
        return build(contents)
    except ValueError as error:
        raise RunError(f"{path}: {one_line(error)}") from None
    except Exception:  # what a file of another origin holds can be anything: sparse, quantized, complex tensors, …
        raise RunError(f"{path}: does not hold what is wanted here; it was not loaded") from None


def one_line(error: Exception) -> str:
    """What an error says, as one printable line of at most 300 characters: it may quote a file's contents."""
    words = "".join(c if c.isprintable() else " " for c in str(error)).split()
    return " ".join(words)[:300]


def write_json(path: Path, contents: dict) -> None:
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict:
    """What `write_json` wrote; {} where there is no such file.

    Raises:
        RunError: it is there and cannot be read.
    """
    try:
        contents = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read ({error}); repair or remove it") from None
    data = contents.get("data", {}) if isinstance(contents, dict) else None
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("folder", ""), str)
        or not isinstance(contents.get("resumed", []), list)
    ):
        raise RunError(f"{path}: was not written by train.py; repair or remove it")
    return contents


def environment(device: torch.device) -> dict:
    """What a reader needs to repeat a run: versions, machine and commit."""
    project = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", project, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except OSError:  # no git on this machine
        commit = ""
    packages = ("torchvision", "numpy", "scikit-image", "matplotlib", "pillow")
    return {
        "command": [sys.executable, *sys.argv],
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA, then MPS, then the CPU. Of several processes each has a GPU of its own.

    Raises:
        RunError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError
        torch.zeros(1, device=device)
    except Exception:  # torch has many words for a device that is not there
        raise RunError(f"--device {name}: no such device here; try --device cpu") from None
    return device


def derived_seed(seed: int, stream: str, epoch: int = 0) -> int:
    """A seed for one stream and epoch of a run, so that resuming needs no generator's state."""
    words = np.random.SeedSequence([seed, STREAMS.index(stream), epoch]).generate_state(2)
    return int(words[0]) << 31 ^ int(words[1])


def random_generator(seed: int, stream: str, epoch: int = 0) -> torch.Generator:
    """A generator on the CPU, whatever the device: so every device draws the same numbers."""
    return torch.Generator().manual_seed(derived_seed(seed, stream, epoch))


class Stopped(SystemExit):
    """A signal asked the program to stop; it ends with 128 and the signal's number, 130 or 143, as shells have it."""


class _Stop:
    """Whether a signal has asked the program to stop."""

    signal = 0


def stop_at_signals() -> None:
    """From now on SIGINT and SIGTERM let the step at hand end: the progress bar it belongs to raises `Stopped` then.

    A second signal ends the program at once.
    """

    def note(number: int, frame) -> None:
        _Stop.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, note)


class _Bar(tqdm):
    """A progress bar that ends the program between two steps when a signal has asked for it."""

    def update(self, n: float = 1) -> bool | None:
        shown = super().update(n)
        _check_stop()
        return shown

    def __iter__(self):
        for element in super().__iter__():
            yield element
            _check_stop()


def _check_stop() -> None:
    if _Stop.signal:
        raise Stopped(128 + _Stop.signal)


class _PlainLines:
    """A file for tqdm whose updates become lines of their own on standard error."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress(*args, **settings) -> tqdm:
    """tqdm; where standard error is no terminal, a plain line every 15 seconds instead of a moving bar."""
    if not sys.stderr.isatty():
        settings |= {"file": _PlainLines(), "mininterval": 15, "maxinterval": 15, "delay": 5}
        settings["bar_format"] = "{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_fmt}]"
    return _Bar(*args, **settings)
