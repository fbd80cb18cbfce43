"""The run folder, files that are never torn, loading with care, seeds."""

import io
import os
import pickle
import re
import struct
import time
import zipfile
from collections import OrderedDict

import pytest
import torch

import runs
from modules import VQVAE
from runs import RunError


def test_folders_of_the_same_second_are_numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "2030-01-02_03-04-05")
    names = [runs.new_folder(tmp_path / "out").name for _ in range(3)]
    assert names == ["2030-01-02_03-04-05", "2030-01-02_03-04-05_2", "2030-01-02_03-04-05_3"]
    assert runs.new_folder(tmp_path / "out", "_predict").name == "2030-01-02_03-04-05_predict"


def test_folder_name_is_the_time(tmp_path):
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", runs.new_folder(tmp_path).name)


def test_folder_where_a_file_is(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="--out"):
        runs.new_folder(tmp_path / "file")


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    runs.save([1], tmp_path / "x.pth")
    with pytest.raises(pickle.PicklingError), runs.atomically(tmp_path / "x.pth") as temporary:
        temporary.write_bytes(b"half of")
        raise pickle.PicklingError
    assert runs.load(tmp_path / "x.pth") == [1] and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.atomically, "__enter__", lambda self: "/dev/full")
    with pytest.raises(OSError, match="No space left"):
        runs.save(VQVAE().state_dict(), tmp_path / "vqvae.pth")
    assert not list(tmp_path.iterdir())


class Payload:
    """Pickled code that leaves a trace when it is run."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("kind", ["empty", "garbage", "truncated", "folder", "pickle", "missing", "without checksums"])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, kind):
    path, trace = tmp_path / "x.pth", tmp_path / "trace"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(b"\x80garbage" * 100)
    elif kind == "truncated":
        torch.save(VQVAE().state_dict(), path)
        path.write_bytes(path.read_bytes()[:300_000])
    elif kind == "folder":
        path.mkdir()
    elif kind == "without checksums":
        torch.save(VQVAE().state_dict(), path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        torch.save({"x": Payload(trace)}, path)
    with pytest.raises(RunError) as caught:
        runs.load(path, VQVAE.from_state_dict)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert not trace.exists()


def on_a_gpu(contents: bytes) -> bytes:
    """A checkpoint as a machine with a GPU would have written it: its tensors' place is "cuda:0"."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(contents)) as before, zipfile.ZipFile(written, "w") as after:
        for name in before.namelist():
            part = before.read(name)
            if name.endswith("data.pkl"):
                cpu, cuda = (b"X" + struct.pack("<I", len(word)) + word for word in (b"cpu", b"cuda:0"))
                assert cpu in part
                part = part.replace(cpu, cuda)
            after.writestr(name, part)
    return written.getvalue()


@pytest.mark.parametrize("kind", ["as saved", "on a GPU", "half precision", "ordered"])
def test_weights_of_other_origin_load(tmp_path, kind):
    model, path = VQVAE(16, 4), tmp_path / "x.pth"
    state = {key: value.half() if kind == "half precision" else value for key, value in model.state_dict().items()}
    torch.save(
        OrderedDict(state) if kind == "ordered" else state,
        path,
        _use_new_zipfile_serialization=kind != "the old format",
    )
    if kind == "on a GPU":
        path.write_bytes(on_a_gpu(path.read_bytes()))
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="CUDA"):
                torch.load(path, weights_only=True)  # as it is, it wants a GPU
    loaded = runs.load(path, VQVAE.from_state_dict).state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=1e-3 if kind == "half precision" else 0, atol=1e-4)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda value: value * torch.nan, "not finite"),
        (lambda value: value[:-1], "not of the shape"),
        (lambda value: value.to_sparse(), "."),
        (lambda value: value.to(torch.complex64), "complex64"),
        (lambda value: "text", "not of the shape"),
        (lambda value: value.double() * 1e300, "not finite"),
    ],
)
def test_spoilt_weights_are_refused_in_one_line(tmp_path, spoil, said):
    state = VQVAE(16, 4).state_dict()
    state["conv1.weight"] = spoil(state["conv1.weight"])
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(RunError, match=said) as caught:
        runs.load(tmp_path / "x.pth", VQVAE.from_state_dict)
    assert str(caught.value).startswith(f"{tmp_path / 'x.pth'}: ") and "\n" not in str(caught.value)


def test_a_file_is_quoted_on_one_line_and_briefly(tmp_path):
    state = VQVAE(16, 4).state_dict() | {"con\n\x1b[31m" + 5000 * "x": torch.zeros(1)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(RunError, match="more than the weights") as caught:
        runs.load(tmp_path / "x.pth", VQVAE.from_state_dict)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_codebook_that_is_larger_than_its_file_is_refused(tmp_path):
    state = VQVAE(16, 4).state_dict() | {"vector_quantizer.embedding.weight": torch.zeros(1, 1).expand(2**23, 64)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(RunError, match="no VQ-VAE"):
        runs.load(tmp_path / "x.pth", VQVAE.from_state_dict)


@pytest.mark.parametrize("contents", [[1, 2], 7, {"a": 1}, {"vector_quantizer.embedding.weight": 3}])
def test_other_contents_are_refused_in_one_line(tmp_path, contents):
    runs.save(contents, tmp_path / "x.pth")
    with pytest.raises(RunError, match="x.pth: it holds no VQ-VAE"):
        runs.load(tmp_path / "x.pth", VQVAE.from_state_dict)


def test_resuming_what_is_no_run(tmp_path):
    with pytest.raises(RunError, match="no such file or folder"):
        runs.Run.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match="no resume.pth"):
        runs.Run.open(tmp_path)
    row = {"stage": "vqvae", "epoch": 1}
    for contents in (
        [1],
        {"options": {}, "state": {}, "rows": 3},
        {"options": {}, "state": {"vqvae": {}}, "rows": []},
        {"options": {}, "state": {"vqvae": {"epoch": "x"}}, "rows": [row]},
        {"options": {}, "state": {"vqvae": {"epoch": 2}}, "rows": [row]},
        {"options": {}, "state": {"other": {"epoch": 0}}, "rows": []},
        {"options": {}, "state": {"vqvae": {"epoch": 1}}, "rows": [{}]},
    ):
        runs.save(contents, tmp_path / "resume.pth")
        with pytest.raises(RunError, match="resume.pth: does not fit.*start a new run"):
            runs.Run.open(tmp_path)


def test_two_processes_cannot_work_on_one_run(tmp_path):
    first, second = runs.Run(tmp_path, {}), runs.Run(tmp_path, {})
    first._lock()
    with pytest.raises(RunError, match="another process is at work on this run"):
        second._lock()
    os.close(first._folder_handle)
    second._lock()


def test_run_there_and_back(tmp_path):
    rows = [
        {"stage": "vqvae", "epoch": 1, "ssim_mean": 0.123456789012345678},
        {"stage": "gan", "epoch": 1, "d_loss": 2.5},
    ]
    run = runs.Run(tmp_path, {"seed": 3, "data": None}, {"vqvae": {"epoch": 1, "model": {"w": torch.arange(3)}}}, rows)
    run.save()
    again = runs.Run.open(tmp_path)
    assert again.options == run.options and again.rows == rows
    assert torch.equal(again.state["vqvae"]["model"]["w"], torch.arange(3))
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["stage,epoch,ssim_mean,d_loss", f"vqvae,1,{rows[0]['ssim_mean']!r},", "gan,1,,2.5"]


@pytest.mark.parametrize(
    "text", ["[]", '{"data": null}', "{half", '"x"', '{"data": {"folder": 5}}', '{"resumed": {}}', "[" * 100_000]
)
def test_what_is_no_run_json_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match="run.json: .*repair or remove it"):
        runs.read_json(tmp_path / "run.json")


def test_find_looks_here_then_under_gen_imgs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gen_imgs" / "a").mkdir(parents=True)
    assert runs.find("a").resolve() == tmp_path / "gen_imgs" / "a"
    (tmp_path / "a").mkdir()
    assert runs.find("a").resolve() == tmp_path / "a"


def test_derived_seeds_differ_and_repeat():
    seeds = {runs.derived_seed(s, stream, e) for s in range(5) for stream in runs.STREAMS for e in range(50)}
    assert len(seeds) == 5 * len(runs.STREAMS) * 50
    assert runs.derived_seed(1, "gan", 2) == runs.derived_seed(1, "gan", 2)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


def test_unknown_devices_are_named():
    for name in ("gpu", "cuda:99", "cpu:x", "meta", "hpu", "privateuseone", ""):
        with pytest.raises(RunError, match=f"--device {name}"):
            runs.choose_device(name)
    assert runs.choose_device("cpu").type == "cpu" and runs.choose_device("auto").type in ("cpu", "cuda", "mps")


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
    bar = runs.progress(total=4, desc="Reading", unit=" images")
    bar.delay = bar.mininterval = 0
    for _ in range(4):
        bar.update(1)
    bar.close()
    printed = capsys.readouterr().err
    lines = printed.splitlines()
    assert "\r" not in printed and all(line.startswith("Reading: ") for line in lines)
    assert "4/4 images" in lines[-1] and "images/s" in lines[-1]


def test_progress_of_a_short_task_prints_nothing_where_there_is_no_terminal(capsys):
    assert list(runs.progress(range(5), desc="Short")) == list(range(5))
    assert capsys.readouterr().err == ""
