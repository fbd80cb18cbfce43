"""Records, tables, volumes and archives with random changes: each is used, or refused by our own error."""

import contextlib
import gzip
import io
import json
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import CONVERSION, refused, run_program, write_heads
from fuzzing import FEW, FUZZ, bounded, changed, damaged
from hypothesis import given
from hypothesis import strategies as st

from preparation import folder as preparing
from preparation import sources, volumes
from report import page
from support.console import UserError
from support.device import FastPath
from support.run import Run, new_folder
from training.options import Options

SPLITS = ["train", "validate", "test"]
ROW = {"stage": "vqvae", "epoch": 1, "updates": 4, "seconds": 1.0, "ssim_mean": 0.5, "ssim_black": 0.4}


@contextlib.contextmanager
def one_line_at_most():
    """What fails here does so with our own error."""
    try:
        yield
    except UserError as error:
        assert str(error).isprintable()


def json_text(choices, contents) -> bytes:
    """JSON of changed contents, or damaged."""
    contents = choices.draw(changed(contents))
    text = json.dumps(contents).encode()
    return choices.draw(damaged([text])) if choices.draw(st.booleans()) else text


# what a run records of its images
IMAGES = {
    "images": {"train": 15, "validate": 10, "test": 10},
    "content": "phantoms",
    "digests": {"train": "0", "validate": "1"},
}


@pytest.fixture(scope="module")
def run_folder(data, tmp_path_factory) -> Path:
    """The folder of a run after an epoch, with its record and table."""
    out = tmp_path_factory.mktemp("record")
    run = Run(Options(data=str(data), out=str(out)), new_folder(out), {}, [ROW], FastPath("cpu"))
    run.begin(IMAGES | {"folder": str(data), "phantoms": True}, {})
    run.save()
    page.write_run(run.folder)
    assert (run.folder / "index.html").is_file()
    return run.folder


@FEW
@given(choices=st.data())
def test_a_strange_run_json_is_used_or_refused(run_folder, choices, capsys, monkeypatch):
    monkeypatch.setattr("support.run._commit", lambda: "")  # git is a process of its own
    path = run_folder / "run.json"
    original = path.read_bytes()
    try:
        path.write_bytes(json_text(choices, json.loads(original)))
        page.write_run(run_folder)
        run = Run(Options(data="data"), run_folder, {}, [ROW], FastPath("cpu"))
        with one_line_at_most():
            run.begin(IMAGES | {"folder": "data", "phantoms": True}, {})
    finally:
        path.write_bytes(original)
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("\n") <= 1


@FEW
@given(choices=st.data())
def test_a_strange_metrics_csv_costs_a_warning_at_most(run_folder, choices, capsys):
    path = run_folder / "metrics.csv"
    original = path.read_bytes()
    try:
        path.write_bytes(choices.draw(damaged([original])))
        with bounded():
            page.write_run(run_folder)
    finally:
        path.write_bytes(original)
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("\n") <= 1


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> np.ndarray:
    return write_heads(tmp_path_factory.mktemp("head"), 1)


def nifti(voxels: np.ndarray, kind=nib.Nifti1Image) -> bytes:
    return kind(voxels, np.eye(4)).to_bytes()


@st.composite
def strange_header(draw, voxels: np.ndarray) -> bytes:
    """NIfTI with one to three fields of its header changed."""
    kind = draw(st.sampled_from((nib.Nifti1Image, nib.Nifti2Image)))
    content = bytearray(nifti(voxels, kind))
    layout = kind.header_class.template_dtype
    for _ in range(draw(st.integers(1, 3))):
        field = draw(st.sampled_from(layout.names))
        dtype, at = layout.fields[field][:2]
        if dtype.base.kind in "iuf":
            size = dtype.base.itemsize
            number = at + size * draw(st.integers(0, max(dtype.itemsize // size - 1, 0)))
            ordinary = st.sampled_from((0, 1, 2, 3, 4, 5, 16, 24, 25, 64, 256, 512, 1024, 32767, -1, -16))
            value = draw(st.one_of(ordinary, st.floats(width=32)) if dtype.base.kind == "f" else ordinary)
            with np.errstate(all="ignore"):
                content[number : number + size] = np.array(value).astype(dtype.base).tobytes()
        else:
            content[at : at + dtype.itemsize] = draw(st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize))
    return bytes(content)


def try_volume(path: Path, name: str) -> None:
    volume = volumes.Volume(name, "sub-01", 1, 1, path)
    with bounded(), one_line_at_most():
        scan = volumes.read(volume)
        assert scan.voxels.ndim == 3 and scan.voxels.dtype == np.float32
        try:
            images, *_ = volumes.cut(scan.voxels, "axial", 4, 0.8)
            assert images.shape == (4, 256, 256)
        except ValueError as error:
            assert str(error).startswith(("is empty", "has many voxels", "has "))


@FUZZ
@given(choices=st.data())
def test_a_strange_nifti_is_read_or_refused(tmp_path_factory, head, choices):
    path = tmp_path_factory.getbasetemp() / "strange.nii"
    content = choices.draw(st.one_of(strange_header(head), damaged([nifti(head), nifti(head, nib.Nifti2Image)])))
    path.write_bytes(content)
    try_volume(path, path.name)


@FEW
@given(choices=st.data())
def test_a_strange_analyze_pair_is_read_or_refused(tmp_path_factory, head, choices):
    header = nib.AnalyzeHeader(endianness=">")
    header.set_data_dtype(np.int16)
    header.set_data_shape((*head.shape, 1))
    path = tmp_path_factory.getbasetemp() / "strange.hdr"
    path.write_bytes(choices.draw(damaged([header.binaryblock])))
    path.with_suffix(".img").write_bytes(choices.draw(st.sampled_from((head.tobytes(), b"", head.tobytes()[:-1]))))
    try_volume(path, path.name)


@pytest.fixture(scope="module")
def archive(head) -> bytes:
    """A tar as neurite-OASIS has it, with two volumes."""
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as tar:
        for case in (1, 2):
            member = tarfile.TarInfo(f"OASIS_OAS1_{case:04d}_MR1/norm.nii.gz")
            content = gzip.compress(nifti(head), mtime=0)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_an_archive_that_is_not_damaged_is_read(tmp_path, archive, head):
    path = tmp_path / "sound.tar"
    path.write_bytes(archive)
    found = [volumes.read(volume).voxels for volume in sources.find(path)[1]]
    assert len(found) == 2 and all(np.array_equal(voxels, head) for voxels in found)


@FUZZ
@given(choices=st.data())
def test_a_strange_tar_is_read_or_refused(tmp_path_factory, archive, choices):
    path = tmp_path_factory.getbasetemp() / "strange.tar"
    path.write_bytes(choices.draw(damaged([archive])))
    with bounded(), one_line_at_most():
        for volume in sources.find(path)[1]:
            with one_line_at_most():
                volumes.read(volume)


TABLE = "subject,split\r\n" + "".join(f"sub-{i:02d},{SPLITS[i % 3]}\r\n" for i in range(9))


@FUZZ
@given(choices=st.data())
def test_a_strange_table_of_splits_is_used_or_refused(tmp_path_factory, choices):
    path = tmp_path_factory.getbasetemp() / "split.csv"
    text = st.text(alphabet=st.characters(codec="utf-8"), max_size=80).map(str.encode)
    path.write_bytes(choices.draw(st.one_of(damaged([TABLE.encode(), TABLE.encode("utf-16")]), text)))
    found = [volumes.Volume(f"sub-{i:02d}.nii", f"sub-{i:02d}", i + 1, 1, path) for i in range(9)]
    with bounded(), one_line_at_most():
        splits = preparing.split_subjects(found, 0, str(path))
        assert splits.keys() == set(range(1, 10)) and set(splits.values()) <= set(SPLITS)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, Path]:
    """A source of three volumes, and its slices."""
    folder = tmp_path_factory.mktemp("source")
    write_heads(folder)
    done = run_program("preparation.oasis", folder, folder.parent / "slices", *CONVERSION, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, folder.parent / "slices"


@FEW
@given(choices=st.data())
def test_a_conversion_with_a_strange_plan_is_refused_or_complete(converted, choices):
    source, dest = converted
    path = dest / "conversion.json"
    original = path.read_bytes()
    try:
        path.write_bytes(json_text(choices, json.loads(original)))
        done = run_program("preparation.oasis", source, dest, *CONVERSION, "--preview", cwd=source)
        if done.returncode:
            refused(done)
    finally:
        path.write_bytes(original)
