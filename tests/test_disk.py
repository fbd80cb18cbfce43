"""A disk that is full, a quota that is reached, a file system without locks: at each file that a program writes."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import (
    CONVERSION,
    EPOCHS,
    SMALL,
    assert_nothing_is_torn,
    assert_same_history,
    assert_same_weights,
    new_run,
    refused,
    run_program,
    write_heads,
)


@pytest.fixture
def failing(monkeypatch):
    """`failing(pattern, n)`: the n-th file with such a name cannot be written, nor one after it. None fails by default.

    Writing fails when the file is complete and would get its name, as where space is only found short then.
    """
    replace = os.replace

    def fail(pattern: str = "", n: int = 1, number: int = errno.ENOSPC) -> None:
        left = [n]

        def fault(source, target):
            if re.fullmatch(pattern, Path(target).name):
                left[0] -= 1
                if left[0] <= 0:
                    raise OSError(number, os.strerror(number), str(source))
            replace(source, target)

        monkeypatch.setattr(os, "replace", fault)

    return fail


def assert_all_load(folder: Path) -> None:
    assert not list(folder.rglob(".*")), "a temporary file is left"
    assert_nothing_is_torn(folder)


def in_whole_seconds(folder: Path) -> None:
    """As after copying to a file system with coarse time stamps: what was written in one second looks equally old."""
    for path in folder.rglob("*"):
        os.utime(path, ns=2 * (path.stat().st_mtime_ns // 10**9 * 10**9,))


def test_a_run_goes_on_after_each_file_that_could_not_be_written(trained, data, tmp_path, failing, without_figures):
    """And ends as one that was left alone. A run that never wrote resume.pth is begun anew."""
    begin = ("--data", data, *SMALL, *EPOCHS, "--seed", 5, "--out", tmp_path / "out")
    for name, n in (("run.json", 1), ("vqvae.pth", 1), ("resume.pth", 1), ("resume.pth", 3)):
        failing(re.escape(name), n)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        done = run_program("train.py", *begin, cwd=tmp_path)
        refused(done, f"{name}: No space left on device")
        assert_all_load(tmp_path / "out")
    (run,) = (tmp_path / "out").iterdir()  # its first epoch is complete
    for name, n, number in (
        ("resume.pth", 1, errno.EROFS),
        ("metrics.csv", 2, errno.EIO),
        ("discriminator.pth", 1, errno.EDQUOT),
    ):
        failing(re.escape(name), n, number)
        refused(run_program("train.py", "--resume", run, cwd=tmp_path), f"{name}: {os.strerror(number)}")
        assert_all_load(run)
    failing()
    in_whole_seconds(run)
    assert run_program("train.py", "--resume", run, cwd=tmp_path).returncode == 0
    assert_same_weights(trained[1], run)
    assert_same_history(trained[1], run)


def test_figures_and_pages_that_cannot_be_written_cost_a_warning_each(data, tmp_path, failing):
    failing(r".*\.png|index\.html")
    words = ("--data", data, *SMALL[:2], *SMALL[4:], "--epochs", 1, "--only", "vqvae", "--out", tmp_path / "out")
    done = run_program("train.py", *words, cwd=tmp_path)
    run = new_run(done, tmp_path / "out")
    assert {path.suffix for path in run.iterdir()} == {".pth", ".json", ".csv"}
    assert_all_load(run)
    lines = done.stderr.splitlines()
    assert len(lines) > 5 and all(
        re.match(r"warning: \S+: could not be written and is left out \(", line) for line in lines
    )


@pytest.mark.parametrize(
    "words, names",
    [
        ((), ["scores.csv"]),
        (("--export-codes", "codes.npz"), ["codes.npz"]),
        (("--samples", 2, "--prior", "generator.pth"), ["sample_000.png", "sample_001.png"]),
    ],
    ids=["scores", "codes", "samples"],
)
def test_predict_ends_with_one_line_at_each_file_that_cannot_be_written(trained, data, tmp_path, failing, words, names):
    words = [trained[1] / word if word == "generator.pth" else word for word in words]
    words = ("predict.py", trained[1] / "vqvae.pth", "--data", data, "--out", tmp_path / "out", *words)
    for name in names:
        failing(re.escape(name))
        refused(run_program(*words, cwd=tmp_path), f"{name}: No space left on device")
        assert_all_load(tmp_path)


def test_a_conversion_goes_on_after_each_file_that_could_not_be_written(tmp_path, tmp_path_factory, failing):
    heads = tmp_path_factory.mktemp("heads")
    write_heads(heads)
    words = (heads, tmp_path / "slices", *CONVERSION, "--preview")
    for name in ("conversion.json", "case_002_slice_1.nii.png", "volume_002_1.json", "subjects.csv", "preview.png"):
        failing(re.escape(name))
        done = run_program("preparation.oasis", *words, cwd=tmp_path)
        refused(done, f"{name}: No space left on device")
        assert_all_load(tmp_path)
    failing()
    in_whole_seconds(tmp_path)
    in_whole_seconds(heads)  # so the volume that is done is converted again
    assert run_program("preparation.oasis", *words, cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "slices").glob("*/case_*.png"))) == 6
