"""The folder of a run: names, the lock, the record, resuming; and seeds."""

import subprocess
import time
from dataclasses import dataclass

import pytest
import torch
from conftest import PROJECT

from support import files, seeds
from support.console import UserError
from support.device import FastPath
from support.run import Run, environment, new_folder, open_run, read_record

STAGES = ("vqvae", "dcgan")
DATA = {"folder": "d", "phantoms": False, "content": "", "images": {}, "digests": {}}


@dataclass
class Options:
    seed: int = 0
    data: str | None = None


def test_the_commit_is_that_of_this_project_whatever_the_environment_says(tmp_path, monkeypatch):
    expected = subprocess.run(["git", "-C", PROJECT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert environment(torch.device("cpu"))["commit"].startswith(expected.strip() or "unknown")


def test_the_record_counts_processes_that_joined_whatever_a_variable_says(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert environment(torch.device("cpu"))["processes"] == 1


def test_folders_of_the_same_second_are_numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "2030-01-02_03-04-05")
    names = [new_folder(tmp_path / "out").name for _ in range(3)]
    assert names == ["2030-01-02_03-04-05", "2030-01-02_03-04-05_2", "2030-01-02_03-04-05_3"]
    assert new_folder(tmp_path / "out", "_predict").name == "2030-01-02_03-04-05_predict"


def test_resuming_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_run(tmp_path / "nowhere", Options)
    with pytest.raises(UserError, match="no resume.pth"):
        open_run(tmp_path, Options)
    row, good = {"stage": "vqvae", "epoch": 1}, {"options": {}, "fast_path": {"device": "cpu"}}
    files.save({**good, "state": {"vqvae": {"epoch": 1}}, "rows": [row]}, tmp_path / "resume.pth")
    open_run(tmp_path, Options)
    for contents in (
        [1],
        {**good, "state": {}, "rows": [], "options": {"no_such_option": 1}},
        {**good, "state": {}, "rows": [], "fast_path": {"device": "cpu", "unknown": 1}},
    ):
        files.save(contents, tmp_path / "resume.pth")
        with pytest.raises(UserError, match="resume.pth: does not fit.*start a new run"):
            open_run(tmp_path, Options)


def test_two_processes_cannot_work_in_one_folder(tmp_path):
    with files.locked(tmp_path), pytest.raises(UserError, match="another process is at work"), files.locked(tmp_path):
        pass
    with files.locked(tmp_path):
        pass


def test_run_there_and_back(tmp_path):
    rows = [
        {"stage": "vqvae", "epoch": 1, "ssim_mean": 0.123456789012345678},
        {"stage": "dcgan", "epoch": 1, "d_loss": 2.5},
    ]
    run = Run(Options(seed=3), tmp_path, {"vqvae": {"epoch": 1, "model": {"w": torch.arange(3)}}}, rows)
    run.fast_path = FastPath("cpu")
    run.save()
    again = open_run(tmp_path / "resume.pth", Options)  # which stands for its folder
    assert again.options == run.options and again.rows == rows and again.fast_path == run.fast_path
    assert torch.equal(again.state["vqvae"]["model"]["w"], torch.arange(3))
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["stage,epoch,ssim_mean,d_loss", f"vqvae,1,{rows[0]['ssim_mean']!r},", "dcgan,1,,2.5"]


@pytest.mark.parametrize(
    "text",
    ["[]", '{"data": null}', "{half", '"x"', '{"data": {"folder": 5}}', '{"data": {"images": "x\\n"}}']
    + ['{"resumed": {}}', "[" * 100_000],
)
def test_what_is_no_run_json_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match="run.json: .*repair or remove it"):
        read_record(tmp_path)


def test_derived_seeds_differ():
    found = {seeds.derived_seed(s, stream, e) for s in range(5) for stream in seeds.STREAMS for e in range(50)}
    assert len(found) == 5 * len(seeds.STREAMS) * 50
    for seed in found:
        torch.Generator().manual_seed(seed)
