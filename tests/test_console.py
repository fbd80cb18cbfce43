"""Progress, signals, and errors as one line."""

import io
import os
import signal
import sys

import pytest
import torch

from support import console
from support.console import UserError


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
    bar = console.progress(total=4, desc="Reading", unit=" images", disable=False)
    bar.delay = bar.mininterval = 0
    for _ in range(4):
        bar.update(1)
    bar.close()
    printed = capsys.readouterr().err
    lines = printed.splitlines()
    assert "\r" not in printed and all(line.startswith("Reading: ") for line in lines)
    assert "4/4 images" in lines[-1] and "images/s" in lines[-1]


def test_progress_of_a_short_task_prints_nothing_where_there_is_no_terminal(capsys):
    assert list(console.progress(range(5), desc="Short", disable=False)) == list(range(5))
    assert capsys.readouterr().err == ""


def test_a_signal_takes_effect_at_the_next_look(monkeypatch):
    monkeypatch.setattr(console, "_received", [])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        console.install_signal_handlers()
        console.stop_if_signalled()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one would end the program at once
        with pytest.raises(console.Stopped) as caught:
            console.stop_if_signalled()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert caught.value.code == 128 + signal.SIGTERM


def test_a_signal_stops_a_walk_through_a_data_set_between_two_batches(monkeypatch):
    class Numbers:
        def __len__(self):
            return 10

        def batch(self, indices):
            return torch.tensor(list(indices))

    assert [batch.tolist() for batch in console.in_batches(Numbers(), size=4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [batch.tolist() for batch in console.in_batches(Numbers(), [7, 3, 5], 2)] == [[7, 3], [5]]
    walk = console.in_batches(Numbers(), size=4)
    next(walk)
    monkeypatch.setattr(console, "_received", [2])
    with pytest.raises(console.Stopped):
        next(walk)


@pytest.mark.parametrize(
    "error, said",
    [
        (UserError("--lr 0: is not a rate"), "p.py: error: --lr 0: is not a rate\n"),
        (OSError(28, "No space left on device", "x.pth"), "p.py: error: x.pth: No space left on device\n"),
        (MemoryError(), "p.py: error: out of memory; try a smaller batch, codebook or number of samples\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "p.py: error: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "p.py: error: out of memory"),
        (RuntimeError("CUDA error: out of memory"), "p.py: error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "p.py: error: out of memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "p.py: error: out of memory"),
    ],
)
def test_errors_that_a_user_can_fix_are_one_line(capfd, error, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        console.run_program(main, "p.py")
    assert caught.value.code == 1 and capfd.readouterr().err.startswith(said)


class NotebookStream(io.StringIO):
    """A stream as Jupyter's kernel has it: not an io.TextIOWrapper."""


def test_a_program_runs_in_a_notebook_and_leaves_its_signals_alone(monkeypatch):
    out, err = NotebookStream(), NotebookStream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    before = signal.getsignal(signal.SIGINT)

    def main():
        console.install_signal_handlers()
        print("at work")

    console.run_program(main, "train.py")
    assert out.getvalue() == "at work\n" and signal.getsignal(signal.SIGINT) is before

    def fail():
        raise UserError("x: is not there")

    with pytest.raises(SystemExit):
        console.run_program(fail, "train.py")
    assert err.getvalue() == "train.py: error: x: is not there\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a mistake"):
        console.run_program(lambda: (_ for _ in ()).throw(RuntimeError("a mistake")), "p.py")
