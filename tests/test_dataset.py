"""Reading PNG folders: order, formats, what is refused, and batches."""

import numpy as np
import pytest
import torch
from conftest import quiet
from PIL import Image

import dataset as module
from dataset import DataError, OasisDataset, demo_data, find_data, list_scans, make_loader


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
    dataset = OasisDataset(folder.parent, "train", progress=quiet)
    assert [path.name for path in dataset.files] == names
    assert dataset.case_and_slice(6) == (10, 2)


def test_only_the_splits_scans_are_read(folder):
    for name in ("b.png", "A.PNG", "._case_001_slice_0.nii.png", ".hidden.png", "notes.txt"):
        grey().save(folder / name, format="PNG")
    for labels in ("keras_png_slices_seg_train", "keras_png_slices_validate"):
        (folder.parent / labels).mkdir()
        grey(200).save(folder.parent / labels / "seg_001_slice_0.nii.png")
    assert [path.name for path in list_scans(folder.parent, "train")] == ["A.PNG", "b.png"]
    assert OasisDataset(folder.parent, "train", progress=quiet).case_and_slice(0) == (None, None)


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
    dataset = OasisDataset(folder.parent, "train", progress=quiet)
    for i, (name, (_, expected)) in enumerate(kinds.items()):
        tolerance = 1 if name[0] in "346" else 0.5  # Pillow truncates luma; half a level is uint8's own
        assert np.abs(dataset[i][0].numpy() * 255 - expected).max() <= tolerance, name


def test_items_and_batches(data):
    dataset = OasisDataset(data, "train", progress=quiet)
    image = np.asarray(Image.open(dataset.files[4]))
    assert dataset[4].shape == (1, 256, 256) and dataset[4].dtype == torch.float32
    np.testing.assert_allclose(dataset[4][0].numpy(), image / 255, atol=1e-7)
    batch = dataset.__getitems__([4, 0, 9])
    assert torch.equal(batch, torch.stack([dataset[4], dataset[0], dataset[9]]))
    assert dataset.images.dtype == torch.uint8 and 0 <= batch.min() and batch.max() <= 1


def test_loader_shuffles_afresh_keeps_the_last_batch_and_repeats_by_seed(data):
    dataset = OasisDataset(data, "train", progress=quiet)
    random = torch.Generator().manual_seed(3)
    first, second = (torch.cat(list(make_loader(dataset, 4, random))) for _ in range(2))
    again = torch.cat(list(make_loader(dataset, 4, torch.Generator().manual_seed(3))))
    assert [len(batch) for batch in make_loader(dataset, 4, random)] == [4, 4, 4, 3]
    assert torch.equal(first, again) and not torch.equal(first, second)
    everything = dataset.__getitems__(list(range(len(dataset))))
    assert torch.equal(first.sum((1, 2, 3)).sort().values, everything.sum((1, 2, 3)).sort().values)


def broken_files():
    def truncated(path):
        grey(3).save(path)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:20000])

    return {
        "empty file": lambda path: path.write_bytes(b""),
        "garbage": lambda path: path.write_bytes(b"no image at all" * 50),
        "truncated": truncated,
        "a JPEG": lambda path: grey().save(path, format="JPEG"),
        "a folder": lambda path: path.mkdir(),
        "too small": lambda path: grey(size=(255, 256)).save(path),
        "huge": lambda path: grey(size=(20000, 10000)).save(path),
        "a dangling link": lambda path: path.symlink_to("nowhere"),
    }


@pytest.mark.parametrize("kind", broken_files())
def test_a_broken_file_is_one_line_with_its_name(folder, kind):
    grey().save(folder / "good.png")
    broken_files()[kind](folder / "scan.png")
    with pytest.raises(DataError) as caught:
        OasisDataset(folder.parent, "train", progress=quiet)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'scan.png'}: ") and "remove it" in message and "\n" not in message
    if kind == "too small":
        assert "255x256" in message


def test_several_broken_files_are_counted(folder):
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.png.*2 more"):
        OasisDataset(folder.parent, "train", progress=quiet)


def test_missing_and_empty_folders_are_named(folder):
    with pytest.raises(DataError, match="nowhere: no such folder.*--data"):
        OasisDataset(folder.parent / "nowhere", "train", progress=quiet)
    with pytest.raises(DataError, match="keras_png_slices_test: missing"):
        OasisDataset(folder.parent, "test", progress=quiet)
    with pytest.raises(DataError, match="keras_png_slices_train: holds no .png"):
        OasisDataset(folder.parent, "train", progress=quiet)


def test_where_data_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OASIS_DIR", raising=False)
    assert find_data(None) is None
    (tmp_path / "keras_png_slices_data").mkdir()
    assert find_data(None) == module.DEFAULT_DATA
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


def test_demo_data_is_written_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(module.phantom, "write", lambda folder, progress: calls.append(folder))
    demo_data(quiet)
    (tmp_path / "phantoms").mkdir()
    marker = tmp_path / "phantoms" / module.phantom.MARKER
    marker.write_text("Synthetic slices; the writing was interrupted here")
    demo_data(quiet)
    assert len(calls) == 2
    marker.write_text(module.phantom.COMPLETE)
    demo_data(quiet)
    assert len(calls) == 2


def test_demo_data_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phantoms").touch()
    with pytest.raises(DataError, match="phantoms: cannot write"):
        demo_data(quiet)
