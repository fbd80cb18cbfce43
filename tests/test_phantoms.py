"""Phantoms: repeatable, laid out as OASIS is, and close to real slices in what can be measured."""

import io

import numpy as np
import phantom_statistics
import pytest
from PIL import Image

from preparation import phantoms
from support import console
from support.console import UserError

# Measured on 608 slices, every fourth, of the training split of the real OASIS-1 slices; docs/method.md says how.
REAL = {"foreground share": 0.276, "foreground mean": 0.565, "foreground spread": 0.242, "PNG bytes": 15079}
REAL_SLOPE = -3.39  # of log power against log frequency, 4 to 100 cycles an image


@pytest.fixture(scope="module")
def subjects():
    """(6 subjects, 8 slices, 256, 256) uint8, from low to high."""
    return np.stack([[phantoms.make_slice(case, s) for s in range(0, 32, 4)] for case in range(20, 26)])


def test_repeatable_and_different_by_seed_case_and_slice():
    one = phantoms.make_slice(3, 10)
    assert one.shape == (256, 256) and one.dtype == np.uint8
    assert np.array_equal(one, phantoms.make_slice(3, 10))
    for other in (phantoms.make_slice(4, 10), phantoms.make_slice(3, 11), phantoms.make_slice(3, 10, seed=1)):
        assert not np.array_equal(one, other)


def test_statistics_of_real_slices(subjects):
    images = subjects.reshape(-1, 256, 256) / 255
    found = {key: [] for key in REAL}
    power = 0
    for image in images:
        foreground = image[image > 0.04]
        file = io.BytesIO()
        Image.fromarray((image * 255).astype(np.uint8)).save(file, format="PNG")
        values = (foreground.size / image.size, foreground.mean(), foreground.std(), file.getbuffer().nbytes)
        for key, value in zip(REAL, values, strict=True):
            found[key].append(value)
        power = power + np.abs(np.fft.fft2(image)) ** 2
    for key, real in REAL.items():
        assert np.mean(found[key]) == pytest.approx(real, rel=0.15), key
    frequency = np.fft.fftfreq(256, 1 / 256)
    radius = np.hypot(*np.meshgrid(frequency, frequency)).round().astype(int).ravel()
    radial = np.bincount(radius, power.ravel()) / np.bincount(radius)
    band = np.arange(4, 101)
    assert np.polyfit(np.log(band), np.log(radial[band]), 1)[0] == pytest.approx(REAL_SLOPE, rel=0.15)


def test_other_slices_are_not_written_over(tmp_path):
    scan = tmp_path / "keras_png_slices_train" / "case_001_slice_0.nii.png"
    scan.parent.mkdir()
    scan.write_bytes(b"a real scan")
    with pytest.raises(UserError, match="holds other slices"):
        phantoms.write(tmp_path, {"train": [1]}, 1)
    assert scan.read_bytes() == b"a real scan" and not (tmp_path / phantoms.MARKER).exists()
    (tmp_path / phantoms.MARKER).write_bytes(b"\xff")
    assert not phantoms.is_complete(tmp_path)


def test_statistics_of_a_known_folder(tmp_path):
    folder = tmp_path / "keras_png_slices_train"
    folder.mkdir()
    values = np.repeat(np.array([0, 51, 153], np.uint8), [32768, 16384, 16384])  # in random order: a flat spectrum
    rng = np.random.default_rng(0)
    for s in range(60):
        Image.fromarray(rng.permutation(values).reshape(256, 256)).save(folder / f"case_001_slice_{s}.nii.png")
    size = np.mean([path.stat().st_size for path in sorted(folder.iterdir())[::4]])
    found = list(phantom_statistics.statistics(tmp_path).values())
    assert found[:4] == pytest.approx([0.5, 0.4, 0.2, size])
    assert found[4] == pytest.approx(0, abs=0.05)


def test_anatomy(subjects):
    images = subjects / 255.0
    corners = images[..., [0, 0, 255, 255], [0, 255, 0, 255]]
    assert not corners.any()  # black around the head
    middle = images[:, 3:6]  # where the ventricles are largest
    ventricles = middle[..., 100:150, 110:146].min((-2, -1))
    white = np.percentile(middle[..., 60:200, 70:190], 90, (-2, -1))
    assert (ventricles < 0.3).all() and (white > 0.7).all()
    top, bottom = images[:, -1, 90:165, 115:141], images[:, 4, 90:165, 115:141]
    assert ((top < 0.3).mean((-2, -1)) < (bottom < 0.3).mean((-2, -1))).all()  # ventricles close towards the top


def test_slices_of_a_subject_resemble_each_other_more(subjects):
    def correlation(a, b):
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    n, heights = subjects.shape[:2]
    within = [correlation(subjects[i, h], subjects[i, h + 1]) for i in range(n) for h in range(heights - 1)]
    between = [correlation(subjects[i, h], subjects[j, h]) for i in range(n) for j in range(i) for h in range(heights)]
    assert np.mean(within) > np.mean(between) + 0.02


def test_layout_and_marker(tmp_path):
    phantoms.write(tmp_path, {"train": range(1, 3), "test": range(3, 4)}, slices=3)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert names == [
        "keras_png_slices_test/case_003_slice_0.nii.png",
        "keras_png_slices_test/case_003_slice_16.nii.png",
        "keras_png_slices_test/case_003_slice_31.nii.png",
        *(f"keras_png_slices_train/case_00{case}_slice_{s}.nii.png" for case in (1, 2) for s in (0, 16, 31)),
    ]
    image = Image.open(tmp_path / names[0])
    assert image.mode == "L" and np.array_equal(np.asarray(image), phantoms.make_slice(3, 0))
    assert phantoms.is_complete(tmp_path) and phantoms.are_in(tmp_path)
    assert not phantoms.is_complete(tmp_path / "keras_png_slices_test")
    assert not phantoms.are_in(tmp_path / "keras_png_slices_test")


def test_phantoms_are_marked_from_the_first_file_on(tmp_path, monkeypatch):
    def interrupted(items, **_):
        yield items[0]
        yield items[1]
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        phantoms.write(tmp_path, {"train": range(1, 2)})
    assert len(list(tmp_path.rglob("*.png"))) == 2
    assert phantoms.are_in(tmp_path) and not phantoms.is_complete(tmp_path)


def test_the_demo_has_enough_images():
    sizes = {split: len(cases) * phantoms.SLICES for split, cases in phantoms.CASES.items()}
    assert sizes["train"] >= 256 and min(sizes.values()) >= 32
    cases = [case for numbers in phantoms.CASES.values() for case in numbers]
    assert len(cases) == len(set(cases))  # no subject in two splits


def test_slice_number_out_of_range():
    with pytest.raises(ValueError, match="0 to 31"):
        phantoms.make_slice(1, 32)


def test_demo_data_is_written_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(phantoms, "write", calls.append)
    phantoms.write_demo()
    (tmp_path / "phantoms").mkdir()
    marker = tmp_path / "phantoms" / phantoms.MARKER
    marker.write_text("Synthetic slices; the writing was interrupted here")
    phantoms.write_demo()
    assert len(calls) == 2
    marker.write_text(phantoms.COMPLETE)
    phantoms.write_demo()
    assert len(calls) == 2


def test_demo_data_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phantoms").touch()
    with pytest.raises(UserError, match="phantoms: cannot write"):
        phantoms.write_demo()
