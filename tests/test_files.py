"""Files that are never torn, and checkpoints loaded with care."""

import fcntl
import os
import resource
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modules import VQVAE
from priors.checkpoints import load_vqvae
from support import files
from support.console import UserError
from support.run import restoring


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as where a quota is reached
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            files.save(VQVAE().state_dict(), tmp_path / "vqvae.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "vqvae.pth") and not list(tmp_path.iterdir())


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
    with pytest.raises(UserError) as caught:
        load_vqvae(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["as saved", "on a GPU", "half precision", "ordered"])
def test_weights_of_other_origin_load(tmp_path, kind, monkeypatch):
    model, path = VQVAE(16, 4), tmp_path / "x.pth"
    state = {key: value.half() if kind == "half precision" else value for key, value in model.state_dict().items()}
    with monkeypatch.context() as patch:
        if kind == "on a GPU":
            patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(OrderedDict(state) if kind == "ordered" else state, path)
    if kind == "on a GPU":
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="CUDA"):
                torch.load(path, weights_only=True)  # as it is, it wants a GPU
    loaded = load_vqvae(path).state_dict()
    tolerance = 1e-3 if kind == "half precision" else 0
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=tolerance, atol=tolerance)


def change(state: dict, change: Callable[[Tensor], object]) -> None:
    state["conv1.weight"] = change(state["conv1.weight"])


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda state: state.pop("conv1.bias"), "Missing key.*conv1.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "Unexpected key"),
        (lambda state: state.pop("vector_quantizer.embedding.weight"), "no codebook"),
        (lambda state: state.update({"vector_quantizer.embedding.weight": torch.zeros(0, 64)}), "no codebook"),
        (lambda state: state["conv1.weight"].mul_(torch.nan), "not finite"),
        (lambda state: change(state, lambda value: value[:-1]), "size mismatch for conv1.weight"),
        (lambda state: change(state, Tensor.to_sparse), "copying the parameter"),
        (lambda state: change(state, Tensor.int), "is torch.int32, not torch.float32"),
        (lambda state: change(state, str), "expected torch.Tensor"),
        (lambda state: change(state, lambda value: value.double() * 1e300), "not finite"),
    ],
)
def test_spoilt_weights_are_refused_in_one_line(tmp_path, spoil, said):
    state = VQVAE(16, 4).state_dict()
    spoil(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=said) as caught:
        load_vqvae(tmp_path / "x.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'x.pth'}: ") and "\n" not in str(caught.value)


def test_a_file_is_quoted_on_one_line_and_briefly(tmp_path):
    state = VQVAE(16, 4).state_dict() | {"con\n\x1b[31m" + 5000 * "x": torch.zeros(1)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match="Unexpected key") as caught:
        load_vqvae(tmp_path / "x.pth")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_what_does_not_fit_into_memory_is_not_called_damaged(tmp_path, monkeypatch, error):
    def fail(*words, **settings):
        raise error

    files.save([1], tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth: does not fit into memory"):
        files.load(tmp_path / "x.pth", fail)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match="x.pth: does not fit into memory"):
        files.load(tmp_path / "x.pth")
    with pytest.raises(type(error)), restoring(tmp_path):
        fail()


@pytest.mark.parametrize("contents", [[1, 2], 7, {"a": 1}, {"vector_quantizer.embedding.weight": 3}])
def test_other_contents_are_refused_in_one_line(tmp_path, contents):
    files.save(contents, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth: it holds no VQ-VAE"):
        load_vqvae(tmp_path / "x.pth")


def test_find_looks_here_then_under_gen_imgs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gen_imgs" / "a").mkdir(parents=True)
    assert files.find("a").resolve() == tmp_path / "gen_imgs" / "a"
    (tmp_path / "a").mkdir()
    assert files.find("a").resolve() == tmp_path / "a"


def test_what_is_flushed_is_open_for_writing(tmp_path, monkeypatch):
    """Windows cannot flush a file that is open for reading."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE))
    files.write_json(tmp_path / "a.json", {"b": 1})
    assert flushed == [os.O_RDWR] and files.read_json(tmp_path / "a.json") == {"b": 1}


def test_a_system_without_locks_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "fcntl", None)
    with files.locked(tmp_path):
        pass
    assert capsys.readouterr().err == f"{tmp_path}: this system has no locks; let no other process write there\n"
