"""Volumes as they are handed out -> slices: each source's layout, orientations, formats, damage, interruptions."""

import csv
import gzip
import io
import itertools
import json
import os
import shutil
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import refused, run_program
from fuzzing import bounded
from PIL import Image

from dataset import OasisDataset
from preparation import folder, oasis, phantoms, sources, volumes
from support import console, files
from support.console import UserError
from support.files import read_json

FEW = ("--slices", 4, "--least-brain", 0.8, "--workers", 2)
LOW = ("--first-plane", 7)  # of volumes that have few
RAS = np.eye(4)
LAS = np.diag([-1.0, 1, 1, 1])


@pytest.fixture(scope="module")
def heads() -> list[np.ndarray]:
    """Three phantoms as volumes (x, y, z) in RAS, int16 of another unit than the slices."""
    found = []
    for case in (1, 2, 3):
        slices = np.repeat([phantoms.make_pair(case, s)[0] for s in range(0, 32, 4)], 3, axis=0)  # (z, row, column)
        volume = slices[:, 40:216, 24:232].astype(np.int16).transpose(1, 2, 0) * 9
        found.append(np.pad(volume, ((0, 0), (0, 0), (6, 6))))
    return found


def volume(path: Path, name: str = "") -> volumes.Volume:
    return volumes.Volume(name or path.name, "sub-01", 1, 1, path)


def slices_of(path: Path) -> np.ndarray:
    return volumes.cut(volumes.read(volume(path)).voxels, "axial", 4, 0.8)[0]


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray = RAS, **header) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def write_analyze(path: Path, voxels: np.ndarray) -> Path:
    """A pair as OASIS-1's discs have them: big-endian, LAS, a fourth axis."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = nib.AnalyzeHeader(endianness=">")
    header.set_data_dtype(np.int16)
    header.set_data_shape((*voxels.shape, 1))
    path.with_suffix(".hdr").write_bytes(header.binaryblock)
    path.with_suffix(".img").write_bytes(voxels[::-1].astype(">i2").tobytes(order="F"))
    return path.with_suffix(".hdr")


def disc(case: int, session: int = 1, n: int = 4) -> Path:
    subject = f"OAS1_{case:04d}_MR{session}"
    return Path(f"disc1/{subject}/PROCESSED/MPRAGE/T88_111/{subject}_mpr_n{n}_anon_111_t88_gfc")


def convert(source: Path, dest: Path, *words):
    return run_program("preparation.oasis", source, dest, *FEW, *words, cwd=dest.parent)


def pixels(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def nifti_source(heads, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nifti")
    for i, head in enumerate(heads, 1):
        write_nifti(folder / f"sub-{i:02d}.nii.gz", head)
    return folder


@pytest.fixture(scope="module")
def converted(nifti_source, tmp_path_factory) -> Path:
    dest = tmp_path_factory.mktemp("converted") / "slices"
    done = convert(nifti_source, dest)
    assert done.returncode == 0, done.stderr
    return dest


def test_all_orientations_and_formats_give_the_same_slices(heads, tmp_path):
    head = heads[0]
    expected = slices_of(write_nifti(tmp_path / "ras.nii", head))
    turns = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
    assert len(turns) == 48
    for order, flips in turns:
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for axis, (old, flip) in enumerate(zip(order, flips, strict=True)):
            affine[old, axis] = flip
        turned = head.transpose(order)[tuple(slice(None, None, flip) for flip in flips)]
        assert np.array_equal(slices_of(write_nifti(tmp_path / "turned.nii", turned, affine)), expected), (order, flips)
    swapped = nib.Nifti1Image(head, RAS, nib.Nifti1Header(endianness=">"))
    scaled = nib.Nifti1Image(head, RAS)
    scaled.header.set_slope_inter(0.5, 8)
    for name, image in (
        ("big.nii", swapped),
        ("float.nii", nib.Nifti1Image(head.astype(np.float64), RAS)),
        ("fourth.nii.gz", nib.Nifti1Image(head[..., None], RAS)),
        ("second.nii", nib.Nifti2Image(head, RAS)),
    ):
        nib.save(image, tmp_path / name)
        assert np.array_equal(slices_of(tmp_path / name), expected), name
    data = bytearray(nib.Nifti1Image(head, RAS).to_bytes())
    data[112:120] = np.array([0.5, 8], "<f4").tobytes()  # scl_slope, scl_inter
    (tmp_path / "scaled.nii").write_bytes(data)
    assert volumes.read(volume(tmp_path / "scaled.nii")).voxels.min() == 8
    assert np.array_equal(slices_of(tmp_path / "scaled.nii"), expected)
    assert np.array_equal(slices_of(write_analyze(tmp_path / "analyze", head)), expected)


def test_slices_are_cut_as_a_plain_loop_would(heads):
    head = heads[1].astype(np.float32)
    images, positions = volumes.cut(head, "axial", 4, 0.8)
    brain = head > 0.02 * np.quantile(head[head > 0], 0.995)
    enough = [z for z in range(head.shape[2]) if brain[:, :, z].sum() >= 0.8 * brain.sum((0, 1)).max()]
    before, after = positions[0] - enough[0], enough[-1] - positions[-1]
    assert positions == list(range(positions[0], positions[0] + 4)) and 0 <= after - before <= 1
    highest = volumes.cut(head, "axial", 4, 0.8, highest=True)[1]
    assert highest == list(range(enough[-1] - 3, enough[-1] + 1)) != positions
    x, y = (np.flatnonzero(brain[:, :, enough[0] : enough[-1] + 1].any(axes)) for axes in ((1, 2), (0, 2)))
    middle_x, middle_y = (x[0] + x[-1] + 1) // 2, (y[0] + y[-1] + 1) // 2
    for row, column, i in itertools.product(range(0, 256, 5), range(0, 256, 5), range(4)):
        at = middle_x - 128 + row, middle_y - 128 + column  # the patient's left is at the top, the front on the right
        inside = all(0 <= a < n for a, n in zip(at, head.shape, strict=False))
        value = head[(*at, positions[i])] / head[:, :, positions[i]].max() if inside else 0
        assert images[i, row, column] == pytest.approx(value * 255, abs=0.51)


def test_of_a_freesurfer_subject_the_first_choice_is_taken_and_read_as_nifti_is(heads, tmp_path):
    for i, head in enumerate(heads, 1):
        for name in ("T1", "norm", "aseg", "orig", "wm"):
            path = tmp_path / "source" / f"person{i}" / "mri" / f"{name}.mgz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.MGHImage(head.astype(np.int16), RAS), path)
    kind, found, others = sources.find(tmp_path / "source")
    assert [volume.name for volume in found] == [f"person{i}/mri/T1.mgz" for i in (1, 2, 3)]
    assert [volume.subject for volume in found] == ["person1", "person2", "person3"] and len(others) == 12
    expected = slices_of(write_nifti(tmp_path / "same.nii", heads[0]))
    assert np.array_equal(volumes.cut(volumes.read(found[0]).voxels, "axial", 4, 0.8)[0], expected)
    plain = tmp_path / "same.mgh"
    nib.save(nib.MGHImage(heads[0].astype(np.int16), RAS), plain)
    assert np.array_equal(slices_of(plain), expected)
    whole = found[0].file.read_bytes()
    found[0].file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(volumes.VolumeError, match="ends early"):
        volumes.read(found[0])


def test_a_label_map_that_no_name_tells_is_refused_by_its_values(heads, tmp_path):
    for name, values in (("mask", heads[0] > 300), ("labels", heads[0] // 300)):
        path = write_nifti(tmp_path / f"{name}1.nii.gz", values.astype(np.int16))
        with pytest.raises(volumes.VolumeError, match=r"has \d+ different values, as label maps and masks"):
            volumes.read(volume(path))
        assert volumes.read(volume(path), labels=True).voxels.max() == values.max()


@pytest.mark.parametrize("plane, top", [("axial", 0), ("coronal", 0), ("sagittal", 128)])
def test_rows_and_columns_are_the_axes_in_their_order(plane, top):
    head = np.zeros((60, 60, 60), np.float32)
    head[5:55, 5:55, 5:55] = 1
    head[8:20, 40:52, 40:52] = 2  # left, front, top
    images, _ = volumes.cut(head, plane, 50, 0.5)
    bright = np.argwhere((images[(images == 128).any((1, 2))] == 255).any(0))  # in planes that it crosses
    assert len(bright) and all(top <= y < top + 128 and x >= 128 for y, x in bright)


def test_around_a_volume_is_its_own_background(heads):
    """As of CT, whose background is far below 0."""
    head = heads[0].astype(np.float32)
    assert np.array_equal(volumes.cut(head - 1000, "axial", 4, 0.8)[0], volumes.cut(head, "axial", 4, 0.8)[0])


def test_other_voxel_sizes_are_resampled_to_1_mm(tmp_path):
    z, y, x = np.ogrid[-40:40, -40:40, -40:40]
    ball = (1000 * np.clip(30 - np.sqrt(x * x + y * y + z * z), 0, 1)).astype(np.float32)
    affine = np.diag([2.0, 1, 0.5, 1])
    scan = volumes.read(volume(write_nifti(tmp_path / "a.nii", ball, affine)))
    widths = [len(np.flatnonzero((scan.voxels > 500).any(axes))) for axes in ((1, 2), (0, 2), (0, 1))]
    assert widths == pytest.approx([118, 59, 29.5], abs=1.5)
    ramp = np.broadcast_to(100 + 10 * np.arange(120, dtype=np.float32)[:, None, None], (120, 40, 40))
    image = nib.Nifti1Image(ramp, np.diag([2.0, 2, 2, 1]))
    image.header["pixdim"][1:4] = 1  # which the affine contradicts
    nib.save(image, tmp_path / "ramp.nii")
    scan = volumes.read(volume(tmp_path / "ramp.nii"))
    assert np.allclose(scan.voxels[:238, 40, 40], 100 + 5 * np.arange(238), atol=1e-3)  # linear between voxels


@pytest.mark.parametrize("size", [1.0, 0.98, 2.0])
def test_an_oblique_grid_is_cut_along_its_own_axes_whatever_its_voxels(heads, tmp_path, size):
    turn = np.radians(20)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    straight, oblique = np.eye(4), np.eye(4)
    straight[:3, :3], oblique[:3, :3] = size * np.eye(3), size * rotation
    head = heads[0][::2, ::2, ::2].astype(np.float32)
    straight, oblique = (
        volumes.read(volume(write_nifti(tmp_path / f"{i}.nii", head, affine))).voxels
        for i, affine in enumerate((straight, oblique))
    )
    assert straight.shape == oblique.shape
    inside = (slice(2, -2),) * 3  # at the border, rounding decides whether a position is outside
    np.testing.assert_allclose(straight[inside], oblique[inside], atol=0.01 * head.max())


def touch(folder: Path, *names) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_sources_are_told_apart_by_their_names(tmp_path):
    parts = ("norm", "orig", "aligned_norm", "aligned_orig", "seg4", "slice_norm")
    names = [f"neurite/OASIS_OAS1_{n}_MR1/{part}.nii.gz" for n in ("0002", "0457") for part in parts]
    neurite = touch(tmp_path / "a", *names, "OASIS_OAS1_0003_MR1/norm.nii.gz", "OAS1_4/norm.nii.gz")
    kind, found, strange = sources.find(neurite)
    assert kind == "neurite-OASIS v1.0" and strange == ["OAS1_4/norm.nii.gz"]
    assert [(v.case, v.session, v.file.name) for v in found] == [
        (2, 1, "aligned_orig.nii.gz"),
        (3, 1, "norm.nii.gz"),
        (457, 1, "aligned_orig.nii.gz"),
    ]
    tar = tmp_path / "neurite-oasis.v1.0.tar"
    with tarfile.open(tar, "w") as file:
        file.add(neurite, ".")
    assert [v[:4] for v in sources.find(tar)[1]] == [v[:4] for v in found]

    names = [f"{disc(case, session)}{end}" for case, session in ((9, 1), (9, 2), (10, 1)) for end in (".hdr", ".img")]
    whole = str(disc(9)).replace("_gfc", "_masked_gfc")
    kind, found, _ = sources.find(touch(tmp_path / "b", *names, f"{whole}.hdr", f"{whole}.img", f"{disc(9)}_fseg.img"))
    assert kind == "OASIS-1 discs" and [(v.case, v.session) for v in found] == [(9, 1), (9, 2), (10, 1)]
    assert all(v.name.endswith(".hdr") for v in found)

    bids = [f"sub-{s}/ses-{k}/anat/sub-{s}_ses-{k}_T1w.nii.gz" for s, k in (("07", 1), ("07", 2), ("12", 1))]
    kind, found, strange = sources.find(touch(tmp_path / "c", *bids, "sub-07/anat/sub-07_brain_mask.nii.gz"))
    assert [(v.subject, v.case, v.session) for v in found] == [("sub-07", 7, 1), ("sub-07", 7, 2), ("sub-12", 12, 1)]
    assert kind == "NIfTI volumes" and len(strange) == 1
    _, found, _ = sources.find(touch(tmp_path / "d", "ann.nii", "bob.nii.gz", ".hidden.nii", "notes.txt"))
    assert [(v.subject, v.case) for v in found] == [("ann", 1), ("bob", 2)]
    _, found, _ = sources.find(touch(tmp_path / "e", "p1/T1.nii", "p2/T1.nii.gz", ".git/x.nii", "b\udcff.nii"))
    assert [(v.subject, v.case) for v in found] == [("b\\udcff", 1), ("p1/T1", 2), ("p2/T1", 3)]


def test_scans_with_a_mask_applied_are_taken_where_there_is_nothing_else(tmp_path):
    names = ["mask_applied/sub1.nii.gz", "mask_applied/sub2.nii.gz", "sub3_brainmask.nii.gz"]
    _, found, strange = sources.find(touch(tmp_path, *names, "sub3_seg.nii.gz"))
    assert [volume.name for volume in found] == names and strange == ["sub3_seg.nii.gz"]
    _, found, strange = sources.find(touch(tmp_path, "sub4.nii.gz"))
    assert [volume.name for volume in found] == ["sub4.nii.gz"] and len(strange) == 4


@pytest.mark.parametrize(
    "scans, others",
    [
        (["imagesTr/OASIS_01.nii.gz"], ["labelsTr/OASIS_01.nii.gz", "masksTr/OASIS_01.nii.gz"]),
        (["s1/brain.nii.gz"], ["s1/mask.nii.gz", "s1/aseg.nii.gz", "s1/Brain_Mask.nii.gz"]),
        (["a_T1w.nii"], ["a_BrainExtractionMask.nii", "a_Segmentation/labels.nii", "b_ASEG.nii.gz"]),
    ],
)
def test_label_maps_and_masks_are_told_by_their_names_and_folders(scans, others, tmp_path):
    _, found, strange = sources.find(touch(tmp_path, *scans, *others))
    assert [volume.name for volume in found] == scans and strange == sorted(others)


@pytest.mark.parametrize(
    "names, scans",
    [
        (
            [
                "002_S_0001/MP-RAGE/2005-08-01_10_00_00.0/I11/ADNI_002_S_0001_MR_S1_I11.nii",
                "002_S_0001/MP-RAGE/2006-08-01_10_00_00.0/I12/ADNI_002_S_0001_MR_S2_I12.nii",
                "002_S_0012/MP-RAGE/2005-09-01_10_00_00.0/I13/ADNI_002_S_0012_MR_S3_I13.nii",
            ],
            [("002_S_0001", 1), ("002_S_0001", 2), ("002_S_0012", 1)],
        ),
        (
            ["OAS30001_MR_d0129/anat/T1w.nii.gz", "OAS30001_MR_d0757/anat/T1w.nii.gz", "OAS30002_MR_d0000/T1w.nii.gz"],
            [("OAS30001", 1), ("OAS30001", 2), ("OAS30002", 1)],
        ),
        (
            [
                "IXI002-Guys-0828-T1.nii.gz",
                "IXI012-HH-1211-T1.nii.gz",
                "IXI012-HH-1211-T2.nii.gz",
                "IXI002-Guys-0828-PD.nii.gz",
            ],
            [("IXI002", 1), ("IXI012", 1)],
        ),
        (
            ["sub-1/ses-1/anat/sub-1_ses-1_run-2_T1w.nii.gz", "sub-1/ses-1/anat/sub-1_ses-1_run-1_T1w.nii.gz"],
            [("sub-1", 1)],
        ),
        (
            ["sub-1/anat/sub-1_space-MNI_T1w.nii.gz", "sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_FLAIR.nii.gz"],
            [("sub-1", 1)],
        ),
        (
            ["siteA/sub-01/anat/sub-01_T1w.nii.gz", "siteB/sub-01/anat/sub-01_T1w.nii.gz"],
            [("siteA/sub-01", 1), ("siteB/sub-01", 1)],
        ),
        (
            ["sub-01/anat/sub-01_T1w.nii.gz", "derivatives/prep/sub-01/anat/sub-01_desc-brain_T1w.nii.gz"],
            [("sub-01", 1)],
        ),
        (["a_T2w.nii", "b_T2w.nii"], [("a_T2w", 1), ("b_T2w", 1)]),
    ],
    ids=["adni", "oasis-3", "ixi", "runs", "spaces", "sites", "derivatives", "no T1"],
)
def test_one_person_is_one_subject_whoever_publishes(names, scans, tmp_path):
    _, found, strange = sources.find(touch(tmp_path, *names))
    assert [(volume.subject, volume.session) for volume in found] == scans
    assert len({volume.case for volume in found}) == len({subject for subject, _ in scans})
    assert sorted(strange + [volume.name for volume in found]) == sorted(names)
    assert not any(part in found[0].name for part in ("run-2", "space-", "derivatives"))


def test_no_person_is_two_subjects_in_random_layouts():
    rng = np.random.default_rng(0)
    styles = [
        lambda n: f"{100 + n:03d}_S_{n:04d}/MPRAGE/{rng.integers(2000, 2020)}-01-0{rng.integers(1, 9)}/I{n}/x_I{n}.nii",
        lambda n: f"OAS3{n:04d}_MR_d{rng.integers(0, 9999):04d}/anat{rng.integers(1, 4)}/T1w.nii.gz",
        lambda n: f"in/IXI{n:03d}-Guys-{rng.integers(0, 9999)}-T1.nii.gz",
        lambda n: f"sub-{n:03d}/ses-{rng.integers(1, 9)}/anat/sub-{n:03d}_run-{rng.integers(1, 5)}_T1w.nii.gz",
        lambda n: f"derivatives/p{rng.integers(1, 3)}/sub-{n:03d}/sub-{n:03d}_space-MNI_T1w.nii.gz",
        lambda n: f"rawdata/sub-{n:03d}/sub-{n:03d}_acq-{rng.integers(1, 4)}_T1w.nii.gz",
    ]
    for _ in range(1000):
        style = rng.integers(0, 4)
        chosen = styles[3:] if style == 3 else [styles[style]]
        people = {chosen[rng.integers(len(chosen))](n): n for n in rng.integers(1, 9, 12).tolist()}
        found = sources._any_nifti([(name, Path(name)) for name in people])
        cases = {}
        for volume in found:
            assert cases.setdefault(people[volume.name], volume.case) == volume.case
        assert len(set(cases.values())) == len(cases)


def test_hidden_files_in_a_tar_are_passed_over(tmp_path):
    touch(tmp_path / "in", "sub1.nii.gz", "._sub1.nii.gz", ".git/sub2.nii")
    with tarfile.open(tmp_path / "in.tar", "w") as file:
        file.add(tmp_path / "in", ".")
    assert [volume.name for volume in sources.find(tmp_path / "in.tar")[1]] == ["sub1.nii.gz"]


def test_compression_is_told_by_the_contents(heads, tmp_path):
    plain = nib.Nifti1Image(heads[0], RAS).to_bytes()
    expected = slices_of(write_nifti(tmp_path / "a.nii", heads[0]))
    for name, contents in (("plain.nii.gz", plain), ("packed.nii", gzip.compress(plain, 1)), ("B.NII.GZ", plain)):
        (tmp_path / name).write_bytes(contents)
        assert np.array_equal(slices_of(tmp_path / name), expected), name
    assert len(sources.find(tmp_path)[1]) == 4


def test_nan_outside_the_head_is_background(heads, tmp_path):
    """As SPM writes it."""
    head = heads[0].astype(np.float32)
    expected = slices_of(write_nifti(tmp_path / "a.nii", head))
    edge = np.zeros(head.shape, bool)
    edge[:3], edge[:, -4:] = True, True
    assert not head[edge].any()
    head[edge] = np.nan
    assert np.array_equal(slices_of(write_nifti(tmp_path / "b.nii", head)), expected)


def test_headers_are_mended_where_it_is_plain_what_was_meant(heads, tmp_path):
    expected = slices_of(write_nifti(tmp_path / "a.nii", heads[0]))
    contents = bytearray((tmp_path / "a.nii").read_bytes())
    contents[116:120] = np.float32(np.nan).tobytes()  # scl_inter
    (tmp_path / "b.nii").write_bytes(contents)
    assert np.array_equal(slices_of(tmp_path / "b.nii"), expected)
    image = nib.Nifti1Image(heads[0], RAS)
    image.header.set_qform(RAS, 1)
    image.header["sform_code"], image.header["srow_x"] = 1, 0
    image.header["srow_y"] = image.header["srow_z"] = 0
    contents = bytearray(image.to_bytes())
    contents[:348] = image.header.binaryblock
    (tmp_path / "c.nii").write_bytes(contents)
    assert np.array_equal(slices_of(tmp_path / "c.nii"), expected)


def test_what_a_spline_puts_below_the_background_is_cut(heads):
    head = heads[0].astype(np.float32)
    expected, *_ = volumes.cut(head, "axial", 2, 0.8)
    undershot = head.copy()
    undershot[head == 0] -= 30.0 * (np.random.default_rng(0).random((head == 0).sum()) < 0.01)
    found, *_ = volumes.cut(undershot, "axial", 2, 0.8)
    assert np.array_equal(found, expected)
    undershot[:, :, ::4] = -200
    with pytest.raises(ValueError, match="darker than its border"):
        volumes.cut(undershot, "axial", 2, 0.8)


def test_where_nothing_can_be_used_the_layouts_are_named(tmp_path):
    for names in (("labelsTr/1.nii.gz", "2_seg.nii.gz"), ("OAS2_1_MR1/RAW/mpr-1.nifti.hdr",)):
        with pytest.raises(UserError, match="holds no volumes. neurite-OASIS has"):
            sources.find(touch(tmp_path / names[0][:6], *names))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "sub-01_T1w.nii.gz").symlink_to("../.git/annex/objects/x")
    (found,) = sources.find(tmp_path / "d")[1]
    with pytest.raises(UserError, match="is a link to contents that are not there; fetch it"):
        volumes.read(found)
    with pytest.raises(UserError, match="2-D edition of neurite-OASIS"):
        sources.find(touch(tmp_path / "b", "OASIS_OAS1_0001_MR1/slice_norm.nii.gz"))


def test_a_table_of_splits_may_have_semicolons_and_capitals(tmp_path):
    found = [volumes.Volume("", f"sub-{i}", i, 1, Path()) for i in (1, 2, 3)]
    (tmp_path / "split.csv").write_text('"Subject";"Split"\n"sub-1";test\nsub-2;train\nsub-3;validate\n')
    assert folder.split_subjects(found, 0, tmp_path / "split.csv") == {1: "test", 2: "train", 3: "validate"}


def test_a_number_names_a_subject_only_if_its_name_has_it(tmp_path):
    found = [volumes.Volume("", f"P{i + 1}", i, 1, Path()) for i in (1, 2, 3)]  # counted from P2 on
    (tmp_path / "split.csv").write_text("subject,split\n1,test\n2,train\n3,validate\n4,train\n")
    with pytest.raises(UserError, match="does not name P2"):
        folder.split_subjects(found, 0, tmp_path / "split.csv")


def test_planes_that_are_too_few_are_said_to_be_so(tmp_path):
    path = write_nifti(tmp_path / "few.nii", np.ones((64, 64, 15), np.int16))
    with pytest.raises(UserError, match="few.nii: has 15 planes in one direction; 16 are needed"):
        volumes.read(volume(path))


def test_from_oasis_to_training(heads, tmp_path):
    """Discs -> slices -> train.py, without an option; a repeated scan stays with its subject."""
    for case, head in enumerate(heads, 8):
        write_analyze(tmp_path / "discs" / disc(case), head)
    write_analyze(tmp_path / "discs" / disc(9, session=2), np.roll(heads[1], 2, 0))
    done = convert(tmp_path / "discs", tmp_path / "slices", "--preview", *LOW)
    assert done.stdout.startswith("Source: OASIS-1 discs, 4 volumes of 3 subjects in "), done.stderr
    with open(tmp_path / "slices" / "subjects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["session"]) for row in rows] == [("8", "1"), ("9", "1"), ("9", "2"), ("10", "1")]
    assert rows[1]["split"] == rows[2]["split"] and {row["split"] for row in rows} == set(folder.SHARES)
    assert len(rows[0]["slices"].split()) == 4
    names = {f"keras_png_slices_{rows[1]['split']}/case_009_slice_{s}.nii.png" for s in range(8)}
    assert names <= pixels(tmp_path / "slices").keys() and len(pixels(tmp_path / "slices")) == 16 + 1
    with Image.open(tmp_path / "slices" / "preview.png") as image:
        assert image.size == (8 * 256, 4 * 256)
    done = run_program("train.py", "--data", tmp_path / "slices", "--dry-run", cwd=tmp_path)
    assert "12 slices of 2 subjects" in done.stdout, done.stderr


def test_the_split_is_in_proportion_and_drawn_from_the_seed(tmp_path):
    found = [volumes.Volume("", f"OAS1_{i:04d}_MR1", i, 1, Path()) for i in range(1, 355)]
    split = folder.split_subjects(found, 0)
    counts = {name: list(split.values()).count(name) for name in folder.SHARES}
    assert counts == {"train": 302, "validate": 35, "test": 17}
    assert split == folder.split_subjects(found[::-1], 0) != folder.split_subjects(found, 1)
    file = tmp_path / "split.csv"
    file.write_text(
        "\ufeffsubject,split\nOAS1_0001_MR1,test\nOAS1_0002,train\n0003,validate\n4,train\nOAS1_0999,test\n"
    )
    assert folder.split_subjects(found[:4], 0, file) == {1: "test", 2: "train", 3: "validate", 4: "train"}
    for text, words in (
        ("subject,split\n1,test\n", "does not name OAS1_0002_MR1 (3 of 4"),
        ("subject,split\n1,test\n0001,train\n", "'0001' is in two splits"),
        ("subject,split\n1,tset\n", "'tset' of '1' is no split"),
        ("name,split\n1,test\n", "no columns named subject and split"),
        ("", "no columns"),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as error:
            folder.split_subjects(found[:4], 0, file)
        assert words in str(error.value) and str(file) in str(error.value)
    with pytest.raises(UserError, match="2 subjects cannot be split in three; at least one is needed for each"):
        folder.split_subjects(found[:2], 0)


def test_a_volume_that_would_not_fit_into_memory_at_1_mm_is_refused(tmp_path):
    path = write_nifti(tmp_path / "large.nii", np.zeros((128, 128, 128), np.uint8), np.diag([5.0, 5, 5, 1]))
    with pytest.raises(UserError, match="large.nii: would have 257259456 voxels of 1 mm"):
        volumes.read(volume(path))


def test_volumes_that_are_too_large_are_refused_before_they_are_read(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "large.nii", np.zeros((24, 24, 24), np.uint8))
    monkeypatch.setattr(volumes, "MOST_VOXELS", 1000)
    with pytest.raises(UserError, match="large.nii: announces 13824 voxels"):
        volumes.read(volume(path))
    monkeypatch.setattr(volumes, "MOST_BYTES", 1000)
    for offset in (None, 0):  # a file of its own, and in a tar
        with pytest.raises(UserError, match="large.nii: is larger than"):
            volumes.read(volume(path)._replace(offset=offset, size=14176))
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "sub-01.nii")
    with pytest.raises(UserError, match="is a pipe"):
        volumes.read(volume(tmp_path / "pipe" / "sub-01.nii"))


@pytest.mark.parametrize("kind", ["hdr", "nii"])
def test_a_header_that_announces_more_than_there_is_asks_for_no_memory(tmp_path, kind):
    path, voxels = tmp_path / f"long.{kind}", np.zeros((24, 24, 24), np.int16)
    if kind == "hdr":
        header = nib.AnalyzeHeader.from_fileobj(io.BytesIO(write_analyze(path, voxels).read_bytes()))
        header.set_data_shape((24, 24, 5, 18433))
        path.write_bytes(header.binaryblock)
    else:
        header = nib.Nifti2Image(voxels, RAS).header
        header.set_data_shape((131096, 24, 24))
        path.write_bytes(header.binaryblock + bytes(4) + voxels.tobytes())
    with bounded(), pytest.raises(UserError, match=f"long.{kind}: is damaged or ends early"):
        volumes.read(volume(path))


def damaged(head: np.ndarray, folder: Path) -> dict[str, str]:
    """Files that cannot be used, each with what is said of it."""
    good = gzip.compress(nib.Nifti1Image(head, RAS).to_bytes(), 1)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255
    huge = bytearray(nib.Nifti1Image(head, RAS).to_bytes()[:1000])
    huge[42:48] = np.array([30000] * 3, "<i2").tobytes()
    late = bytearray(nib.Nifti1Image(head, RAS).to_bytes())
    late[108:112] = np.array(3e8, "<f4").tobytes()  # vox_offset
    nan = head.astype(np.float32)
    nan[50, 50, 10] = np.nan
    contents = {
        "cut.nii.gz": (good[: len(good) // 2], "damaged or ends early"),
        "tail.nii.gz": (good[:-4], "damaged or ends early"),
        "flipped.nii.gz": (flipped, "damaged or ends early"),
        "page.nii.gz": (b"<html>403</html>", "not NIfTI and not MGH; download it again"),
        "empty.nii.gz": (b"", "not NIfTI"),
        "other.nii": (b"x" * 5000, "not NIfTI"),
        "huge.nii.gz": (gzip.compress(huge), "announces 27000000000000 voxels"),
        "late.nii.gz": (gzip.compress(late), "damaged or ends early"),
        "short.nii": (nib.Nifti1Image(head, RAS).to_bytes()[:90000], "ends early"),
        "flat.nii": (nib.Nifti1Image(head[:, :, 0], RAS).to_bytes(), "176×208, not one volume"),
        "series.nii": (nib.Nifti1Image(np.stack([head] * 2, 3), RAS).to_bytes(), "176×208×36×2, not one volume"),
        "inside.nii.gz": (gzip.compress(nib.Nifti1Image(head, RAS).to_bytes()[:90000]), "damaged or ends early"),
        "scores.nii": (nib.Nifti1Image(np.where(head, head - 500, 0), RAS).to_bytes(), "darker than its border"),
        "zero.nii": (nib.Nifti1Image(head * 0, RAS).to_bytes(), "is empty"),
        "nan.nii": (nib.Nifti1Image(nan, RAS).to_bytes(), "values in the head that are not finite"),
        "thin.nii": (nib.Nifti1Image(np.pad(head[:, :, 10:12], ((0, 0), (0, 0), (9, 9))), RAS).to_bytes(), "not 4"),
        "complex.nii": (nib.Nifti1Image(head.astype(np.complex64), RAS).to_bytes(), "of type complex64"),
        "voxels.nii": (
            nib.Nifti1Image(head, np.diag([30.0, 30, 30, 1])).to_bytes(),
            "voxels of (30.0, 30.0, 30.0) mm; those of 0.2 to 5 mm",
        ),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    return {name: words for name, (_, words) in contents.items()}


def test_bad_volumes_are_named_in_a_line_each_and_cost_nothing(nifti_source, heads, converted, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in nifti_source.iterdir():
        (source / f"good{path.name[4:]}").symlink_to(path)
    said = damaged(heads[0], source)
    file = tmp_path / "split.csv"
    names = dict.fromkeys([name.split(".")[0] for name in said], "train")
    names |= {"good01": "test", "good02": "train", "good03": "validate"}
    file.write_text("subject,split\n" + "".join(f"{name},{split}\n" for name, split in names.items()))
    done = convert(source, tmp_path / "slices", "--split", file)
    assert done.returncode == 1 and not (tmp_path / "slices").exists() and "Traceback" not in done.stderr
    lines = {line.split(":")[0].strip(): line for line in done.stderr.splitlines() if line.startswith("  ")}
    assert lines.keys() == said.keys()
    for name, words in said.items():
        assert words in lines[name]
    done = convert(source, tmp_path / "slices", "--split", file, "--skip-bad")
    assert done.returncode == 0 and f"Left out: {len(said)} volumes." in done.stdout
    assert sorted(pixels(tmp_path / "slices").values()) == sorted(pixels(converted).values())


def test_scans_that_contradict_each_other_and_incomplete_pairs_are_named(heads, tmp_path):
    source = tmp_path / "discs"
    for case, head in enumerate(heads, 1):
        write_analyze(source / disc(case), head)
    write_analyze(source / disc(2, n=3), heads[0])
    (source / disc(3)).with_suffix(".img").unlink()
    done = convert(source, tmp_path / "slices", *LOW)
    assert "_mpr_n3_" in done.stderr and "both are scan 1 of OAS1_0002_MR1" in done.stderr
    assert "OAS1_0003_MR1_mpr_n4_anon_111_t88_gfc.img is missing" in done.stderr and done.returncode == 1
    (source / disc(2, n=3)).with_suffix(".hdr").unlink()
    (source / disc(2, n=3)).with_suffix(".img").unlink()
    write_analyze(source / disc(3), heads[2])
    done = convert(source, tmp_path / "slices", *LOW)
    assert done.returncode == 0 and len(pixels(tmp_path / "slices")) == 12, done.stderr


def test_discs_become_the_very_slices_of_the_set(tmp_path):
    """A set's slices, put into volumes as the discs have them, come out pixel for pixel, with their label maps."""
    labels = {}
    for case in (401, 402, 441):
        slices, maps = (np.stack(each) for each in zip(*(phantoms.make_pair(case, s) for s in range(32)), strict=True))
        voxels, tissue = (np.zeros((176, 208, 176), np.int16) for _ in range(2))
        voxels[:, :, 72:104] = 7 * slices[:, 40:216, 24:232].astype(np.int16).transpose(1, 2, 0)
        tissue[:, :, 72:104] = maps[:, 40:216, 24:232].astype(np.int16).transpose(1, 2, 0) // 85
        path = tmp_path / "discs" / disc(case)
        write_analyze(path, voxels)
        name = path.name.replace("_t88_gfc", "_t88_masked_gfc_fseg")
        write_analyze(path.parents[3] / "FSL_SEG" / name, tissue)
        labels[case] = slices, maps
    done = run_program("preparation.oasis", tmp_path / "discs", tmp_path / "slices", "--workers", 2, cwd=tmp_path)
    assert "Split by subject, that of the PNG set: 1 train, 1 validate, 1 test" in done.stdout, done.stderr
    for case, split in ((401, "train"), (402, "validate"), (441, "test")):
        dataset = OasisDataset(tmp_path / "slices", split, with_labels=True)
        assert [dataset.case_and_slice(i) for i in range(32)] == [(case, s) for s in range(32)]
        slices, maps = labels[case]
        assert np.array_equal(dataset.images[:, 0], slices) and np.array_equal(dataset.labels * 85, maps)


def test_sources_that_cannot_be_used_are_refused(nifti_source, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.tar").write_bytes(b"<html>403 Forbidden</html>" * 60)
    (tmp_path / "packed.tar").write_bytes(gzip.compress(b"x" * 2000))
    with tarfile.open(tmp_path / "outside.tar", "w") as file:
        file.addfile(tarfile.TarInfo("../OASIS_OAS1_0001_MR1/norm.nii.gz"), io.BytesIO())
    link = tarfile.TarInfo("OASIS_OAS1_0001_MR1/norm.nii.gz")
    link.type, link.linkname = tarfile.LNKTYPE, "OASIS_OAS1_0002_MR1/norm.nii.gz"
    sparse = tarfile.TarInfo("GNUSparseFile.0/norm.nii.gz")  # as `tar -S` writes it
    sparse.pax_headers = {f"GNU.sparse.{key}": value for key, value in (("major", "1"), ("minor", "0"))}
    sparse.pax_headers |= {"GNU.sparse.name": link.name, "GNU.sparse.realsize": "9"}
    sparse.size = 1024
    for name, member in (("link.tar", link), ("sparse.tar", sparse)):
        with tarfile.open(tmp_path / name, "w", format=tarfile.PAX_FORMAT) as file:
            file.addfile(member, io.BytesIO(b"1\n0\n9\n".ljust(1024, b"\0")))
    with tarfile.open(tmp_path / "whole.tar", "w") as file:
        for i, path in enumerate(sorted(nifti_source.iterdir())):
            file.add(path, f"OASIS_OAS1_000{i}_MR1/norm.nii.gz")
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as file:
        last = max(member.offset for member in file)
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut2.tar").write_bytes(whole[:last])
    (tmp_path / "cut3.tar").write_bytes(whole[: last + 200])
    (tmp_path / "flipped.tar").write_bytes(whole[: last + 20] + b"~" + whole[last + 21 :])
    for name, words in (
        ("none", "no such folder or tar"),
        ("empty", "holds no volumes"),
        ("page.tar", "nor an uncompressed tar"),
        ("packed.tar", "nor an uncompressed tar"),
        ("outside.tar", "points outside"),
        ("link.tar", "is a link or sparse; unpack it"),
        ("sparse.tar", "is a link or sparse; unpack it"),
        ("cut.tar", "ends"),
        ("cut2.tar", "ends early, or is damaged"),
        ("cut3.tar", "ends early, or is damaged"),
        ("flipped.tar", "ends early, or is damaged"),
    ):
        refused(convert(tmp_path / name, tmp_path / "slices"), name, words)
    for dest in ("empty/..", "foreign"):
        (tmp_path / "foreign.unfinished").mkdir(exist_ok=True)
        (tmp_path / "foreign.unfinished" / "thesis.tex").touch()
        refused(
            convert(nifti_source, tmp_path / dest), "by this program" if dest == "foreign" else "by another program"
        )
    assert (tmp_path / "foreign.unfinished" / "thesis.tex").exists()
    (tmp_path / "page.tar.csv").write_text("subject,split\n1,train\n2,train\n3,train\n")
    refused(
        convert(nifti_source, tmp_path / "slices", "--split", tmp_path / "page.tar.csv"), "gives no subject to a split"
    )
    assert not list(tmp_path.glob("slices*"))
    done = convert(tmp_path / "whole.tar", tmp_path / "slices", "--dry-run")
    assert "12 slices would be written" in done.stdout and not list(tmp_path.glob("slices*"))


def test_a_complete_folder_stays_and_another_source_or_option_is_refused(nifti_source, converted):
    before = pixels(converted)
    done = convert(nifti_source, converted)
    assert done.returncode == 0 and "is complete" in done.stdout and pixels(converted) == before
    refused(convert(nifti_source, converted, "--seed", 1), "slices", "was made of other files or")
    refused(convert(nifti_source, converted, "--plane", "coronal"), "slices", "was made of other files or")
    assert pixels(converted) == before and not converted.with_name("slices.unfinished").exists()
    copy = converted.with_name("copy")
    shutil.copytree(converted, copy)
    next(copy.glob("*/case_002_slice_3.nii.png")).unlink()
    refused(convert(nifti_source, copy), "copy", "has 11 slices, and had 12")


def test_a_resumed_call_keeps_what_is_done_and_nothing_of_what_has_changed(nifti_source, heads, tmp_path):
    source = tmp_path / "a link leads here"
    (tmp_path / "elsewhere").mkdir()
    source.mkdir()
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(source)
    for session, head in enumerate(heads, 1):
        write_nifti(tmp_path / "elsewhere" / f"sub-01_ses-{session}_T1w.nii", head)
    for case in (2, 3):
        (source / f"sub-0{case}.nii.gz").symlink_to(nifti_source / f"sub-0{case}.nii.gz")
    (source / "sub-04.nii.gz").write_bytes(b"broken")
    (source / "folder.nii").mkdir()
    done = convert(source, tmp_path / "slices")
    assert done.returncode == 1 and "1 volumes cannot be used" in done.stderr and "6 volumes of 4" in done.stdout
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("slices.unfinished/*/*_slice_*.png")}
    assert len(before) == 20
    (tmp_path / "elsewhere" / "sub-01_ses-1_T1w.nii").unlink()  # the others become scans 1 and 2
    (source / "sub-03.nii.gz").unlink()
    write_nifti(source / "sub-03.nii.gz", heads[0])  # under the same name
    plan = (tmp_path / "slices.unfinished" / "conversion.json").read_text()
    with files.locked(tmp_path / "slices.unfinished"):
        refused(convert(source, tmp_path / "slices"), "another process is at work there")
    assert (tmp_path / "slices.unfinished" / "conversion.json").read_text() == plan
    (tmp_path / "slices.unfinished" / "keras_png_slices_train" / "@eaDir").mkdir()  # of a network disk
    (tmp_path / "slices.unfinished" / "volume_009_1.json").write_text("{}")
    record = tmp_path / "slices.unfinished" / "volume_001_1.json"
    saved = json.loads(record.read_text())
    record.write_text(json.dumps({key: saved[key] for key in ("files", "case", "subject", "session", "source")}))
    (tmp_path / "named").symlink_to(tmp_path / "slices")
    done = convert(source, tmp_path / "named", "--skip-bad")
    assert done.returncode == 0, done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("slices/*/*_slice_*.png")}
    kept = {name for name in after if before.get(name) == after[name]}
    assert kept == {f"case_002_slice_{i}.nii.png" for i in range(4)}
    first = volumes.cut(heads[1].astype(np.float32), "axial", 4, 0.8)[0]
    with Image.open(next(tmp_path.glob("slices/*/case_001_slice_2.nii.png"))) as image:
        assert np.array_equal(image, first[2])
    assert len(after) == 16 and not list(tmp_path.glob("slices/*/case_001_slice_8.nii.png"))


def test_a_signal_costs_nothing(nifti_source, converted, tmp_path, monkeypatch):
    def stop() -> None:
        raise console.Stopped(143)

    with monkeypatch.context() as patch:
        patch.setattr(console, "stop_if_signalled", stop)
        done = convert(nifti_source, tmp_path / "slices")
        assert done.returncode == 143 and "The same command goes on." in done.stderr
    assert not (tmp_path / "slices").exists()
    (tmp_path / "slices.unfinished" / ".x.tmp").touch()  # as of a call that was killed
    assert convert(nifti_source, tmp_path / "slices").returncode == 0
    assert pixels(tmp_path / "slices") == pixels(converted)
    assert {path.name for path in (tmp_path / "slices").iterdir()} == {path.name for path in converted.iterdir()}
    assert read_json(tmp_path / "slices" / "conversion.json") == read_json(converted / "conversion.json")


def test_what_is_done_is_kept_until_the_folder_has_its_name(nifti_source, converted, tmp_path, monkeypatch):
    """As where DEST is open on Windows. A volume of which a slice was emptied is converted again."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert convert(nifti_source, tmp_path / "slices").returncode == 1
    unfinished = tmp_path / "slices.unfinished"
    before = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*/*.png")}
    next(unfinished.glob("*/case_002_slice_1.nii.png")).write_bytes(b"")
    assert convert(nifti_source, tmp_path / "slices").returncode == 0
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "slices").glob("*/*.png")}
    assert {name for name in before if before[name] != after[name]} == {name for name in after if "case_002" in name}
    assert pixels(tmp_path / "slices") == pixels(converted)
    assert {path.name for path in (tmp_path / "slices").iterdir() if path.is_file()} == {
        "conversion.json",
        "subjects.csv",
    }


def test_of_a_volume_that_changes_no_slice_is_mixed_with_what_it_was(heads, tmp_path, monkeypatch):
    """Changed while it is converted; and a disc's image or label map, beside an equal header."""
    for case, head in enumerate(heads, 1):
        write_analyze(tmp_path / "discs" / disc(case), head)
    labels = tmp_path / "discs" / disc(2).parents[3] / "FSL_SEG" / disc(2).name.replace("_gfc", "_masked_gfc_fseg")
    write_analyze(labels, (heads[1] > 300).astype(np.int16))
    image, cut_atlas = (tmp_path / "discs" / disc(1)).with_suffix(".img"), volumes.cut_atlas

    times = itertools.count(1)  # another one for each volume, whichever of the two workers is first

    def changing(*words):
        os.utime(image, ns=2 * (next(times),))
        return cut_atlas(*words)

    with monkeypatch.context() as patch:
        patch.setattr(oasis, "cut_atlas", changing)
        refused(convert(tmp_path / "discs", tmp_path / "slices", *LOW), "1 volumes have changed meanwhile")
    unfinished = tmp_path / "slices.unfinished"
    assert len(list(unfinished.glob("*/seg_002*"))) == 4
    for path in (labels.with_suffix(".hdr"), labels.with_suffix(".img")):
        path.unlink()
    assert convert(tmp_path / "discs", tmp_path / "slices", *LOW).returncode == 0
    assert not list((tmp_path / "slices").glob("*/seg_*")) and len(pixels(tmp_path / "slices")) == 12
