"""predict.py, run as a user runs it: scores, new brains and their measures, exported codes."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import PRETRAINED, refused, rows, run_program
from PIL import Image

import predict
from dataset import OasisDataset
from evaluation import generation
from modules import VQVAE
from priors.checkpoints import load_prior, load_vqvae
from report.plots import Figures


def test_predict_gives_what_training_printed(trained, folder):
    _, run = trained
    words = (run / "vqvae.pth", "--split", "validate", "--device", "cpu", "--out", "v")
    done = run_program("predict.py", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    best = max(rows(run, "vqvae"), key=lambda row: float(row["ssim_mean"]))
    (out,) = (folder / "v").iterdir()
    with open(out / "scores.csv", newline="") as file:
        scores = [float(row["ssim"]) for row in csv.DictReader(file)]
    assert torch.tensor(scores, dtype=torch.double).mean().item() == float(best["ssim_mean"])
    assert (min(scores), max(scores)) == (float(best["ssim_min"]), float(best["ssim_max"]))
    assert f"SSIM mean: {float(best['ssim_mean']):.4f} (phantoms)\n" in done.stdout
    assert (out / "validate_ssim_scores.png").is_file()


def test_the_test_split_is_for_scores_alone():
    assert predict.parse(["x.pth"]).split == "test"
    assert predict.parse(["x.pth", "--prior", "g.pth"]).split == "validate"


def test_a_folder_that_cannot_be_made_is_said_before_scores_take_their_time(trained, folder, monkeypatch):
    monkeypatch.setattr(predict.reconstruction, "score", lambda *_: pytest.fail("it was scored"))
    (folder / "file").touch()
    done = run_program("predict.py", trained[1] / "vqvae.pth", "--out", "file", cwd=folder)
    assert done.returncode == 1 and "file: cannot make a folder there" in done.stderr and "--out" in done.stderr


def test_predict_on_the_test_split(trained, folder, data):
    _, run = trained
    done = run_program("predict.py", f"{run.name}/vqvae.pth", "--out", "t", cwd=folder)  # found under gen_imgs/
    assert done.returncode == 0, done.stderr
    (out,) = (folder / "t").iterdir()
    assert out.name.endswith("_predict")
    pictures = {
        f"{which}_{kind}.png" for which in ("best", "worst") for kind in ("recon", "recon_before", "comparison")
    }
    names = pictures | {"test_ssim_scores.png", "scores.csv", "index.html"}
    assert {path.name for path in out.iterdir()} == names
    with open(out / "scores.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["file"], row["case"], row["slice"]) for row in table] == [
        (f"case_{case:03d}_slice_{s}.nii.png", str(case), str(s)) for case in (6, 7) for s in (0, 8, 16, 23, 31)
    ]
    ssim = [float(row["ssim"]) for row in table]
    above = sum(value >= 0.6 for value in ssim)
    lines = done.stdout.splitlines()
    assert lines[0] == f"Data: {data}, test split: phantoms, 10 slices of 2 subjects"
    begin = [re.split(": |: SSIM", line)[0] for line in lines[1:8]]
    tissues = ["In the brain", "In the CSF", "In the grey matter", "In the white matter"]
    assert begin == [*tissues, "PSNR mean", "Codes used", "Bits per image"]
    assert all(line.endswith(" (phantoms)") for line in lines[1:8])
    assert lines[8:12] == [
        f"SSIM mean: {np.mean(ssim):.4f} (phantoms)",
        f"Min SSIM score: {min(ssim):.4f} (phantoms)",
        f"Max SSIM score: {max(ssim):.4f} (phantoms)",
        f"Number of images with SSIM >= 0.6: {above}, {above / 10:.2%}. (phantoms)",
    ]


def test_the_pretrained_weights_keep_their_scores(data, tmp_path):
    """Weights of an older commit load, and give what they gave on these phantoms when they were committed."""
    done = run_program("predict.py", PRETRAINED / "vqvae.pth", "--data", data, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mean = float(re.search(r"SSIM mean: ([\d.]+) \(phantoms\)", done.stdout)[1])
    assert mean == pytest.approx(0.9712, abs=2e-4)


def test_the_network_of_a_file_has_one_layout_with_any_prior():
    """In another one rounding differs, and with it the last digits of measures."""
    vqvae = load_vqvae(PRETRAINED / "vqvae.pth")
    load_prior(PRETRAINED / "autoregressive.pth", vqvae)
    weight = vqvae.decoder.layers[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_new_brains_need_no_data(trained, tmp_path):
    _, run = trained
    contents = torch.load(run / "generator.pth", weights_only=True)
    contents["state_dict"]["net.4.weight"] *= 50  # after six steps all brains are similar; this separates them
    torch.save(contents, tmp_path / "generator.pth")
    words = (run / "vqvae.pth", "--prior", tmp_path / "generator.pth", "--samples", 5, "--device", "cpu")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = run_program("predict.py", *words, "--seed", seed, "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    a, b, c = ([p.read_bytes() for p in sorted((tmp_path / out).glob("*/samples/*.png"))] for out in "abc")
    assert len(a) == 5 and a == b != c
    sample = Image.open(next((tmp_path / "a").glob("*/samples/sample_000.png")))
    assert sample.mode == "L" and sample.text == {"Comment": "generated, data: phantoms (synthetic)"}
    names = {path.name for path in next((tmp_path / "a").iterdir()).iterdir()}
    assert names == {"index.html", "samples.png", "walk.png", "samples"}


def test_many_brains_are_written_as_they_come(trained, tmp_path, monkeypatch):
    """In batches the noise is the same, memory holds one batch, and the grid has the first brains."""
    words = ("predict.py", trained[1] / "vqvae.pth", "--prior", trained[1] / "generator.pth", "--samples", 5)
    assert run_program(*words, "--out", "a", cwd=tmp_path).returncode == 0
    monkeypatch.setattr(predict, "AT_ONCE", 2)
    monkeypatch.setattr(predict, "MOST_SHOWN", 3)
    grids = []
    monkeypatch.setattr(Figures, "image_grid", lambda self, name, images, *rest: grids.append((name, images, rest)))
    assert run_program(*words, "--out", "b", cwd=tmp_path).returncode == 0
    a, b = (
        np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / out).glob("*/samples/*.png"))])
        for out in "ab"
    )
    assert len(a) == 5 and np.abs(a.astype(int) - b).max() <= 1  # the size of a batch may change how sums are rounded
    (name, shown, (title,)), _ = grids
    assert name == "samples.png" and title.startswith("3 of 5 generated brains") and len(shown) == 3
    assert np.abs((shown[:, 0] * 255).numpy() - b[:3]).max() <= 0.51


def test_exported_codes_there_and_back(trained, data, tmp_path):
    _, run = trained
    words = (run / "vqvae.pth", "--split", "validate", "--export-codes", "codes.npz")
    done = run_program("predict.py", *words, cwd=tmp_path)
    assert done.returncode == 0 and "the 10 validate images to codes.npz" in done.stdout, done.stderr
    contents = np.load(tmp_path / "codes.npz")
    assert contents["codes"].shape == (10, 64, 64) and contents["codes"].dtype == np.uint16
    assert contents["case"].tolist() == [4] * 5 + [5] * 5 and contents["slice"].tolist() == [0, 8, 16, 23, 31] * 2
    assert contents["name"][1] == "case_004_slice_8.nii.png"
    vqvae = load_vqvae(run / "vqvae.pth")
    codes = torch.from_numpy(contents["codes"].astype(np.int64))
    found = vqvae.encode(OasisDataset(data, "validate").batch(range(10)))
    assert (codes != found).sum() <= 4  # another batch size may round a latent to another code
    np.testing.assert_array_equal(contents["codebook"], vqvae.vector_quantizer.embedding.weight.detach().numpy())
    z_q = torch.from_numpy(contents["codebook"])[codes].permute(0, 3, 1, 2)  # the codebook alone is enough
    torch.testing.assert_close(vqvae.decoder(z_q), vqvae.decode(codes), rtol=0, atol=1e-5)


def test_generated_brains_are_measured_against_a_split(trained, data, tmp_path, monkeypatch):
    """And `python -m evaluation` finds the same, to the last digit, in the files that were written."""
    monkeypatch.setattr(generation, "FEWEST_COMPARED", 5)
    _, run = trained
    prior = ("--prior", run / "generator.pth", "--samples", 7, "--data", data, "--split", "validate")
    done = run_program("predict.py", run / "vqvae.pth", *prior, "--out", "a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "a").iterdir()
    splits = [data / f"keras_png_slices_{split}" for split in ("validate", "train")]
    words = (splits[0], made / "samples", "--train", splits[1], "--vqvae", run / "vqvae.pth", "--reconstruct", "real")
    again = run_program("evaluation", *words, "--out", "b", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    (scored,) = (tmp_path / "b").iterdir()
    tables = [(folder / "measures.csv").read_text() for folder in (made, scored)]
    assert tables[0] == tables[1]
    (*measures, nearest) = csv.DictReader(tables[0].splitlines())
    assert [row["measure"] for row in measures] == list(generation.MEASURES.values())
    for row in measures:
        limits = [f"{float(row[f'scored, {limit}']):.4f}" for limit in ("low", "high") if row[f"scored, {limit}"]]
        value = f"{float(row['scored']):.4f}" + (f" [{', '.join(limits)}]" if limits else "")
        assert f"{row['measure']}: {value} (other subjects: " in done.stdout
    lines = [set(each.stdout.replace(" (phantoms)", "").splitlines()) for each in (done, again)]
    assert len([line for line in lines[0] & lines[1] if ": " in line]) >= len(measures) + 2
    with open(made / "nearest.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 7 and all(0 < float(row["distance"]) < 1 for row in found) and float(nearest["scored"]) > 0
    names = {path.name for path in scored.iterdir()}
    assert names == {"index.html", "measures.csv", "measures.png", "nearest.csv", "nearest.png", "fake.png", "real.png"}


def test_what_cannot_be_scored_is_refused_in_one_line(trained, data, folder, tmp_path):
    _, run = trained
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for name in ("text.pth", "nowhere.pth"):
        refused(run_program("predict.py", tmp_path / name, "--data", data, cwd=folder), name)
    refused(run_program("predict.py", run / "generator.pth", "--data", data, cwd=folder), "generator.pth", "no VQ-VAE")
    for data in ("nowhere", ""):
        refused(run_program("predict.py", run / "vqvae.pth", "--data", data, cwd=folder), data, "--data")
    shutil.copy(run / "vqvae.pth", tmp_path / "alone.pth")
    refused(run_program("predict.py", tmp_path / "alone.pth", cwd=tmp_path), "--data")  # no phantoms unasked
    assert not (tmp_path / "phantoms").exists()
    torch.save(VQVAE(64).state_dict(), tmp_path / "other.pth")
    words = ("--prior", run / "generator.pth")
    refused(run_program("predict.py", tmp_path / "other.pth", *words, cwd=folder), "another codebook")


@pytest.mark.parametrize(
    "words",
    [
        ("--samples", "0"),
        ("--samples", "9999999"),
        ("--seed", "-1"),
        ("--samples", "5"),  # nothing without --prior
        ("--seed", "5"),
        ("--split", "validate", "--prior", "g.pth"),  # nothing without --data
        ("--split", "train", "--prior", "g.pth", "--data", "."),
    ],
)
def test_bad_options_are_refused_by_name(words, capsys):
    with pytest.raises(SystemExit) as caught:
        predict.parse(["x.pth", *words])
    assert caught.value.code == 2 and f"error: {words[0]}" in capsys.readouterr().err.replace("argument ", "")


def test_codes_and_samples_are_computed_in_exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    for name in ("score", "generate", "export_codes"):
        monkeypatch.setattr(predict, name, lambda o, vqvae: seen.append(torch.backends.cudnn.allow_tf32))
    for words in ((), ("--prior", "g.pth"), ("--export-codes", "c.npz")):
        predict.main([str(PRETRAINED / "vqvae.pth"), "--device", "cpu", *words])
    assert seen == [False] * 3 and torch.backends.cudnn.allow_tf32
