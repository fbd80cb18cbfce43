"""Progress bars, signals, number options, and errors as one line."""

import argparse
import contextlib
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from support import distributed

OUT_OF_MEMORY = "out of memory|allocate memory|ALLOC_FAILED"  # the words of CUDA, MPS, the CPU and cuBLAS


class UserError(Exception):
    """Something that the user can fix. The message names the file or option at fault and says what to do."""


def one_line(error: object) -> str:
    """What an error says, as one printable line of at most 300 characters: it may quote a file's contents."""
    parts = "".join(c if c.isprintable() else " " for c in str(error)).split()
    return " ".join(parts)[:300]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory, of the host or of a device, was not enough."""
    match = re.search(OUT_OF_MEMORY, str(error))
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and match is not None


class Stopped(SystemExit):
    """A signal ends the program. The exit status is 128 plus the signal's number: 130 for SIGINT, 143 for SIGTERM."""


@dataclass(frozen=True)
class Number:
    """A number in [low, below), as the `type` of an argparse option; `text` describes it."""

    kind: type
    low: float
    text: str
    below: float = math.inf

    def __call__(self, word: str) -> int | float:
        try:
            value = self.kind(word)
        except ValueError:
            value = math.nan
        if not self.low <= value < self.below:
            raise argparse.ArgumentTypeError(f"{word} is not {self.text}")
        return value


SEED = Number(int, 0, "a whole number from 0 to 2147483647", below=2**31)

_received: list[int] = []  # numbers of the signals that have arrived


def install_signal_handlers() -> None:
    """From now on, SIGINT and SIGTERM take effect at the next call of `stop_if_signalled`.

    A second signal ends the program at once.
    """

    def remember(number: int, frame) -> None:
        _received.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, remember)


def stop_if_signalled() -> None:
    """Raise `Stopped` if a signal has arrived."""
    if _received:
        raise Stopped(128 + _received[0])


class _PlainLines:
    """A file for tqdm that writes each update as a line of its own to standard error."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress(*args, **settings) -> tqdm:
    """A tqdm progress bar. Where standard error is not a terminal, it is a plain line every 15 seconds.

    TQDM_DISABLE=1 in the environment silences it; the tests do so.
    """
    if not sys.stderr.isatty():
        settings |= {"file": _PlainLines(), "mininterval": 15, "maxinterval": 15, "delay": 5}
        settings["bar_format"] = "{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(*args, **settings)


def in_batches(dataset, indices: Sequence[int] | None = None, size: int = 32, desc: str = "") -> Iterator[Tensor]:
    """Walk through a data set in batches, with a progress bar. A signal takes effect between two batches.

    The data set has `batch(indices)`, as `dataset.OasisDataset` has; by default all of it is walked through.
    """
    for part in in_parts(range(len(dataset)) if indices is None else indices, size, desc):
        yield dataset.batch(part)


def in_parts(rows: Sequence | Tensor, size: int, desc: str) -> Iterator[Sequence | Tensor]:
    """Yield `size` rows at a time, with a progress bar if there are more. A signal takes effect between two parts."""
    with progress(total=len(rows), desc=desc, unit=" images", leave=False, disable=len(rows) <= size) as bar:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield part
            bar.update(len(part))
            stop_if_signalled()


def in_threads(items: Sequence, work: Callable, n_threads: int, **bar) -> Iterator:
    """Yield work(item) for each item, in order, computed in threads. A signal takes effect between two items."""

    def stoppable(item):
        stop_if_signalled()
        return work(item)

    pool = ThreadPoolExecutor(n_threads)
    try:
        for result in progress(pool.map(stoppable, items), total=len(items), **bar):
            yield result
            stop_if_signalled()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def warn_on_failure(path: Path) -> Iterator[None]:
    """Turn any exception into a warning: a figure that cannot be drawn must not cost hours of training."""
    try:
        yield
    except Exception as error:
        print(f"warning: {path}: could not be written and is left out ({one_line(error)})", file=sys.stderr)


def run_program(main: Callable[[], None], name: str) -> None:
    """Run a program's `main`. What its user can fix ends it with one line and exit status 1, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None where the shell closed it; of Jupyter's own kind in a notebook
            stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that are not text
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        main()
    except UserError as error:
        _fail(f"{name}: error: {error}")
    except OSError as error:  # a full disk, a folder without write permission
        _fail(f"{name}: error: {error.filename or 'output'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if distributed.is_lost(error):
            _fail(f"{name}: error: another process of this run has ended; see what it said, then resume the run")
        if "can't start new thread" in str(error):
            _fail(f"{name}: error: no more threads can be started; raise the limit (ulimit -u)")
        if not is_out_of_memory(error):
            raise
        _fail(f"{name}: error: out of memory; try a smaller batch, codebook or number of samples")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        _received.clear()
        for number, handler in handlers.items():  # a notebook goes on
            if handler is not None:  # None where it was not installed from Python
                signal.signal(number, handler)


def _fail(message: str) -> None:
    if not distributed.is_first():
        time.sleep(distributed.GRACE)  # rank 0 usually has the same error and reports it first
    print(message, file=sys.stderr if distributed.is_first() else sys.__stderr__)
    sys.exit(1)
