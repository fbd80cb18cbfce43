"""Reading PNG folders: order, formats, what is refused, and batches."""

import os
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import dataset as dataset_module
from dataset import (
    DEFAULT_DATA,
    DataError,
    OasisDataset,
    describe,
    find_data,
    list_scans,
    make_loader,
    picture_box,
    refuse_equal_images,
    refuse_shared_cases,
)
from modules import VQVAE


@pytest.fixture
def folder(tmp_path):
    """An empty training split."""
    (tmp_path / "keras_png_slices_train").mkdir()
    return tmp_path / "keras_png_slices_train"


def grey(value=7, size=(256, 256)):
    return Image.fromarray(np.full(size[::-1], value, np.uint8))


def test_natural_order_of_case_and_slice(folder):
    names = [f"case_{case:03d}_slice_{s}.nii.png" for case in (2, 10, 101) for s in (0, 2, 9, 10, 31)]
    for name in np.random.default_rng(0).permutation(names):
        grey().save(folder / name)
    dataset = OasisDataset(folder.parent, "train")
    assert [path.name for path in dataset.files] == names
    assert dataset.case_and_slice(6) == (10, 2)


def test_only_the_splits_scans_are_read(folder):
    for name in ("b.png", "A.PNG", "._case_001_slice_0.nii.png", ".hidden.png", "notes.txt"):
        grey().save(folder / name, format="PNG")
    grey().save(folder / "case_99999999999999999999_slice_1.png")
    assert OasisDataset(folder.parent, "train").case_and_slice(2) == (None, None)
    (folder / "case_99999999999999999999_slice_1.png").unlink()
    for labels in ("keras_png_slices_seg_train", "keras_png_slices_validate"):
        (folder.parent / labels).mkdir()
        grey(200).save(folder.parent / labels / "seg_001_slice_0.nii.png")
    assert [path.name for path in list_scans(folder.parent, "train")] == ["A.PNG", "b.png"]
    assert OasisDataset(folder.parent, "train").case_and_slice(0) == (None, None)


def test_grey_values_of_each_kind_of_png(folder):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    rgb = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    luma = rgb @ [0.299, 0.587, 0.114]
    alpha = np.full((256, 256, 1), 128, np.uint8)
    eight = (ramp // 256).astype(np.uint8)
    kinds = {
        "1_grey": (Image.fromarray(eight), eight),
        "2_sixteen_bit": (Image.fromarray(ramp), ramp / 65535 * 255),
        "3_rgb": (Image.fromarray(rgb), luma),
        "4_rgba": (Image.fromarray(np.concatenate([rgb, alpha], 2)), luma),
        "5_la": (Image.fromarray(np.dstack([eight, alpha])), eight),
        "6_palette": (Image.fromarray(eight).convert("RGB").quantize(256), eight),
        "7_one_bit": (Image.fromarray(eight > 99), 255 * (eight > 99)),
    }
    for name, (image, _) in kinds.items():
        image.save(folder / f"{name}.png")
    dataset = OasisDataset(folder.parent, "train")
    for i, (name, (_, expected)) in enumerate(kinds.items()):
        tolerance = 1 if name[0] in "346" else 0.5  # Pillow truncates luma; half a level is uint8's own
        assert np.abs(dataset[i][0].numpy() * 255 - expected).max() <= tolerance, name


def test_items_and_batches(data):
    dataset = OasisDataset(data, "train")
    image = np.asarray(Image.open(dataset.files[4]))
    assert dataset[4].shape == (1, 256, 256) and dataset[4].dtype == torch.float32
    np.testing.assert_allclose(dataset[4][0].numpy(), image / 255, atol=1e-7)
    batch = dataset.batch([4, 0, 9])
    assert torch.equal(batch, torch.stack([dataset[4], dataset[0], dataset[9]]))
    assert dataset.images.dtype == torch.uint8 and 0 <= batch.min() and batch.max() <= 1


def test_loader_shuffles_afresh_keeps_the_last_batch_and_repeats_by_seed(data):
    dataset = OasisDataset(data, "train")
    rng = torch.Generator().manual_seed(3)
    first, second = (torch.cat(list(make_loader(dataset, 4, rng))) for _ in range(2))
    again = torch.cat(list(make_loader(dataset, 4, torch.Generator().manual_seed(3))))
    assert [len(batch) for batch in make_loader(dataset, 4, rng)] == [4, 4, 4, 3]
    assert torch.equal(first, again) and not torch.equal(first, second)
    everything = dataset.batch(list(range(len(dataset))))
    assert torch.equal(first.sum((1, 2, 3)).sort().values, everything.sum((1, 2, 3)).sort().values)


def broken_files():
    """What may be wrong with a file, and a word that the message must have."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8))

    def truncated(path):
        noise.save(path)
        path.write_bytes(path.read_bytes()[:20000])

    def animated(path):
        grey(3).save(path, save_all=True, append_images=[grey(4)])

    def text_bomb(path):
        pnginfo = PngImagePlugin.PngInfo()
        pnginfo.add_text("Comment", "x" * 50_000_000, zip=True)
        grey().save(path, pnginfo=pnginfo)

    return {
        "zero bytes": (lambda path: path.write_bytes(b""), "cannot be decoded"),
        "truncated": (truncated, "runcated"),
        "only a header": (lambda path: (noise.save(path), path.write_bytes(path.read_bytes()[:33])), "cannot be"),
        "a JPEG": (lambda path: grey().save(path, format="JPEG"), "cannot be decoded"),
        "animated": (animated, "is an animation"),
        "a folder": (lambda path: path.mkdir(), "is a folder"),
        "a pipe": (os.mkfifo, "is not a regular file"),
        "too small": (lambda path: grey(size=(255, 256)).save(path), "255x256"),
        "a decompression bomb": (lambda path: grey(size=(20000, 10000)).save(path), "decompression bomb"),
        "a bomb of text": (text_bomb, "cannot be decoded"),
        "a very large file": (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40), "16 MiB"),
        "a dangling link": (lambda path: path.symlink_to("nowhere"), "is a link to nothing"),
        "what the system does not read": (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"),
    }


@pytest.mark.parametrize("kind", broken_files())
def test_a_broken_file_is_one_line_with_its_name(folder, kind):
    make, word = broken_files()[kind]
    grey().save(folder / "good.png")
    make(folder / "scan.png")
    with pytest.raises(DataError, match="--skip-bad") as caught:
        OasisDataset(folder.parent, "train")
    message = str(caught.value)
    assert message.startswith(f"{folder / 'scan.png'}: ") and "remove it" in message and "\n" not in message
    assert word in message


def test_all_broken_files_of_a_split_are_in_one_report(folder):
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).write_bytes(b"x")
    grey().save(folder / "good.png")
    with pytest.raises(DataError) as caught:
        OasisDataset(folder.parent, "train")
    first, *lines, last = str(caught.value).split("\n")
    assert first == "3 of 4 files cannot be used:" and "--skip-bad" in last
    names = [str(folder / name) for name in ("a.png", "b.png", "c.png")]
    assert [line.split(":")[0].strip() for line in lines] == names


def test_skipping_bad_files_keeps_the_others_in_order(folder, capsys):
    for i, name in enumerate(("a.png", "c.png", "d.png")):
        grey(10 + i).save(folder / name)
    (folder / "b.png").write_bytes(b"x")
    dataset = OasisDataset(folder.parent, "train", skip_bad=True)
    assert [path.name for path in dataset.files] == ["a.png", "c.png", "d.png"]
    assert (dataset.batch([0, 1, 2])[:, 0, 0, 0] * 255).tolist() == pytest.approx([10, 11, 12])
    dataset.print_skipped()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "Left out of train: 1 of 4 files." and str(folder / "b.png") in second
    for name in "acd":
        (folder / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match="4 of 4 files"):  # nothing would be left
        OasisDataset(folder.parent, "train", skip_bad=True)


def test_a_split_that_is_all_black_is_refused(folder):
    for i in range(3):
        grey(0).save(folder / f"{i}.png")
    with pytest.raises(DataError, match="keras_png_slices_train: every image is black"):
        OasisDataset(folder.parent, "train")
    grey(1).save(folder / "3.png")
    assert len(OasisDataset(folder.parent, "train")) == 4


def test_names_that_are_no_text_are_shown_by_their_bytes(folder):
    for name in (b"caf\xe9_2.png", "1\u00b2.png".encode(), b"a\nb.png"):
        grey().save(io := BytesIO(), format="PNG")
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(io.getvalue())
    dataset = OasisDataset(folder.parent, "train")
    assert [dataset.name(i) for i in range(3)] == ["1\u00b2.png", "a\\nb.png", "caf\\udce9_2.png"]
    dataset.files[2].write_bytes(b"")
    with pytest.raises(DataError) as caught:
        OasisDataset(folder.parent, "train")
    assert str(caught.value).encode().startswith(f"{folder}/caf\\udce9_2.png: ".encode())


def test_a_case_in_two_splits_is_refused(tmp_path, capsys):
    for split, cases in (("train", (1, 2, 3)), ("validate", (3, 4)), ("test", (2, 5))):
        (tmp_path / f"keras_png_slices_{split}").mkdir()
        for case in cases:
            grey().save(tmp_path / f"keras_png_slices_{split}" / f"case_{case:03d}_slice_7.nii.png")
        grey().save(tmp_path / f"keras_png_slices_{split}" / "without_a_number.png")
    with pytest.raises(DataError) as caught:
        refuse_shared_cases(tmp_path)
    message = str(caught.value)
    assert "case 2 is in keras_png_slices_train and keras_png_slices_test (and 1 more cases" in message
    assert "--allow-shared-cases" in message and "\n" not in message
    (tmp_path / "keras_png_slices_test" / "case_002_slice_7.nii.png").unlink()
    (tmp_path / "keras_png_slices_validate" / "case_003_slice_7.nii.png").unlink()
    capsys.readouterr()
    refuse_shared_cases(tmp_path)
    assert "1 file names of test have no case number" in capsys.readouterr().out


def test_missing_and_empty_folders_are_named(folder):
    with pytest.raises(DataError, match="nowhere: no such folder.*--data"):
        OasisDataset(folder.parent / "nowhere", "train")
    with pytest.raises(DataError, match="keras_png_slices_test: missing"):
        OasisDataset(folder.parent, "test")
    (folder.parent / "deeper" / "keras_png_slices_validate").mkdir(parents=True)
    with pytest.raises(DataError, match="keras_png_slices_validate: missing; --data .*deeper has one"):
        OasisDataset(folder.parent, "validate")
    with pytest.raises(DataError, match="keras_png_slices_train: holds no .png"):
        OasisDataset(folder.parent, "train")


def test_where_data_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OASIS_DIR", raising=False)
    assert find_data(None) is None
    (tmp_path / "keras_png_slices_data").mkdir()
    assert find_data(None) == DEFAULT_DATA
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("OASIS_DIR", str(tmp_path / "elsewhere"))
    assert find_data(None) == tmp_path / "elsewhere"
    assert find_data(str(tmp_path)) == tmp_path
    for name in ("nowhere", ""):
        with pytest.raises(DataError, match="named by --data"):
            find_data(name)
    monkeypatch.setenv("OASIS_DIR", "nowhere")
    with pytest.raises(DataError, match="named by OASIS_DIR"):
        find_data(None)


def test_label_maps_belong_to_the_scans_beside_them(folder, capsys):
    labels = folder.parent / "keras_png_slices_seg_train"
    for s in (0, 1):
        grey(200).save(folder / f"case_003_slice_{s}.nii.png")

    def read() -> torch.Tensor | None:
        return OasisDataset(folder.parent, "train", with_labels=True).labels

    assert read() is None and not capsys.readouterr().err
    labels.mkdir()
    levels = np.random.default_rng(0).integers(0, 4, (2, 256, 256), np.uint8)
    for s in (1, 0):
        Image.fromarray(levels[s] * np.uint8(85)).save(labels / f"seg_003_slice_{s}.nii.png")
    assert np.array_equal(read().numpy(), levels) and OasisDataset(folder.parent, "train").labels is None
    grey(86).save(labels / "seg_003_slice_1.nii.png")
    assert read() is None and "grey values other than" in capsys.readouterr().err
    (labels / "seg_003_slice_1.nii.png").unlink()
    assert read() is None
    assert "1 of 2 images have no map, such as seg_003_slice_1.nii.png" in capsys.readouterr().err
    for s in (0, 1):
        grey(0).save(labels / f"seg_003_slice_{s}.nii.png")
    assert read() is None and "no map shows a brain" in capsys.readouterr().err


def test_data_are_recognised_by_their_pixels(folder, tmp_path, monkeypatch):
    for case in (3, 4):
        grey(case).save(folder / f"case_{case:03d}_slice_0.nii.png")
    dataset = OasisDataset(folder.parent, "train")
    assert describe(dataset) == "not the report's set, 2 slices of 2 subjects"
    monkeypatch.setitem(dataset_module.REPORT_SET, "train", dataset.digest)
    assert describe(dataset) == describe(OasisDataset(folder.parent, "train")) == "the report's set"
    changed = np.full((256, 256), 4, np.uint8)
    changed[200, 100] = 5
    Image.fromarray(changed).save(folder / "case_004_slice_0.nii.png")
    assert describe(OasisDataset(folder.parent, "train")).startswith("not the report's set")
    grey(3).save(folder / "case_004_slice_0.nii.png")
    grey(4).save(folder / "case_003_slice_0.nii.png")  # the same images in another order
    assert describe(OasisDataset(folder.parent, "train")).startswith("not the report's set")
    (folder / "case_003_slice_0.nii.png").rename(folder / "a_scan.png")
    assert describe(OasisDataset(folder.parent, "train")) == "not the report's set, 2 slices"


@pytest.mark.parametrize(
    "top, bottom, left, right, rows, columns",
    [
        (40, 216, 24, 232, (28, 228), (12, 244)),  # the set's
        (0, 256, 0, 256, (0, 256), (0, 256)),
        (100, 101, 250, 256, (88, 120), (224, 256)),
        (15, 243, 60, 61, (0, 256), (48, 80)),
    ],
)
def test_the_box_holds_every_picture_and_its_margin(top, bottom, left, right, rows, columns):
    images = torch.zeros(3, 1, 256, 256, dtype=torch.uint8)
    images[0, 0, top, left] = images[2, 0, bottom - 1, right - 1] = 1
    assert picture_box(images) == (slice(*rows), slice(*columns))
    assert picture_box(0 * images) == (slice(0, 256), slice(0, 256))


def test_codes_of_pictures_in_the_box_are_those_of_whole_images():
    torch.manual_seed(0)
    images = torch.zeros(2, 1, 256, 256)
    images[:, :, 40:216, 24:232] = torch.rand(2, 1, 176, 208)
    vqvae, (rows, columns) = VQVAE(), picture_box((images * 255).byte())
    z_whole = vqvae.latents(images)[:, :, 10:54, 6:58]
    top, left = (40 - rows.start) // 4, (24 - columns.start) // 4
    z_box = vqvae.latents(images[..., rows, columns])[:, :, top : top + 44, left : left + 52]
    torch.testing.assert_close(z_box, z_whole, rtol=0, atol=1e-5)
    z_near = vqvae.latents(images[..., 32:224, 16:240])[:, :, 2:46, 2:54]  # two codes of margin are too few
    assert (z_near - z_whole).abs().max() > 1e-4


def test_values_that_fill_a_part_of_their_range_are_named_with_the_factor(folder, capsys):
    """12-bit values in 16-bit files."""
    values = np.linspace(0, 4095, 256 * 256).reshape(256, 256).astype(np.uint16)
    Image.fromarray(values).save(folder / "a.png")
    OasisDataset(folder.parent, "train", skip_bad=True)
    assert "brightest value is 16 of 255" in (err := capsys.readouterr().err) and "multiply them by 16" in err
    Image.fromarray(values * 16).save(folder / "a.png")
    OasisDataset(folder.parent, "train")
    assert capsys.readouterr().err == ""


def test_equal_images_in_two_splits_are_refused_whatever_their_names(folder):
    other = folder.parent / "keras_png_slices_validate"
    other.mkdir()
    for value in (100, 0):
        grey(value).save(folder / f"train_{value}.png")
    for value in (90, 0):  # black slices may be equal
        grey(value).save(other / f"other_{value}.png")
    splits = [OasisDataset(folder.parent, split) for split in ("train", "validate")]
    refuse_equal_images(*splits, "correct the splits")
    grey(100).save(other / "new_name.png")
    with pytest.raises(DataError, match="new_name.png: has the pixels of .*train_100.png; correct the splits"):
        refuse_equal_images(splits[0], OasisDataset(folder.parent, "validate"), "correct the splits")


def test_a_picture_in_the_alpha_channel_alone_is_refused(folder):
    alpha = Image.fromarray(np.arange(256 * 256).reshape(256, 256).astype(np.uint8))
    white = grey(255)
    Image.merge("RGBA", (white, white, white, alpha)).save(folder / "a.png")
    with pytest.raises(DataError, match="a.png: has its picture in the alpha channel alone; convert it to grey"):
        OasisDataset(folder.parent, "train")
    Image.merge("LA", (alpha, white)).save(folder / "a.png")
    assert OasisDataset(folder.parent, "train").images[0, 0, 3, 5] == np.asarray(alpha)[3, 5]


def test_what_is_there_instead_of_the_data_is_said(folder, tmp_path):
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="set.zip: is a file, named by --data; unpack it"):
        find_data(str(tmp_path / "set.zip"))
    grey().save(folder / "a.jpg")
    with pytest.raises(DataError, match="holds no .png files but .jpg; "):
        list_scans(folder.parent, "train")
    folder.rename(folder.with_name("training"))
    with pytest.raises(DataError, match="keras_png_slices_train: missing; .*, and has training"):
        list_scans(tmp_path, "train")
