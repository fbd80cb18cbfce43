"""`python -m evaluation`: what it refuses, and copies that were planted."""

import csv
import shutil

import numpy as np
import pytest
from conftest import run_program
from PIL import Image

REAL, FAKE, TRAIN = "keras_png_slices_validate", "keras_png_slices_test", "keras_png_slices_train"


@pytest.fixture
def folders(data, tmp_path):
    """Copies of a real, a fake and a training folder."""
    for name in (REAL, FAKE, TRAIN):
        shutil.copytree(data / name, tmp_path / name)
    return tmp_path


def test_planted_copies_are_found_and_the_page_shows_them(folders):
    scan = next((folders / TRAIN).iterdir())
    pixels = np.asarray(Image.open(scan))
    Image.fromarray(np.roll(pixels, (1, -2), (0, 1))).save(folders / FAKE / "z_copy.png")
    done = run_program("evaluation", REAL, FAKE, "--train", TRAIN, cwd=folders)
    assert done.returncode == 0, done.stderr
    (folder,) = (folders / "gen_imgs").iterdir()
    with open(folder / "nearest.csv", newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["image"] == "z_copy.png"]
    assert row["training image"] == scan.name and row["near"] == "1" and float(row["distance"]) < 0.02
    assert (row["rows"], row["columns"], float(row["brightness"])) == ("1", "-2", pytest.approx(1, abs=1e-4))
    assert "need 30 images a side" in done.stdout and "nan" not in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Near a training image: ")]
    text = (folder / "index.html").read_text()
    assert line in text and "arXiv 2002.09797" in text and "nearest.png" in text and "REAL" in text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f / FAKE), f"{FAKE}: no such folder"),
        (lambda f: Image.new("L", (64, 64)).save(f / FAKE / "a.png"), "64x64 pixels"),
        (lambda f: Image.new("RGB", (256, 256), "red").save(f / FAKE / "a.png"), "is in colour"),
        (lambda f: shutil.copy(next((f / REAL).iterdir()), f / FAKE / "same.png"), "same.png: has the pixels of"),
        (lambda f: shutil.copy(next((f / FAKE).iterdir()), f / TRAIN / "case_004_slice_0.png"), "case 4 is also in"),
        (lambda f: [path.rename(f / path.name) for path in (f / FAKE).iterdir()], "holds no .png files"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(folders, spoil, message):
    spoil(folders)
    done = run_program("evaluation", REAL, FAKE, "--train", TRAIN, cwd=folders)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (folders / "gen_imgs").exists()
