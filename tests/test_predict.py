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
from training.vqvae import load_vqvae


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
    assert mean == pytest.approx(0.9508, abs=2e-4)


def test_new_brains_need_no_data(trained, tmp_path):
    _, run = trained
    contents = torch.load(run / "generator.pth", weights_only=True)
    contents["state_dict"]["net.4.weight"] *= 50  # after six steps all brains are similar; this separates them
    torch.save(contents, tmp_path / "generator.pth")
    words = (run / "vqvae.pth", "--generator", tmp_path / "generator.pth", "--samples", 5, "--device", "cpu")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = run_program("predict.py", *words, "--seed", seed, "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    a, b, c = ([p.read_bytes() for p in sorted((tmp_path / out).glob("*/sample_*.png"))] for out in "abc")
    assert len(a) == 5 and a == b != c
    sample = Image.open(next((tmp_path / "a").glob("*/sample_000.png")))
    assert sample.mode == "L" and sample.text == {"Comment": "generated, data: phantoms (synthetic)"}
    names = {path.name for path in next((tmp_path / "a").iterdir()).iterdir()}
    assert names == {"index.html", "samples.png", "walk.png", *(f"sample_{i:03d}.png" for i in range(5))}


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


def shown(row: dict, column: str) -> str:
    """A measure as it is printed, with the limits that a row of measures.csv has."""
    limits = [f"{float(row[column + limit]):.4f}" for limit in (", low", ", high") if row[column + limit]]
    return f"{float(row[column]):.4f}" + (f" [{', '.join(limits)}]" if limits else "")


def test_generated_brains_are_measured_against_a_split(trained, data, tmp_path):
    _, run = trained
    words = (run / "vqvae.pth", "--generator", run / "generator.pth", "--samples", 2, "--data", data)
    tables = []
    for out in "ab":  # the run's own seed
        done = run_program("predict.py", *words, "--seed", 5, "--split", "validate", "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        with open(next((tmp_path / out).glob("*/measures.csv")), newline="") as file:
            tables.append(list(csv.DictReader(file)))
    table = tables[0]
    assert table == tables[1] and len(table) == 24
    for row in table:
        value, beside, worst = (shown(row, column) for column in ("generated", "beside", "independent codes"))
        line = f"{row['measure']}: {value} ({row['what stands beside']}: {beside}; independent codes: {worst})"
        assert f"{line} (phantoms)\n" in done.stdout
    last = rows(run, "gan")[1]  # as train.py printed it
    for key, name in (generation.DISTANCES | generation.INDICES | generation.COMPARISONS).items():
        (value,) = [float(row["generated"]) for row in table if row["measure"] == name]
        assert value == pytest.approx(float(last[key]), rel=1e-5, nan_ok=True)
    mean = table[5]
    assert mean["measure"].endswith("mean")
    for column in ("generated", "beside"):
        assert float(mean[column]) == pytest.approx(np.mean([float(row[column]) for row in table[:5]]))


def test_what_cannot_be_scored_is_refused_in_one_line(trained, data, folder, tmp_path):
    _, run = trained
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for name in ("text.pth", "nowhere.pth"):
        refused(run_program("predict.py", tmp_path / name, "--data", data, cwd=folder), name)
    refused(run_program("predict.py", run / "generator.pth", "--data", data, cwd=folder), "generator.pth", "no VQ-VAE")
    refused(run_program("predict.py", run / "vqvae.pth", "--data", "nowhere", cwd=folder), "nowhere", "--data")
    shutil.copy(run / "vqvae.pth", tmp_path / "alone.pth")
    refused(run_program("predict.py", tmp_path / "alone.pth", cwd=tmp_path), "--data")  # no phantoms unasked
    assert not (tmp_path / "phantoms").exists()
    torch.save(VQVAE(64).state_dict(), tmp_path / "other.pth")
    words = ("--generator", run / "generator.pth")
    refused(run_program("predict.py", tmp_path / "other.pth", *words, cwd=folder), "another codebook")


@pytest.mark.parametrize(
    "words",
    [
        ("--samples", "0"),
        ("--samples", "9999999"),
        ("--seed", "-1"),
        ("--samples", "5"),  # nothing without --generator
        ("--seed", "5"),
        ("--split", "validate", "--generator", "g.pth"),  # nothing without --data
        ("--split", "train", "--generator", "g.pth", "--data", "."),
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
    for words in ((), ("--generator", "g.pth"), ("--export-codes", "c.npz")):
        predict.main([str(PRETRAINED / "vqvae.pth"), "--device", "cpu", *words])
    assert seen == [False] * 3 and torch.backends.cudnn.allow_tf32
