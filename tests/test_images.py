"""Any images become slices: subjects, splits, grey values, fitting, and calls that were interrupted."""

import csv
import re
import shutil

import numpy as np
import pytest
from conftest import refused, run_program
from PIL import Image

from dataset import OasisDataset, refuse_shared_cases
from preparation import folder as preparing
from preparation import images


def save(folder, names, value=lambda i: 60 + i, size=(256, 256)):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.full(size, value(i), np.uint8)
        values[0, 0] = 255
        Image.fromarray(values).save(path)


def convert(folder, *words):
    return run_program("preparation.images", "in", "out", *words, cwd=folder)


def rows(folder) -> list[dict[str, str]]:
    with open(folder / "out" / "subjects.csv", newline="") as file:
        return list(csv.DictReader(file))


NAMES = [f"sub-{subject}_slice_{s}.png" for subject in range(1, 11) for s in range(3)]


def test_slices_of_subjects_become_the_three_folders(tmp_path):
    save(tmp_path / "in", [*NAMES, "masks/sub-1_slice_0.png", "sub-1_slice_0_mask.png", ".hidden/a_1_1.png"])
    (tmp_path / "in" / "notes.txt").write_text("")
    (tmp_path / "in" / "sub-1_slice_0.png").rename(tmp_path / "sub-1_slice_0.png")
    (tmp_path / "in" / "sub-1_slice_0.png").symlink_to(tmp_path / "sub-1_slice_0.png")
    done = convert(tmp_path, "--preview")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Subjects: the name without its last number (sub-1 of sub-1_slice_0.png, ")
    assert "30 images of 10 subjects, split drawn: 8 train, 1 validate, 1 test" in done.stdout
    assert "Passed over: 3 files" in done.stdout and (tmp_path / "out" / "preview.png").exists()
    refuse_shared_cases(tmp_path / "out")
    where = {row["source"]: row for row in rows(tmp_path)}
    assert len({row["subject"] for row in where.values()}) == 10
    for split, n in (("train", 24), ("validate", 3), ("test", 3)):
        dataset = OasisDataset(tmp_path / "out", split)
        assert len(dataset) == n
    for i, name in enumerate(NAMES):
        written = np.asarray(Image.open(tmp_path / "out" / where[name]["file"]))
        assert written.shape == (256, 256) and written[3, 3] == 60 + i  # pixels are unchanged
    assert [int(re.search(r"slice_(\d+)", where[name]["file"])[1]) for name in NAMES[:3]] == [0, 1, 2]


@pytest.mark.parametrize(
    "names, words, rule",
    [
        ([f"{s:02d}/im_{i}.png" for s in range(6) for i in range(2)], (), "the outermost folder with a number"),
        ([f"{kind}/P{s}-{i}.png" for s in range(6) for i, kind in enumerate("ab")], (), "the name without its last"),
        ([f"{i}.png" for i in range(6)], (), "none: each image is one of its own"),
        ([f"img_{i:04d}.png" for i in range(20)], (), "none: each image is one of its own"),
        ([f"{kind}/{i}.png" for i in range(6) for kind in ("yes", "no")], (), "none: each image is one of its own"),
        ([f"x{i}_y{i % 4}.png" for i in range(12)], ("--group", r"y(\d)"), "--group y("),
    ],
)
def test_how_subjects_are_told_apart_is_said(names, words, rule, tmp_path):
    save(tmp_path / "in", names)
    done = convert(tmp_path, "--dry-run", *words)
    assert done.returncode == 0 and f"Subjects: {rule}" in done.stdout, done
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["s{}_{}", "s{}_{:03d}", "case_{:03d}_slice_{}", "P{}-im{:02d}x"])
def test_the_last_number_is_taken_off_with_all_its_digits(form):
    names = [form.format(subject, i) + ".png" for subject in (1, 2, 12) for i in range(120)]
    _, subjects = images.subjects_of(names, None)
    assert [subjects[i : i + 120] == [subjects[i]] * 120 for i in (0, 120, 240)] == [True] * 3
    assert len(set(subjects)) == 3


def test_no_group_is_ever_in_two_splits():
    """1,000 random layouts of names."""
    draw = np.random.default_rng(0)
    patterns = [
        "s{0}_{1}.png",
        "{0}/{1}.png",
        "a{2}/s{0}-x{1}.jpg",
        "{2}/{0}/slice{1}.png",
        "P{0}T{1}.tif",
        "im{3}.png",
    ]
    for _ in range(1000):
        pattern, n_subjects, n = patterns[draw.integers(6)], draw.integers(3, 14), draw.integers(1, 14)
        names = [pattern.format(s, i, draw.integers(2), 10 * s + i) for s in range(n_subjects) for i in range(n)]
        names = sorted(set(names))
        _, subjects = images.subjects_of(names, None)
        numbers = {subject: i for i, subject in enumerate(dict.fromkeys(subjects), 1)}
        items = [images.Item(name, s, numbers[s], None) for name, s in zip(names, subjects, strict=True)]
        if len(numbers) < 3:
            continue
        splits = preparing.split_subjects(items, int(draw.integers(100)))
        if pattern.startswith(("s{0}", "{0}/", "{2}/{0}", "P{0}")):  # these say who is who
            for subject in range(n_subjects):
                mine = {splits[item.case] for item in items if re.search(rf"(^|[sP/]){subject}[_/T]", item.name)}
                assert len(mine) == 1, (pattern, items)


def test_deep_values_are_scaled_by_the_sets_own_maximum(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(6):
        values = np.full((256, 256), 1000 + i, np.uint16)
        values[0, 0] = 4095 if i == 3 else 0
        Image.fromarray(values).save(tmp_path / "in" / f"{i}.tif")
    done = convert(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 images have more than 8 bits; their greatest value, 4095, becomes 255" in done.stdout
    by_source = {row["source"]: tmp_path / "out" / row["file"] for row in rows(tmp_path)}
    assert np.asarray(Image.open(by_source["3.tif"]))[0, 0] == 255
    assert np.asarray(Image.open(by_source["5.tif"]))[9, 9] == round(1005 * 255 / 4095)


def test_an_npz_of_medmnist_keeps_its_splits(tmp_path):
    arrays = {f"{key}_images": np.full((n, 28, 28), n, np.uint8) for key, n in (("train", 5), ("val", 3), ("test", 2))}
    np.savez(tmp_path / "in", **arrays)
    done = run_program("preparation.images", "in.npz", "out", "--fit", "resize", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for split, n in (("train", 5), ("validate", 3), ("test", 2)):
        dataset = OasisDataset(tmp_path / "out", split)
        assert len(dataset) == n and (dataset.images == n).all()
    np.savez(tmp_path / "volumes", **{key: np.zeros((2, 28, 28, 28), np.uint8) for key in arrays})
    refused(run_program("preparation.images", "volumes.npz", "other", cwd=tmp_path), "volumes.npz", "(N, H, W)")


def test_folders_named_as_splits_are_the_splits(tmp_path):
    save(tmp_path / "in", [f"{split}/s{i}_0.png" for i, split in enumerate(("train", "train", "val", "test"))])
    assert convert(tmp_path).returncode == 0
    assert [row["split"] for row in sorted(rows(tmp_path), key=lambda row: row["source"])] == [
        "test",
        "train",
        "train",
        "validate",
    ]
    save(tmp_path / "in", ["other/s9_1.png"])
    shutil.rmtree(tmp_path / "out")
    refused(convert(tmp_path), "not all images are in train, val or test")
    (tmp_path / "in" / "other" / "s9_1.png").unlink()
    assert convert(tmp_path).returncode == 0
    save(tmp_path / "in", ["test/s0_7.png"])
    shutil.rmtree(tmp_path / "out")
    refused(convert(tmp_path), "subject s0 is in two splits", "--group")


def test_pictures_are_fitted_to_the_square():
    ramp = np.tile(np.arange(200.0), (100, 1))
    padded = images.fitted(ramp, 256, "pad")
    assert padded.shape == (256, 256) and np.array_equal(padded[78:178, 28:228], ramp) and padded.sum() == ramp.sum()
    reduced = images.fitted(np.full((512, 300), 9.0), 256, "pad")
    assert (reduced[:, 53:203] == 9).all() and (reduced > 0).sum() == 256 * 150
    cropped = images.fitted(ramp, 128, "crop")
    assert (cropped[64:192, 64:192] > 0).all() and (cropped > 0).sum() == 128 * 128
    assert cropped[128, 128] == pytest.approx(100, abs=1)  # the middle stays in the middle
    assert (images.fitted(np.full((30, 50), 7.0), 256, "resize") == 7).all()


def test_an_interrupted_call_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    save(tmp_path / "in", NAMES)
    assert run_program("preparation.images", "in", "whole", cwd=tmp_path).returncode == 0
    real, written = images.fitted, []

    def failing(*words):
        written.append(words)
        if len(written) > 12:
            raise OSError(28, "No space left on device")
        return real(*words)

    monkeypatch.setattr(images, "fitted", failing)
    refused(convert(tmp_path), "No space left on device")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.unfinished").is_dir()
    monkeypatch.setattr(images, "fitted", real)
    refused(convert(tmp_path, "--fit", "crop"), "out.unfinished", "begun with other options")
    done = convert(tmp_path)
    assert done.returncode == 0, done.stderr
    files = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*.*")} for d in (tmp_path / "whole", tmp_path / "out")]
    assert files[0] == files[1] and len(files[0]) == len(NAMES) + 2
    assert convert(tmp_path).returncode == 0  # complete already
    refused(convert(tmp_path, "--fit", "crop"), "out: was made", "name another DEST")


def test_folders_are_followed_where_links_lead_and_exif_turns(tmp_path):
    save(tmp_path / "elsewhere", NAMES)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    assert "30 images of 10 subjects" in convert(tmp_path, "--dry-run").stdout
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(images.read(tmp_path / "turned.png"), values[::-1, ::-1])


def test_a_folder_on_which_a_disk_is_mounted_is_refused_before_any_work(tmp_path, monkeypatch):
    save(tmp_path / "in", NAMES)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    refused(convert(tmp_path), "out: a disk is mounted there")
    assert not (tmp_path / "out.unfinished").exists()


def save_alpha(folder) -> None:
    save(folder / "in", NAMES)
    alpha = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(256, 0))
    Image.merge("LA", [Image.new("L", (256, 256)), alpha]).save(folder / "in" / "z_1_1.png")


@pytest.mark.parametrize(
    "make, words",
    [
        (save_alpha, ("z_1_1.png", "in the alpha channel alone")),
        (lambda folder: None, ("in", "is no folder")),
        (lambda folder: (folder / "in").mkdir(), ("in", "holds no PNG")),
        (lambda folder: save(folder / "in", ["a.png", "b.png"]), ("2 subjects cannot be split",)),
        (lambda folder: [save(folder / "in", NAMES), (folder / "in" / "z_1_1.png").write_bytes(b"x")], ("z_1_1.png",)),
    ],
)
def test_what_cannot_be_used_is_one_line(make, words, tmp_path):
    make(tmp_path)
    refused(convert(tmp_path), *words)
