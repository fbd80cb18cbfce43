"""Runs that are killed, told to stop, or run out of disk: nothing is lost but the epoch at hand, nothing is torn.

A few kills by default; `make kills` makes 1,000: 80 of each prior's training, 140 of each other use of a program,
which ends sooner, and 12 of one or both of two processes.
"""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import (
    CONVERSION,
    assert_nothing_is_torn,
    assert_same_history,
    assert_same_weights,
    close,
    kill_after,
    new_run,
    resume_file,
    rows,
    run_program,
    start_two,
)

import predict
import train
from preparation import images, oasis, phantoms
from report.plots import Figures

KILLS = int(os.environ.get("KILLS", 1))  # of a prior's training
WORDS = ("--batch-size", "4", "--n-embeddings", "16", "--embeddings-dim", "4", "--device", "cpu", "--seed", "2")
VQVAE_WORDS = (*WORDS, "--epochs", "2")
WORDS = (*VQVAE_WORDS, "--dcgan-batch-size", "5", "--dcgan-epochs", "2")
CODES = (*VQVAE_WORDS, "--prior", "autoregressive")
CODES = (*CODES, "--autoregressive-batch-size", "5", "--autoregressive-epochs", "2")
PRIORS = {"dcgan": (WORDS, ("vqvae.pth", "generator.pth", "discriminator.pth"))}
if KILLS > 1:  # tests/test_train.py kills one once
    PRIORS["autoregressive"] = (CODES, ("vqvae.pth", "autoregressive.pth"))


def train_without_figures(words: list[str]) -> None:
    Figures._save = close
    train.main(words)


def train_without_locks(words: list[str]) -> None:
    def refuse(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = refuse
    train_without_figures(words)


def write_phantoms(words: list[str]) -> None:
    phantoms.write(words[0], {"train": [1], "validate": [2], "test": [3]}, 4)


def wait(process: multiprocessing.Process, seconds: float, out: Path, for_a_save: bool) -> None:
    """Until the process has ended, or the time is over and, if wanted, a file is being written."""
    process.join(seconds)
    while for_a_save and process.exitcode is None and not is_being_written(out):
        time.sleep(0.0002)


def is_being_written(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # a folder that is renamed or removed meanwhile
        return any(folder.rglob(".*.tmp"))
    return False


@pytest.mark.parametrize("stage", PRIORS)
def test_killed_at_random_moments_and_resumed_until_done(start, data, tmp_path, stage):
    """The end is bit for bit that of a run which was never interrupted."""
    words, weights = PRIORS[stage]
    main = train.main
    if KILLS == 1:
        main, words = train_without_figures, (*words, "--epochs", "1", "--dcgan-epochs", "1")
    start(tmp_path, len).join()  # starts the server, whose imports are not to count
    begun = time.monotonic()
    whole = start(tmp_path, main, "--data", data, *words, "--out", "whole")
    whole.join()
    assert whole.exitcode == 0
    seconds = time.monotonic() - begun
    (whole,) = (tmp_path / "whole").iterdir()
    rng, kills, number = random.Random(5), 0, 0
    while kills < KILLS:
        number += 1
        out, done = tmp_path / f"killed_{number}", False
        while not done:
            run = next(out.iterdir(), None) if out.is_dir() else None
            resumable = run is not None and (run / "resume.pth").exists()
            more = ("--resume", run) if resumable else ("--data", data, *words, "--out", out)
            process = start(tmp_path, main, *more)
            if run is not None and not resumable:
                shutil.rmtree(run)  # killed before anything was saved: a new run is begun
            if kills < KILLS:
                wait(process, rng.uniform(0, 1.1 * seconds / (1 + 2 * resumable)), out, rng.random() < 0.5)
            else:
                process.join()
            done = process.exitcode is not None
            if done:
                assert process.exitcode == 0
            else:
                process.kill()
                process.join()
                kills += 1
            for run in out.iterdir() if out.is_dir() else ():
                assert_nothing_is_torn(run)
        (run,) = out.iterdir()
        assert_same_weights(whole, run, weights)
        assert_same_history(whole, run, ["vqvae", stage])
        kept = {path.name for path in run.iterdir() if not path.name.startswith(".")}
        assert kept == {path.name for path in whole.iterdir()}
    print(f"{kills} kills in {number} runs")


@pytest.mark.parametrize("victims", [[1], [0], [0, 1]][: 1 if KILLS == 1 else 3])
def test_killed_processes_of_two_end_the_other_with_a_line_and_lose_nothing(start, data, tmp_path, victims):
    """Resumed by two processes, the run ends as one of two that was left alone, bit for bit."""
    begin = partial(start_two, start, tmp_path)
    words, (stages, weights) = ("--data", data, *VQVAE_WORDS, "--only", "vqvae"), (["vqvae"], ["vqvae.pth"])
    if KILLS > 1:
        words, stages, weights = ("--data", data, *WORDS), ["vqvae", "dcgan"], PRIORS["dcgan"][1]
    for process in begin(*words, "--out", "whole"):
        process.join()
    (whole,) = (tmp_path / "whole").iterdir()
    rng = random.Random(2)
    for kill in range(max(1, KILLS // 20)):
        out = tmp_path / f"killed_{kill}"
        both = begin(*words, "--out", out)
        printed = tmp_path / "printed_0"
        while not list(out.glob("*/resume.pth")) or KILLS == 1 and "\nEpoch: 1\n" not in printed.read_text():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2) if KILLS > 1 else 0)
        ended = both[0].exitcode is not None
        assert KILLS > 1 or not ended
        for victim in victims:
            both[victim].kill()
        for rank, process in enumerate(both):
            process.join(120)
            said = (tmp_path / f"errors_{rank}").read_text()
            if rank not in victims and not ended:
                assert process.exitcode == 1 and "Traceback" not in said
                assert said.splitlines()[-1].startswith("train.py: error: another process of this run has ended")
        (run,) = out.iterdir()
        assert_nothing_is_torn(run)
        for process in begin("--resume", run):
            process.join()
            assert process.exitcode == 0
        assert_same_weights(whole, run, weights)
        assert_same_history(whole, run, stages)


def test_two_processes_that_resume_one_run_without_locks_lose_nothing(start, data, tmp_path, without_figures):
    """As on some network disks: each may disturb the other, no more. With locks, the second one is refused."""
    words = ("--data", data, *VQVAE_WORDS, "--only", "vqvae", "--epochs", 1)
    alone = new_run(run_program("train.py", *words, cwd=tmp_path), tmp_path / "gen_imgs")
    shared = shutil.copytree(alone, tmp_path / "shared")
    more = ("--epochs", 2, "--resume")
    assert run_program("train.py", *more, alone, cwd=tmp_path).returncode == 0
    both = [start(tmp_path, train_without_locks, *more, shared) for _ in range(2)]
    for process in both:
        process.join()
    assert_nothing_is_torn(shared)
    assert len(rows(shared, "vqvae")) > 1  # at least one of them went on
    assert run_program("train.py", *more, shared, cwd=tmp_path).returncode == 0
    assert_same_weights(alone, shared, ["vqvae.pth"])
    assert_same_history(alone, shared, ["vqvae"])


@pytest.mark.parametrize("use", ["scores", "codes", "samples", "slices", "images", "phantoms"])
def test_a_killed_program_leaves_nothing_torn_and_works_when_called_again(start, data, trained, heads, tmp_path, use):
    drawn = (predict.main, trained[1] / "vqvae.pth", "--out", tmp_path / "out")
    predicted = (*drawn, "--data", data, "--split", "validate")
    words = {
        "scores": predicted,
        "codes": (*predicted, "--export-codes", tmp_path / "codes.npz"),
        "samples": (*drawn, "--samples", 3, "--prior", trained[1] / "generator.pth"),
        "slices": (oasis.main, heads, tmp_path / "out", *CONVERSION),
        "images": (images.main, data, tmp_path / "out"),
        "phantoms": (write_phantoms, tmp_path / "out"),
    }[use]
    rng, seconds = random.Random(1), 0
    for kill in range(1 if KILLS == 1 else KILLS * 7 // 4):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process = start(tmp_path, *words)
        wait(process, rng.uniform(0, seconds), tmp_path, kill == 0 or rng.random() < 0.7)
        process.kill()
        process.join()
        assert_nothing_is_torn(tmp_path)
        begun = time.monotonic()
        again = start(tmp_path, *words)
        again.join()
        seconds = seconds or time.monotonic() - begun
        assert again.exitcode == 0
        assert_nothing_is_torn(tmp_path)


def test_a_signal_ends_the_step_and_says_how_to_resume(start, data, tmp_path):
    words = ("--data", data, *VQVAE_WORDS, "--only", "vqvae", "--out", "out dir")
    code, said = kill_after(start, tmp_path, words, "Epoch: 1", signal.SIGINT)
    assert code == 130 and "Traceback" not in said
    last = said.splitlines()[-1]
    found = re.fullmatch(r"Stopped\. To resume at VQ-VAE epoch 2: python train\.py --resume '(out dir/\S+)'", last)
    assert found, last
    assert resume_file(tmp_path / found[1])["state"]["vqvae"]["epoch"] == 1
    assert not list((tmp_path / found[1]).glob(".*"))
    done = run_program("train.py", "--resume", found[1], cwd=tmp_path)
    assert done.returncode == 0 and "Done." in done.stdout, done.stderr


def test_a_signal_before_the_first_epoch_is_complete(start, data, tmp_path):
    words = ("--data", data, *WORDS, "--epochs", "999")
    code, said = kill_after(start, tmp_path, words, "Fast path", signal.SIGTERM)
    assert code == 143 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("Stopped. To resume at VQ-VAE epoch 1: python train.py --resume ")
