"""train.py and predict.py run as a user runs them, on a few phantoms."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT, assert_same_history, assert_same_weights, new_run, quiet, rows, run_program
from PIL import Image

import predict
from dataset import OasisDataset
from modules import VQVAE

SMALL = ("--batch-size", 4, "--gan-batch-size", 6, "--n-embeddings", 64, "--device", "cpu")
EPOCHS = ("--epochs", 2, "--gan-epochs", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def trained(data, folder):
    """A complete run of both stages: what it printed, and its folder."""
    done = run_program("train.py", "--data", data, *SMALL, *EPOCHS, "--seed", 5, cwd=folder)
    return done, new_run(done, folder / "gen_imgs")


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """It ended with one line that has these words, and no traceback."""
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "error: " in last and "Traceback" not in done.stderr
    for word in words:
        assert word in last


def test_the_runs_folder(trained):
    _, run = trained
    expected = {f"epoch_{n}{kind}.png" for n in range(3) for kind in ("", "_single")}
    expected |= {f"gan_epoch_{n}.png" for n in range(3)}
    expected |= {"codebook_comparison.png", "codebook.png", "decoded.png", "gan_losses.png", "gan_measures.png"}
    expected |= {"train_ssim_scores.png", "train_recon_losses.png", "rate_distortion.png"}
    expected |= {"vqvae.pth", "generator.pth", "discriminator.pth", "run.json", "metrics.csv", "resume.pth"}
    expected |= {"index.html"}
    assert {path.name for path in run.iterdir()} == expected
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)
    for path in run.glob("*.png"):
        assert np.asarray(Image.open(path)).std() > 1, path.name


def test_console_lines_are_the_reports(trained):
    done, run = trained
    number = r"\d+\.\d+(e-\d+)? \(phantoms\)"
    for row in rows(run, "vqvae"):
        block = (
            rf"Epoch: {row['epoch']}\nTraining loss: {number}\nValidation avg\. SSIM loss: {number}\n"
            rf"Max SSIM loss: {number}\nMin SSIM loss: {number}\nCodebook usage: \d+ of 64 codes, perplexity "
        )
        assert re.search(block, done.stdout)
        for key in ("training_loss", "ssim_mean", "ssim_max", "ssim_min"):
            assert f": {row[key]} (phantoms)" in done.stdout


def test_metrics_csv(trained):
    _, run = trained
    for stage in ("vqvae", "gan"):
        assert [row["epoch"] for row in rows(run, stage)] == ["1", "2"]
    assert [row["updates"] for row in rows(run, "vqvae")] == ["4", "4"]  # 15 images: the smaller last batch is kept
    assert [row["updates"] for row in rows(run, "gan")] == ["3", "3"]
    assert float(rows(run, "vqvae")[1]["training_loss"]) < float(rows(run, "vqvae")[0]["training_loss"])


def test_run_json(trained, data):
    _, run = trained
    record = json.loads((run / "run.json").read_text())
    assert record["data"] == {
        "folder": str(data),
        "phantoms": True,
        "images": {"train": 15, "validate": 10, "test": 10},
    }
    assert record["seed"] == 5 and record["options"]["batch_size"] == 4 and record["options"]["lr"] == 1e-3
    assert record["options"]["fast_path"] == {"device": "cpu", "plain": False, "bfloat16": False, "compiled": False}
    assert record["torch"] == torch.__version__ and record["device"] == "cpu" and record["resumed"] == []
    assert re.fullmatch(r"[0-9a-f]{40}( with changes)?|unknown", record["commit"])


def test_vqvae_pth_is_a_plain_state_dict_of_the_best_epoch(trained):
    done, run = trained
    state = torch.load(run / "vqvae.pth", weights_only=True)
    assert list(state) == list(VQVAE(64).state_dict())
    best = max(rows(run, "vqvae"), key=lambda row: float(row["ssim_mean"]))
    assert f"Best epoch: {best['epoch']}, validation SSIM {float(best['ssim_mean']):.4f}" in done.stdout


def test_generator_pth_loads_as_weights_only(trained):
    _, run = trained
    contents = torch.load(run / "generator.pth", weights_only=True)
    assert contents["shift"].shape == (64,) and contents["scale"].shape == (64, 64)
    assert contents["state_dict"]["net.4.weight"].shape == (64, 64, 4, 4)
    state = torch.load(run / "resume.pth", weights_only=True)["state"]["gan"]
    for key, value in contents["state_dict"].items():  # samples are drawn with the average
        assert torch.equal(value, state["average"][key])
    assert not torch.equal(state["average"]["net.4.weight"], state["generator"]["net.4.weight"])


def test_predict_gives_what_training_printed(trained, folder):
    _, run = trained
    done = run_program(
        "predict.py", run / "vqvae.pth", "--split", "validate", "--device", "cpu", "--out", "v", cwd=folder
    )
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
        "test_ssim_scores.png",
        "best_recon_before.png",
        "best_recon.png",
        "worst_recon_before.png",
        "worst_recon.png",
    }
    pictures |= {"best_comparison.png", "worst_comparison.png"}
    assert {path.name for path in out.iterdir()} == pictures | {"scores.csv", "index.html"}
    with open(out / "scores.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["file"], row["case"], row["slice"]) for row in table] == [
        (f"case_{case:03d}_slice_{s}.nii.png", str(case), str(s)) for case in (6, 7) for s in (0, 8, 16, 23, 31)
    ]
    ssim = [float(row["ssim"]) for row in table]
    above = sum(value >= 0.6 for value in ssim)
    assert [line.split(":")[0] for line in done.stdout.splitlines()[:3]] == ["PSNR mean", "Codes used", "Bits an image"]
    assert done.stdout.splitlines()[3:7] == [
        f"SSIM mean: {np.mean(ssim):.4f} (phantoms)",
        f"Min SSIM score: {min(ssim):.4f} (phantoms)",
        f"Max SSIM score: {max(ssim):.4f} (phantoms)",
        f"Number of images with SSIM >= 0.6: {above}, {above / 10:.2%}. (phantoms)",
    ]


def test_the_pretrained_weights_keep_their_scores(data, tmp_path):
    """Weights of an older commit load, and give what they gave on these phantoms when they were committed."""
    path = PROJECT / "resources" / "pretrained" / "vqvae.pth"
    done = run_program("predict.py", path, "--data", data, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mean = float(re.search(r"SSIM mean: ([\d.]+) \(phantoms\)", done.stdout)[1])
    assert mean == pytest.approx(0.9651, abs=2e-4)


def test_new_brains_need_no_data(trained, folder, tmp_path):
    _, run = trained
    contents = torch.load(run / "generator.pth", weights_only=True)
    contents["state_dict"]["net.4.weight"] *= 50  # six updates leave all brains alike; this tells the noise apart
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
    vqvae = VQVAE.from_state_dict(torch.load(run / "vqvae.pth", weights_only=True))
    scans = OasisDataset(data, "validate", progress=quiet).__getitems__(range(10))
    codes = torch.from_numpy(contents["codes"].astype(np.int64))
    assert (codes != vqvae.encode(scans)).sum() <= 4  # another batch size may round a latent to another code
    np.testing.assert_array_equal(contents["codebook"], vqvae.vector_quantizer.embedding.weight.detach().numpy())
    decoded = vqvae.decoder(
        torch.from_numpy(contents["codebook"])[codes].permute(0, 3, 1, 2)
    )  # the codebook alone does
    torch.testing.assert_close(decoded, vqvae.decode(codes), rtol=0, atol=1e-5)


def test_generated_brains_are_measured_against_a_split(trained, data, tmp_path):
    _, run = trained
    words = (run / "vqvae.pth", "--generator", run / "generator.pth", "--samples", 2, "--data", data)
    words += ("--seed", 5)  # the run's own
    tables = []
    for out in "ab":
        done = run_program("predict.py", *words, "--split", "validate", "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        with open(next((tmp_path / out).glob("*/measures.csv")), newline="") as file:
            tables.append(list(csv.DictReader(file)))
    assert tables[0] == tables[1] and len(tables[0]) == 9
    for row in tables[0]:
        value, beside, worst = (f"{float(row[column]):.4f}" for column in ("generated", "beside", "independent codes"))
        line = f"{row['measure']}: {value} ({row['what stands beside']}: {beside}; independent codes: {worst})"
        assert f"{line} (phantoms)\n" in done.stdout
    last = rows(run, "gan")[1]  # as train.py saw it
    for row, name in zip(tables[0], (f"swd_{256 >> level}" for level in range(5)), strict=False):
        assert float(row["generated"]) == pytest.approx(float(last[name]), rel=1e-5)
    mean = tables[0][5]
    assert mean["measure"].endswith("mean")
    for column in ("generated", "beside"):
        assert float(mean[column]) == pytest.approx(np.mean([float(row[column]) for row in tables[0][:5]]))


def test_same_seed_same_weights_and_another_seed_others(trained, data, folder):
    _, run = trained
    again = run_program("train.py", "--data", data, *SMALL, *EPOCHS, "--seed", 5, "--out", "again", cwd=folder)
    assert_same_weights(run, new_run(again, folder / "again"))
    other = run_program(
        "train.py", "--data", data, *SMALL, "--epochs", 1, "--only", "vqvae", "--out", "other", cwd=folder
    )
    a, b = (torch.load(r / "vqvae.pth", weights_only=True) for r in (run, new_run(other, folder / "other")))
    assert not torch.equal(a["conv1.weight"], b["conv1.weight"])


def kill_after(command, cwd, line: str, times: int) -> None:
    """Start a program and kill it, as a power cut would, when it has printed a line a number of times."""
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for printed in process.stdout:
            times -= printed.startswith(line)
            if times == 0:
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL


def test_killed_and_resumed_equals_uninterrupted(trained, data, folder):
    _, run = trained
    command = [sys.executable, PROJECT / "train.py"]
    new = [*command, "--data", data, *SMALL, *EPOCHS, "--seed", 5, "--out", "killed"]
    kill_after([*map(str, new)], folder, "Epoch: 2", 1)  # before VQ-VAE epoch 2 is complete on disk
    (killed,) = (folder / "killed").iterdir()
    assert len(rows(killed, "vqvae")) == 1
    kill_after([*map(str, command), "--resume", str(killed)], folder, "Epoch: 2", 2)  # in the DCGAN's second epoch
    assert len(rows(killed, "vqvae")) == 2 and len(rows(killed, "gan")) == 1
    done = run_program("train.py", "--resume", killed, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "after vqvae epoch 2, gan epoch 1" in done.stdout
    assert_same_weights(run, killed)
    assert_same_history(run, killed)
    assert {path.name for path in killed.iterdir()} == {path.name for path in run.iterdir()}
    assert len(json.loads((killed / "run.json").read_text())["resumed"]) == 2


def test_resuming_a_codebook_of_moving_averages(data, folder):
    words = ("--data", data, *SMALL, "--only", "vqvae", "--codebook", "ema")
    whole = new_run(run_program("train.py", *words, "--epochs", 2, "--out", "ema", cwd=folder), folder / "ema")
    half = new_run(run_program("train.py", *words, "--epochs", 1, "--out", "ema_1", cwd=folder), folder / "ema_1")
    done = run_program("train.py", "--resume", half, "--epochs", 2, cwd=folder)
    assert done.returncode == 0, done.stderr
    saved = [torch.load(run / "resume.pth", weights_only=True)["state"]["vqvae"] for run in (whole, half)]
    for key in ("model", "average"):
        assert all(torch.equal(value, saved[1][key][name]) for name, value in saved[0][key].items())
    for key in ("ema_counts", "ema_sums"):
        assert torch.equal(saved[0][key], saved[1][key])
    assert (saved[0]["ema_counts"] > 1).any()


def test_raising_the_epochs_of_a_complete_run(trained, data, folder):
    _, run = trained
    done = run_program(
        "train.py", "--data", data, *SMALL, "--epochs", 1, "--gan-epochs", 1, "--seed", 5, "--out", "short", cwd=folder
    )
    short = new_run(done, folder / "short")
    done = run_program("train.py", "--resume", short, *EPOCHS, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "the DCGAN begins anew" in done.stdout
    assert_same_weights(run, short)
    assert_same_history(run, short)


def test_raised_epochs_outlast_an_interruption(trained, folder):
    _, run = trained
    copied = folder / "raised"
    shutil.copytree(run, copied)
    command = [sys.executable, str(PROJECT / "train.py"), "--resume", str(copied), "--epochs", "3"]
    kill_after(command, folder, "Device", 1)  # before the third epoch is complete
    saved = torch.load(copied / "resume.pth", weights_only=True)
    assert saved["options"]["epochs"] == 3 and "gan" not in saved["state"]
    assert not (copied / "generator.pth").exists() and not (copied / "gan_epoch_2.png").exists()
    for younger in ("gan_betas", "precision", "plain", "fast_path", "codebook"):  # as if the run were older than these
        del saved["options"][younger]
    for row in saved["rows"]:
        row.pop("psnr_mean", None)
    saved["state"]["vqvae"]["usage"].zero_()  # what older runs may have saved
    torch.save(saved, copied / "resume.pth")
    done = run_program("train.py", "--resume", copied, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(rows(copied, "vqvae")) == 3 and len(rows(copied, "gan")) == 2
    words = (copied / "vqvae.pth", "--generator", copied / "generator.pth", "--samples", 1, "--out", "r")
    assert run_program("predict.py", *words, cwd=folder).returncode == 0  # they belong together


def test_resuming_with_other_data_is_refused(trained, folder, data, tmp_path):
    _, run = trained
    shutil.copytree(data, tmp_path / "data")
    next((tmp_path / "data" / "keras_png_slices_train").glob("*.png")).unlink()
    refused(
        run_program("train.py", "--resume", run, "--data", tmp_path / "data", cwd=folder), "'train': 14", "'train': 15"
    )


def test_resuming_refuses_other_options_by_name(trained, folder):
    _, run = trained
    for words, name in ((("--lr", "0.1"), "--lr"), (("--seed", 1), "--seed"), (("--epochs", 1), "--epochs 1")):
        refused(run_program("train.py", "--resume", run, *words, cwd=folder), name)
    refused(run_program("train.py", "--resume", "nowhere", cwd=folder), "nowhere")


def test_a_refused_command_costs_nothing(trained, folder, tmp_path):
    _, run = trained
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    refused(run_program("train.py", "--resume", copied, "--epochs", 3, "--device", "meta", cwd=folder), "--device meta")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        path.name: path.read_bytes() for path in run.iterdir()
    }


def test_resuming_what_does_not_fit_is_refused_in_one_line(trained, folder, tmp_path):
    _, run = trained
    for stage, key in (("vqvae", "model"), ("gan", "discriminator_optimizer")):
        spoilt = tmp_path / stage
        shutil.copytree(run, spoilt)
        saved = torch.load(spoilt / "resume.pth", weights_only=True)
        saved["state"][stage][key] = {"weight": torch.zeros(3)}
        torch.save(saved, spoilt / "resume.pth")
        refused(run_program("train.py", "--resume", spoilt, cwd=folder), "resume.pth", "start a new run")


def test_the_second_stage_alone(trained, data, folder):
    _, run = trained
    words = ("--data", data, *SMALL, *EPOCHS, "--seed", 5, "--only", "gan")
    done = run_program("train.py", *words, "--vqvae", run / "vqvae.pth", "--out", "gan", cwd=folder)
    alone = new_run(done, folder / "gan")
    assert_same_weights(run, alone)  # the stages' random numbers are their own
    assert rows(alone, "vqvae") == []
    refused(run_program("train.py", *words, cwd=folder), "--vqvae")
    refused(run_program("train.py", *words, "--vqvae", run / "generator.pth", cwd=folder), "generator.pth", "no VQ-VAE")


def test_a_dry_run_says_what_would_be_done_and_does_nothing(trained, data, tmp_path):
    _, run = trained
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    for words, said in (
        (("--data", data, "--batch-size", 4), ("VQ-VAE: 12 epochs of 4 updates, 0 done", "DCGAN: 25 epochs of 1 ")),
        (("--gan-epochs", 3), ("would be written to", "VQ-VAE: 5 epochs of 16 updates", "DCGAN: 3 epochs")),
        (("--resume", run, "--epochs", 4), ("VQ-VAE: 2 epochs of 4 updates, 2 done before", f"Folder: {run}")),
    ):
        done = run_program("train.py", *words, "--dry-run", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for text in (*said, "Nothing was done"):
            assert text in done.stdout
    assert not list(tmp_path.iterdir())
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    refused(run_program("train.py", "--data", tmp_path / "no", "--dry-run", cwd=tmp_path), "no")


def test_the_reports_bare_procedure(trained, data, folder):
    _, run = trained
    words = ("--data", data, *SMALL, "--gan-epochs", 1, "--only", "gan", "--vqvae", run / "vqvae.pth")
    done = run_program("train.py", *words, "--gan-training", "report", "--out", "bare", cwd=folder)
    bare = new_run(done, folder / "bare")
    saved = torch.load(bare / "generator.pth", weights_only=True)
    state = torch.load(bare / "resume.pth", weights_only=True)["state"]["gan"]
    embeddings = torch.load(run / "vqvae.pth", weights_only=True)["vector_quantizer.embedding.weight"]
    assert torch.equal(saved["scale"], torch.eye(64) * embeddings.abs().max()) and not saved["shift"].any()
    for key, value in state["generator"].items():  # nothing is averaged
        assert torch.equal(saved["state_dict"][key], value), key
    assert "ahead" not in state and len(rows(bare, "gan")) == 1


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
    "words, name",
    [
        (("--data", "/nowhere"), "/nowhere"),
        (("--data", ""), "--data"),
        (("--device", "gpu"), "--device gpu"),
        (("--gan-betas", "0.5", "1"), "--gan-betas"),
        (("--batch-size", "0"), "--batch-size"),
        (("--lr", "-1"), "--lr"),
        (("--lr", "nan"), "--lr"),
        (("--epochs", "1.5"), "--epochs"),
        (("--demo", "--data", "."), "--demo and --data"),
        (("--plain", "--precision", "bfloat16"), "--plain and --precision"),
        (("--precision", "float16"), "--precision"),
        (("--vqvae", "x.pth"), "--only gan"),
    ],
)
def test_bad_options_are_refused_by_name(tmp_path, words, name):
    refused(run_program("train.py", *words, cwd=tmp_path), name)
    assert not list(tmp_path.iterdir())


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
def test_bad_options_of_predict_are_refused_by_name(words, capsys):
    with pytest.raises(SystemExit) as caught:
        predict.parse(["x.pth", *words])
    assert caught.value.code == 2 and f"error: {words[0]}" in capsys.readouterr().err.replace("argument ", "")


def test_going_on_without_bad_scans_and_with_names_that_are_no_text(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for split in ("train", "test"):
        scans = sorted((tmp_path / "data" / f"keras_png_slices_{split}").iterdir())
        scans[3].write_bytes(scans[3].read_bytes()[:5000])
        os.rename(scans[0], os.fsencode(scans[0].parent) + b"/caf\xe9.png")
    words = ("--data", "data", *SMALL, "--epochs", 1, "--only", "vqvae")
    refused(run_program("train.py", *words, cwd=tmp_path), scans[3].name.replace("006", "001"), "--skip-bad")
    done = run_program("train.py", *words, "--skip-bad", cwd=tmp_path)
    run = new_run(done, tmp_path / "gen_imgs")
    assert "Left out of train: 1 of 15 files.\n" in done.stdout and "runcated" in done.stdout
    assert json.loads((run / "run.json").read_text())["data"]["images"] == {"train": 14, "validate": 10, "test": 10}
    refused(run_program("predict.py", run / "vqvae.pth", cwd=tmp_path), scans[3].name, "--skip-bad")
    done = run_program("predict.py", run / "vqvae.pth", "--skip-bad", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0 and "Left out of test: 1 of 10 files.\n" in done.stdout
    (out,) = (tmp_path / "out").iterdir()
    with open(out / "scores.csv", newline="") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    assert len(names) == 9 and "caf\\udce9.png" in names


def test_a_subject_in_two_splits_is_refused_unless_it_is_allowed(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    scan = next((tmp_path / "data" / "keras_png_slices_train").glob("case_002*"))
    shutil.copy(scan, tmp_path / "data" / "keras_png_slices_test")
    words = ("--data", "data", *SMALL, "--epochs", 1, "--only", "vqvae")
    refused(run_program("train.py", *words, cwd=tmp_path), "case 2", "_train", "_test", "--allow-shared-cases")
    assert not (tmp_path / "gen_imgs").exists()
    assert run_program("train.py", *words, "--allow-shared-cases", cwd=tmp_path).returncode == 0


def test_a_rate_that_makes_the_loss_infinite_stops_the_run(trained, data, tmp_path):
    _, run = trained
    done = run_program("train.py", "--data", data, *SMALL, "--epochs", 3, "--lr", 1e30, cwd=tmp_path)
    refused(done, "VQ-VAE epoch 1, update 2", "not finite", "learning rate")
    words = ("--batch-size", 15, "--n-embeddings", 16, "--embeddings-dim", 4, "--only", "vqvae", "--lr", 1e39)
    done = run_program("train.py", "--data", data, *words, "--out", "one", cwd=tmp_path)
    # one update an epoch: its loss, before the step, is finite, and what the step leaves is not
    refused(done, "VQ-VAE epoch 1, update 1", "not finite")
    assert not list((tmp_path / "one").glob("*/*.pth"))
    words = ("--only", "gan", "--vqvae", run / "vqvae.pth", "--gan-epochs", 3, "--gan-lr", 1e30)
    done = run_program("train.py", "--data", data, *SMALL, *words, cwd=tmp_path)
    refused(done, "DCGAN epoch 1, update", "not finite", "learning rate")


def test_bad_data_is_refused_before_a_folder_is_made(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "keras_png_slices_validate" / "case_999_slice_0.nii.png").write_bytes(b"x")
    refused(run_program("train.py", "--data", "data", cwd=tmp_path), "case_999_slice_0.nii.png", "cannot be decoded")
    shutil.rmtree(tmp_path / "data" / "keras_png_slices_test")
    refused(run_program("train.py", "--data", "data", cwd=tmp_path), "keras_png_slices_test", "missing")
    assert not (tmp_path / "gen_imgs").exists()


def test_an_environment_of_half_a_launcher_is_refused(tmp_path):
    done = run_program("train.py", "--demo", cwd=tmp_path, WORLD_SIZE="2")
    refused(done, "LOCAL_RANK", "torchrun")
    assert not list(tmp_path.iterdir())


def test_without_data_and_options_the_demo_starts_and_says_so(tmp_path):
    words = [sys.executable, "-u", str(PROJECT / "train.py")]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        first = [process.stdout.readline() for _ in range(6)]
        process.kill()
    assert "DEMO" in first[1] and "phantoms" in first[1]
    assert re.search(r"512 training, 64 validation images\) \(phantoms\)", first[4])
    assert len(list((tmp_path / "phantoms").rglob("*.png"))) == 640


def test_help_names_every_option_with_its_default():
    text = run_program("train.py", "--help", cwd=PROJECT).stdout
    for option, default in (("--epochs", "12"), ("--gan-lr", "0.0002"), ("--beta", "0.25"), ("--out", "gen_imgs")):
        assert re.search(rf"{option} \S+\s[^-]*\(default:\s+{default}\)", text)
