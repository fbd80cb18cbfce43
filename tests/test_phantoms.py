"""Phantoms: repeatable, laid out as OASIS is, and close to real slices in what can be measured."""

import numpy as np
import phantom_statistics
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion, maximum_filter, minimum_filter

from dataset import list_scans
from preparation import phantoms
from support import console
from support.console import UserError

# What benchmarks/phantom_statistics.py prints for the set: of 224 slices, every fifth of the validation split.
REAL = {
    "foreground share": 0.4361,
    "foreground mean": 0.3079,
    "foreground standard deviation": 0.1745,
    "PNG size / bytes": 20507,
    "share of exact zeros": 0.5298,
    "level of white matter": 0.4712,
    "slope of the power spectrum": -3.295,
}
# Standard deviations of differences between pixels one and two apart in a row, over the same 224 slices: in white
# matter, more than 4 pixels from other labels, and in the noise around the head, 5 pixels from values below 2 or
# above 25.
REAL_NOISE = {"white matter": (3.50, 5.00), "background": (1.76, 2.19)}
HEIGHTS = (0, 6, 12, 18, 25, 31)
CORE = np.s_[100:158, 100:165]  # of the image: about the midline, where the ventricles are


@pytest.fixture(scope="module")
def pairs():
    """Slices and label maps (2, 6 subjects, 6 slices, 256, 256) uint8, from low to high."""
    subjects = [[phantoms.make_pair(case, s) for s in HEIGHTS] for case in range(20, 26)]
    return np.moveaxis(np.array(subjects), 2, 0)


def test_repeatable_and_different_by_case_and_slice():
    one = phantoms.make_pair(3, 10)[0]
    assert one.shape == (256, 256) and one.dtype == np.uint8
    assert np.array_equal(one, phantoms.make_pair(3, 10)[0])
    for other in (phantoms.make_pair(4, 10)[0], phantoms.make_pair(3, 11)[0]):
        assert not np.array_equal(one, other)


def test_statistics_of_real_slices(tmp_path):
    phantoms.write(tmp_path, {"train": range(20, 43), "validate": [43]}, slices=5)
    measured = phantom_statistics.statistics(tmp_path, every=1)
    assert measured.pop("slices") == 120
    assert measured == pytest.approx(REAL, rel=0.1)


def test_noise_of_real_slices(pairs):
    differences = {"white matter": [], "background": []}
    for image, labels in zip(*pairs.reshape(2, -1, 256, 256), strict=True):
        inside = binary_erosion(labels == 255, iterations=4)
        around = (maximum_filter(image, 11) < 26) & (minimum_filter(image, 11) > 1)
        for name, mask in (("white matter", inside), ("background", around)):
            if mask.sum() > 100:
                change = [(image[:, k:].astype(float) - image[:, :-k])[mask[:, k:] & mask[:, :-k]] for k in (1, 2)]
                differences[name].append([values.std() for values in change])
    for name, real in REAL_NOISE.items():
        assert len(differences[name]) > 10
        assert np.mean(differences[name], 0) == pytest.approx(real, rel=0.15), name


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
    for kind in ("", "seg_"):
        for split in ("train", "validate"):
            (tmp_path / f"keras_png_slices_{kind}{split}").mkdir()
    values = np.repeat(np.array([0, 51, 153], np.uint8), [32768, 16384, 16384])  # in random order: a flat spectrum
    rng = np.random.default_rng(0)
    sizes = []
    for s in range(60):
        split = "train" if s < 30 else "validate"
        image = rng.permutation(values).reshape(256, 256)
        path = tmp_path / f"keras_png_slices_{split}" / f"case_001_slice_{s}.nii.png"
        Image.fromarray(image).save(path)
        sizes.append(path.stat().st_size)
        if s < 55:  # of the others, nothing is to be read
            labels = np.select([image == 153, image == 51], [255, 170]).astype(np.uint8)
            Image.fromarray(labels).save(tmp_path / f"keras_png_slices_seg_{split}" / f"seg_001_slice_{s}.nii.png")
    measured = list(phantom_statistics.statistics(tmp_path).values())
    assert measured[:6] == pytest.approx([0.5, 0.4, 0.2, np.mean(sizes[:55:5]), 0.5, 0.6])
    assert measured[6] == pytest.approx(0, abs=0.05) and measured[7] == 11


def test_frame(pairs):
    images, labels = pairs
    outside = np.ones((256, 256), bool)
    outside[40:216, 24:232] = False
    assert not images[..., outside].any() and not labels[..., outside].any()
    assert (images.max((-2, -1)) == 255).all()
    corners = images[..., 40:216, 24:232][..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert not corners.any()  # the field of view is an octagon
    beside = images[..., 68:76, 41:45]  # between the head and the edges of the field of view, at the back
    assert (np.median(beside, (-2, -1)) > 4).mean() > 0.8 and np.median(beside) < 20  # noise, not 0
    assert beside.std() > 1


def test_labels_agree_with_the_image(pairs):
    images, labels = pairs.astype(int)
    assert set(np.unique(labels)) == {0, 85, 170, 255}
    for image, labels_here in zip(images.reshape(-1, 256, 256), labels.reshape(-1, 256, 256), strict=True):
        csf, grey, white = (image[labels_here == value].mean() for value in (85, 170, 255))
        assert csf + 20 < grey < white - 20
        assert image[labels_here > 0].max() < 200  # no scalp
        rows, columns = np.nonzero(labels_here)
        assert 52 < rows.min() and rows.max() < 206 and 36 < columns.min() and columns.max() < 220
    shares = [(labels == value).mean() / (labels > 0).mean() for value in (85, 170, 255)]
    assert shares == pytest.approx([0.18, 0.42, 0.39], abs=0.06)  # the set's, as REAL is


def test_scalp_skull_and_brain(pairs):
    images, labels = pairs.astype(float)
    for image, brain in zip(images.reshape(-1, 256, 256), labels.reshape(-1, 256, 256) > 0, strict=True):
        for row in (122, 135):  # from the back inwards, beside the midline
            line, first = image[row], np.flatnonzero(brain[row])[0]
            scalp = line[first - 16 : first].max()
            skull = line[first - 16 + line[first - 16 : first].argmax() : first + 2].min()
            assert scalp > line[brain[row]].mean() * 1.1 and skull < 0.5 * scalp


def test_the_front_of_the_head_is_on_the_right(pairs):
    labels = pairs[1]
    length = np.ptp(np.nonzero(labels.any((0, 1, 2)))[0]), np.ptp(np.nonzero(labels.any((0, 1, 3)))[0])
    assert length[0] > 1.15 * length[1]  # longer from left to right of the image
    front, back = labels[..., 187] > 0, labels[..., 67] > 0  # 60 pixels from the middle of the brain
    assert (front.sum(-1) < back.sum(-1)).all()  # brains are narrower in front
    fluid = labels[:, 1][:, CORE[0]] == 85  # at the height of the front horns, which point to the right
    assert fluid[..., 140:165].any((-2, -1)).all()


def test_ventricles_are_dark_and_change_with_height(pairs):
    images, labels = pairs
    fluid = (labels == 85)[..., 100:158, 85:165]
    for height in (2, 3):
        dark = images[:, height, 100:158, 85:165][fluid[:, height]].mean()
        assert dark < 0.45 * images[:, height][labels[:, height] == 255].mean()
    size = fluid.sum((-2, -1)).mean(0)
    assert size[3] > 1.2 * size[5]  # they close towards the top
    same = [(fluid[:, k] & fluid[:, 3]).sum() / fluid[:, 3].sum() for k in range(6)]
    assert max(same[0], same[5]) < 0.7


def test_slices_of_a_subject_resemble_each_other_more():
    def correlation(a, b):
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    subjects = np.stack([[phantoms.make_pair(case, s)[0] for s in (14, 15)] for case in range(30, 38)])
    within = [correlation(*slices) for slices in subjects]
    between = [correlation(subjects[i, 0], subjects[j, 1]) for i in range(8) for j in range(8) if i != j]
    assert min(within) > max(between)


def test_layout_and_marker(tmp_path):
    phantoms.write(tmp_path, {"train": range(1, 3), "test": range(3, 4)}, slices=3)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert names == sorted(
        f"keras_png_slices_{kind}{split}/{name}_00{case}_slice_{s}.nii.png"
        for kind, name in (("", "case"), ("seg_", "seg"))
        for split, case in (("train", 1), ("train", 2), ("test", 3))
        for s in (0, 16, 31)
    )
    for name, pixels in zip((names[9], names[0]), phantoms.make_pair(3, 0), strict=True):
        image = Image.open(tmp_path / name)
        assert image.mode == "L" and np.array_equal(np.asarray(image), pixels)
    assert [path.name[:8] for path in list_scans(tmp_path, "train")] == ["case_001"] * 3 + ["case_002"] * 3
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
    assert len(list(tmp_path.rglob("*.png"))) == 4  # with label maps
    assert phantoms.are_in(tmp_path) and not phantoms.is_complete(tmp_path)


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
