"""train.py, run as a user runs it, on a few phantoms."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    EPOCHS,
    PRETRAINED,
    PROJECT,
    SMALL,
    Done,
    assert_same_history,
    assert_same_weights,
    kill_after,
    new_run,
    refused,
    resume_file,
    rows,
    run_program,
)
from PIL import Image

import train
from dataset import OasisDataset
from modules import VQVAE, Discriminator
from preparation import phantoms
from priors.checkpoints import load_prior, load_vqvae
from priors.latent_cache import LatentCache
from priors.spectrum import LARGEST_FACTOR, covariance_spectrum, transport
from support import files, seeds
from support.console import UserError
from support.device import has_fast_bfloat16


def test_the_runs_folder(trained):
    _, run = trained
    expected = {f"epoch_{n}{kind}.png" for n in range(3) for kind in ("", "_single")}
    expected |= {f"gan_epoch_{n}.png" for n in range(3)}
    expected |= {"codebook_comparison.png", "codebook.png", "decoded.png", "gan_losses.png", "gan_measures.png"}
    expected |= {"train_ssim_scores.png", "train_recon_losses.png"}
    expected |= {"vqvae.pth", "generator.pth", "discriminator.pth", "run.json", "metrics.csv", "resume.pth"}
    expected |= {"index.html"}
    assert {path.name for path in run.iterdir()} == expected
    assert re.search(r"<dd>[\d.]+ minutes: steps [\d.]+ \(\d+%\), evaluation ", (run / "index.html").read_text())
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
    for row in rows(run, "dcgan"):
        assert f"Discriminator loss: {float(row['d_loss']):.4f} (phantoms)\n" in done.stdout
    with_numbers = [line for line in done.stdout.splitlines() if re.search(r"\d\.\d", line)]
    assert len(with_numbers) > 20 and all(line.endswith(" (phantoms)") for line in with_numbers)


def test_metrics_csv(trained):
    _, run = trained
    for stage in ("vqvae", "dcgan"):
        assert [row["epoch"] for row in rows(run, stage)] == ["1", "2"]
    assert [row["updates"] for row in rows(run, "vqvae")] == ["4", "4"]  # 15 images: the smaller last batch is kept
    assert [row["updates"] for row in rows(run, "dcgan")] == ["3", "3"]
    assert float(rows(run, "vqvae")[1]["training_loss"]) < float(rows(run, "vqvae")[0]["training_loss"])


def test_run_json(trained, data):
    _, run = trained
    record = json.loads((run / "run.json").read_text())
    assert record["data"] == {
        "folder": str(data),
        "phantoms": True,
        "content": "phantoms, 25 slices of 5 subjects",
        "images": {"train": 15, "validate": 10, "test": 10},
        "digests": {split: OasisDataset(data, split).digest for split in ("train", "validate")},
    }
    assert record["seed"] == 5 and record["options"]["batch_size"] == 4 and record["options"]["lr"] == 1e-3
    bfloat16 = has_fast_bfloat16(torch.device("cpu"))
    assert record["fast_path"] == {"device": "cpu", "plain": False, "bfloat16": bfloat16}
    assert record["torch"] == torch.__version__ and record["device"] == "cpu" and record["resumed"] == []
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", record["commit"])


def test_vqvae_pth_is_a_plain_state_dict_of_the_best_epoch(trained):
    done, run = trained
    state = torch.load(run / "vqvae.pth", weights_only=True)
    assert list(state) == list(VQVAE(64).state_dict())
    best = max(rows(run, "vqvae"), key=lambda row: float(row["ssim_mean"]))
    assert f"Best epoch: {best['epoch']}, validation SSIM {float(best['ssim_mean']):.4f}" in done.stdout


def test_generator_pth_loads_as_weights_only(trained):
    _, run = trained
    contents = torch.load(run / "generator.pth", weights_only=True)
    assert contents["shift"].shape == (64, 64, 64) and contents["scale"].shape == (4, 64, 33)
    assert contents["state_dict"]["net.4.weight"].shape == (64, 64, 4, 4)
    assert contents["gain"].shape == (45, 4, 4) and (contents["gain"] - torch.eye(4)).abs().max() > 0.1
    state = resume_file(run)["state"]["dcgan"]
    assert torch.equal(contents["scale"], state["extra"]["space"]["scale"])
    for key, value in contents["state_dict"].items():  # samples are drawn with the average
        assert torch.equal(value, state["averages"]["generator"][key])
    trained_weight = state["networks"]["generator"]["net.4.weight"]
    assert not torch.equal(state["averages"]["generator"]["net.4.weight"], trained_weight)
    Discriminator().load_state_dict(torch.load(run / "discriminator.pth", weights_only=True))


def test_the_dcgan_is_calibrated_after_each_epoch(trained, data):
    _, run = trained
    prior = load_prior(run / "generator.pth", load_vqvae(run / "vqvae.pth"))
    generated = prior.coefficients(prior.noise(15, seeds.generator(5, "calibration"))).detach()
    real = LatentCache(prior.vqvae, OasisDataset(data, "train"), prior.space).batch(range(15))
    expected = transport(covariance_spectrum(generated), covariance_spectrum(real))
    values = torch.linalg.eigvalsh(expected)  # of 180, some are not at the bounds
    assert ((1.01 / LARGEST_FACTOR < values) & (values < 0.99 * LARGEST_FACTOR)).sum() > 5
    torch.testing.assert_close(prior.gain, expected, rtol=1e-2, atol=1e-3)


def test_raised_epochs_begin_the_dcgan_anew_and_outlast_an_interruption(data, folder, start, request):
    """One epoch, raised to two, but killed before the second is complete: in the end as if it had not been killed."""
    words = ("--data", data, *SMALL, "--epochs", 1, "--dcgan-epochs", 1, "--seed", 5, "--out", "short")
    short = new_run(run_program("train.py", *words, cwd=folder), folder / "short")
    request.getfixturevalue("without_figures")
    more = ("--epochs", 2)
    dry = run_program("train.py", "--resume", short, *more, "--dry-run", cwd=folder)
    assert "so the DCGAN begins anew" in dry.stdout
    calm = shutil.copytree(short, folder / "calm")
    assert run_program("train.py", "--resume", calm, *more, cwd=folder).returncode == 0
    kill_after(start, folder, ("--resume", short, *more), "Device")
    saved = resume_file(short)
    assert saved["options"]["epochs"] == 2 and "dcgan" not in saved["state"]
    assert not (short / "generator.pth").exists() and not (short / "gan_epoch_1.png").exists()
    (short / ".vqvae.pth.123.tmp").touch()  # as a kill may leave it
    done = run_program("train.py", "--resume", short, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not list(short.glob(".*"))
    assert_same_weights(calm, short)
    assert_same_history(calm, short)
    words = (short / "vqvae.pth", "--prior", short / "generator.pth", "--samples", 1, "--out", "r")
    assert run_program("predict.py", *words, cwd=folder).returncode == 0  # they belong together


def test_resuming_with_other_data_is_refused(trained, folder, data, tmp_path):
    _, run = trained
    shutil.copytree(data, tmp_path / "data")
    splits = [tmp_path / "data" / f"keras_png_slices_{split}" for split in ("train", "validate")]
    one, other = splits[0] / "case_001_slice_0.nii.png", splits[1] / "case_004_slice_0.nii.png"
    contents = one.read_bytes()
    one.write_bytes(other.read_bytes())  # as many as before, with a subject exchanged
    other.write_bytes(contents)
    done = run_program("train.py", "--resume", run, "--data", tmp_path / "data", cwd=folder)
    refused(done, "the images of train and validate are not those that the run began with")
    one.unlink()
    done = run_program("train.py", "--resume", run, "--data", tmp_path / "data", cwd=folder)
    refused(done, "'train': 14", "'train': 15")


def test_resuming_refuses_other_options_by_name_and_changes_nothing(trained, folder):
    _, run = trained
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for words, name in (
        (("--lr", "0.1"), "--lr"),
        (("--seed", 1), "--seed"),
        (("--epochs", 1), "--epochs 1"),
        (("--epochs", 3, "--device", "meta"), "--device meta"),
    ):
        refused(run_program("train.py", "--resume", run, *words, cwd=folder), name)
    refused(run_program("train.py", "--resume", "nowhere", cwd=folder), "nowhere")
    with files.locked(run):
        refused(run_program("train.py", "--resume", run, cwd=folder), "another process is at work there")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_resuming_what_does_not_fit_is_refused_in_one_line(trained, folder, tmp_path):
    _, run = trained
    for stage, part, key in (("vqvae", "networks", "vqvae"), ("dcgan", "extra", "space")):
        spoilt = tmp_path / stage
        shutil.copytree(run, spoilt)
        saved = resume_file(spoilt)
        saved["state"][stage][part][key] = {"weight": torch.zeros(3)}
        torch.save(saved, spoilt / "resume.pth")
        refused(run_program("train.py", "--resume", spoilt, cwd=folder), "resume.pth", "start a new run")
    torch.save(resume_file(run) | {"state": {"dcgan": saved["state"]["dcgan"]}}, spoilt / "resume.pth")
    done = run_program("train.py", "--resume", spoilt, "--dry-run", cwd=folder)
    assert "VQ-VAE: 2 epochs of 4 steps, 0 complete" in done.stdout, done.stderr
    torch.save(VQVAE(64).state_dict(), spoilt / "vqvae.pth")
    torch.save(resume_file(run), spoilt / "resume.pth")
    refused(
        run_program("train.py", "--resume", spoilt, cwd=folder),
        "vqvae.pth: is not the one that this run kept",
    )


def test_the_second_stage_alone(trained, data, folder, without_figures):
    _, run = trained
    words = ("--data", data, *SMALL, *EPOCHS, "--seed", 5, "--only", "dcgan")
    done = run_program("train.py", *words, "--vqvae", run / "vqvae.pth", "--out", "dcgan", cwd=folder)
    alone = new_run(done, folder / "dcgan")
    assert_same_weights(run, alone)  # the stages' random numbers are their own
    assert rows(alone, "vqvae") == []
    refused(run_program("train.py", *words, cwd=folder), "--vqvae")
    refused(run_program("train.py", *words, "--vqvae", run / "generator.pth", cwd=folder), "generator.pth", "no VQ-VAE")
    torch.save(VQVAE(64).state_dict(), alone / "vqvae.pth")
    refused(run_program("train.py", "--resume", alone, cwd=folder), "vqvae.pth", "has changed since the DCGAN began")


def test_the_reports_bare_procedure(trained, data, folder, without_figures):
    _, run = trained
    words = ("--data", data, *SMALL, "--dcgan-epochs", 1, "--only", "dcgan", "--vqvae", run / "vqvae.pth")
    done = run_program("train.py", *words, "--dcgan-training", "report", "--out", "bare", cwd=folder)
    bare = new_run(done, folder / "bare")
    saved = torch.load(bare / "generator.pth", weights_only=True)
    state = resume_file(bare)["state"]["dcgan"]
    embeddings = torch.load(run / "vqvae.pth", weights_only=True)["vector_quantizer.embedding.weight"]
    torch.testing.assert_close(saved["scale"], (1 / embeddings.abs().max()).expand(64, 64, 33))
    assert torch.equal(saved["mix"], torch.eye(64)) and not saved["shift"].any() and saved["support"].all()
    assert "gain" not in saved
    for key, value in state["networks"]["generator"].items():  # nothing is averaged
        assert torch.equal(saved["state_dict"][key], value), key
    assert state["extra"]["gain"] is None and len(rows(bare, "dcgan")) == 1


def test_a_dry_run_says_what_would_be_done_and_does_nothing(trained, data, tmp_path):
    _, run = trained
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    for words, said in (
        (("--data", data, "--batch-size", 4), ("VQ-VAE: 12 epochs of 4 steps, 0 complete", "DCGAN: 25 epochs of 1 ")),
        (("--dcgan-epochs", 3), ("would be written to", "VQ-VAE: 8 epochs of 16 steps", "DCGAN: 3 epochs")),
        (
            ("--prior", "autoregressive", "--autoregressive-epochs", 3),
            ("VQ-VAE: 8 epochs of 16 steps", "Autoregressive prior: 3 epochs"),
        ),
        (("--resume", run, "--epochs", 4), ("VQ-VAE: 2 epochs of 4 steps, 2 complete", f"Folder: {run}")),
    ):
        done = run_program("train.py", *words, "--dry-run", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for text in (*said, "Nothing was done"):
            assert text in done.stdout
    assert not list(tmp_path.iterdir())
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    refused(run_program("train.py", "--data", tmp_path / "no", "--dry-run", cwd=tmp_path), "no")
    torch.save(resume_file(run) | {"options": resume_file(run)["options"] | {"data": "gone"}}, tmp_path / "resume.pth")
    refused(run_program("train.py", "--resume", tmp_path, "--dry-run", cwd=tmp_path), "gone")
    (tmp_path / "phantoms" / "keras_png_slices_train").mkdir(parents=True)  # as an interrupted demo leaves it
    (tmp_path / "phantoms" / phantoms.MARKER).touch()
    done = run_program("train.py", "--dry-run", cwd=tmp_path)
    assert "Data: phantoms, which would be written to" in done.stdout, done.stderr
    shutil.copytree(data, tmp_path / "twice")
    of_train = next((tmp_path / "twice" / "keras_png_slices_train").iterdir())
    shutil.copy(of_train, tmp_path / "twice" / "keras_png_slices_validate" / "x.png")
    done = run_program("train.py", "--data", tmp_path / "twice", "--dry-run", cwd=tmp_path)
    refused(done, f"keras_png_slices_train/{of_train.name}; scores would be too good")


AUTOREGRESSIVE = ("--only", "autoregressive", "--autoregressive-epochs", 2, "--autoregressive-batch-size", 6)
AUTOREGRESSIVE += ("--seed", 5, "--device", "cpu")


@pytest.fixture(scope="session")
def autoregressed(trained, data, folder) -> tuple[Done, Path]:
    """A complete run of the autoregressive prior: what it printed, and its folder."""
    words = ("--data", data, *AUTOREGRESSIVE, "--vqvae", trained[1] / "vqvae.pth", "--out", "autoregressive")
    done = run_program("train.py", *words, cwd=folder)
    return done, new_run(done, folder / "autoregressive")


def test_the_autoregressive_priors_folder(autoregressed):
    done, run = autoregressed
    figures = ("epoch_0", "epoch_1", "epoch_2", "losses", "measures")
    expected = {f"autoregressive_{name}.png" for name in figures}
    expected |= {"vqvae.pth", "autoregressive.pth", "run.json", "metrics.csv", "resume.pth", "index.html"}
    assert {path.name for path in run.iterdir()} == expected
    found = rows(run, "autoregressive")
    assert [row["epoch"] for row in found] == ["1", "2"] and all(row["swd"] for row in found)
    best = min(found, key=lambda row: float(row["validation_bits"]))
    line = f"Best epoch: {best['epoch']}, {float(best['validation_bits']):.0f} bits of a validation image (phantoms)"
    assert line in done.stdout
    n_positions = math.prod(load_prior(run / "autoregressive.pth", load_vqvae(run / "vqvae.pth")).frame.size)
    assert 0 < float(found[1]["bits"]) < float(found[0]["bits"]) < 1.2 * n_positions * math.log2(64)
    assert json.loads((run / "run.json").read_text())["recipes"]["autoregressive"]["width"] == 64
    saved = torch.load(run / "autoregressive.pth", weights_only=True)
    if best is found[-1]:
        average = resume_file(run)["state"]["autoregressive"]["averages"]["autoregressive"]
        assert all(torch.equal(saved["state_dict"][key], value) for key, value in average.items())


def test_a_killed_autoregressive_prior_resumed_equals_an_uninterrupted_one(
    autoregressed, trained, data, folder, start, without_figures
):
    words = ("--data", data, *AUTOREGRESSIVE, "--vqvae", trained[1] / "vqvae.pth", "--out", "autoregressive_killed")
    kill_after(start, folder, words, "Epoch: 2")
    (killed,) = (folder / "autoregressive_killed").iterdir()
    assert len(rows(killed, "autoregressive")) == 1
    done = run_program("train.py", "--resume", killed, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert_same_weights(autoregressed[1], killed, ["autoregressive.pth"])
    assert_same_history(autoregressed[1], killed, ["autoregressive"])


def test_new_planes_and_stacks(autoregressed, trained, data, folder):
    run = autoregressed[1]
    words = ("predict.py", run / "vqvae.pth", "--out", "planes", "--samples", 2, "--prior")
    prior, all_planes = run / "autoregressive.pth", folder / "all_planes.pth"
    contents = torch.load(prior, weights_only=True)
    assert contents["planes"] == [0, 8, 16, 23, 31]
    torch.save(contents | {"planes": list(range(32))}, all_planes)

    def made(path, *more) -> tuple[set[str], str]:
        before = {path.name for path in (folder / "planes").glob("*")}
        done = run_program(*words, path, *more, cwd=folder)
        assert done.returncode == 0, done.stderr
        (new,) = {path.name for path in (folder / "planes").glob("*")} - before
        root = folder / "planes" / new
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}, done.stdout

    names, _ = made(prior, "--slice", "16")
    assert names == {"samples.png", "samples/sample_000.png", "samples/sample_001.png", "index.html"}
    refused(run_program(*words, prior, "--slice", "15-16", cwd=folder), "was not trained on plane 15")
    names, printed = made(all_planes, "--slice", "6-8")
    stacked = {f"samples/sample_00{head}_slice_{plane:02d}.png" for head in range(2) for plane in (6, 7, 8)}
    assert names == stacked | {"stack.png", "index.html"} and "Decoded 6 new slices" in printed
    names, printed = made(prior, "--data", data)
    assert {"measures.csv", "likelihood.csv", "most_likely.png", "least_likely.png"} <= names
    bits = re.findall(r"Bits per image, (.*): mean (\d+), from (\d+) to (\d+) \(phantoms\)", printed)
    assert [name for name, *_ in bits] == ["alone", "given neighbours"]
    assert all(int(least) <= int(mean) <= int(most) for _, mean, least, most in bits)
    for strange in ("32", "9-3", "x"):
        refused(run_program(*words, prior, "--slice", strange, cwd=folder), "--slice", "from 0 to 31")
    refused(run_program(*words, prior, "--slice", "3", "--data", data, cwd=folder), "--slice and --data")
    generator = trained[1] / "generator.pth"
    refused(run_program(*words, generator, "--slice", "3", cwd=folder), "--slice", "generator.pth")


@pytest.mark.parametrize(
    "words, unused, stage",
    [
        (("--prior", "autoregressive", "--dcgan-lr", 1), "--dcgan-lr", "DCGAN"),
        (("--autoregressive-epochs", 3), "--autoregressive-epochs", "Autoregressive prior"),
        (("--only", "vqvae", "--dcgan-epochs", 3), "--dcgan-epochs", "DCGAN"),
        (("--only", "dcgan", "--vqvae", PRETRAINED / "vqvae.pth", "--lr", 1), "--lr", "VQ-VAE"),
    ],
)
def test_an_option_of_a_stage_that_is_not_trained_is_named(data, tmp_path, words, unused, stage):
    done = run_program("train.py", "--data", data, *words, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == f"warning: {unused} is for training the {stage}, which this run does not\n"


@pytest.mark.parametrize(
    "words, name",
    [
        (("--data", "/nowhere"), "/nowhere"),
        (("--data", ""), "--data"),
        (("--device", "gpu"), "--device gpu"),
        (("--dcgan-betas", "0.5", "1"), "--dcgan-betas"),
        (("--batch-size", "0"), "--batch-size"),
        (("--dcgan-betas", "0.5"), "--dcgan-betas"),
        (("--beta", "-0.1"), "--beta"),
        (("--n-embeddings", "65537"), "--n-embeddings"),
        (("--seed", "9" * 5000), "--seed"),
        (("--no-such-option",), "--no-such-option"),
        (("--lr", "-1"), "--lr"),
        (("--lr", "nan"), "--lr"),
        (("--epochs", "1.5"), "--epochs"),
        (("--demo", "--data", "."), "--demo and --data"),
        (("--plain", "--precision", "bfloat16"), "--plain and --precision"),
        (("--precision", "float16"), "--precision"),
        (("--vqvae", "x.pth"), "--only dcgan"),
        (("--prior", "autoregressive", "--only", "dcgan"), "--only dcgan and --prior autoregressive"),
    ],
)
def test_bad_options_are_refused_by_name(tmp_path, words, name):
    refused(run_program("train.py", *words, cwd=tmp_path), name)
    assert not list(tmp_path.iterdir())


def test_a_program_of_its_own_refuses_in_one_line_and_finds_its_modules_from_any_folder(tmp_path):
    for script in ("train.py", "predict.py"):
        words = ("nowhere.pth",) if script == "predict.py" else ("--data", "nowhere")
        command = [sys.executable, str(PROJECT / script), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == ""
        assert re.fullmatch(rf"{re.escape(script)}: error: nowhere.*\n", done.stderr)


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
    names = [line.split(",")[0] for line in (out / "scores.csv").read_text().splitlines()[1:]]
    assert len(names) == 9 and "caf\\udce9.png" in names


def test_a_subject_in_two_splits_is_refused_unless_it_is_allowed(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    scan = next((tmp_path / "data" / "keras_png_slices_train").glob("case_002*"))
    shutil.copy(scan, tmp_path / "data" / "keras_png_slices_test")
    words = ("--data", "data", *SMALL, "--epochs", 1, "--only", "vqvae")
    refused(run_program("train.py", *words, cwd=tmp_path), "case 2", "_train", "_test", "--allow-shared-cases")
    assert run_program("train.py", *words, "--allow-shared-cases", "--dry-run", cwd=tmp_path).returncode == 0
    shutil.rmtree(tmp_path / "data" / "keras_png_slices_test")
    refused(run_program("train.py", "--data", "data", cwd=tmp_path), "keras_png_slices_test", "missing")
    shutil.copytree(data / "keras_png_slices_test", tmp_path / "data" / "keras_png_slices_test")
    (tmp_path / "data" / "keras_png_slices_validate" / "case_999_slice_0.nii.png").write_bytes(b"x")
    refused(run_program("train.py", "--data", "data", cwd=tmp_path), "case_999_slice_0.nii.png", "cannot be decoded")
    assert not (tmp_path / "gen_imgs").exists()


def test_half_a_launchers_environment_is_refused(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
        refused(run_program("train.py", "--demo", cwd=tmp_path), "LOCAL_RANK", "MASTER_ADDR", "torchrun")
    assert not list(tmp_path.iterdir())


def test_without_data_and_options_the_demo_starts_and_says_so(tmp_path, monkeypatch):
    def few(folder, write=phantoms.write):
        write(folder, {"train": [1, 2], "validate": [3], "test": [4]}, 8)

    def stop(run, *words):
        with pytest.raises(UserError, match="another process is at work there"), files.locked(run.folder):
            pass
        raise UserError("it has started")

    monkeypatch.setattr(phantoms, "write", few)
    monkeypatch.setattr(train, "train_vqvae", stop)
    done = run_program("train.py", cwd=tmp_path)
    refused(done, "it has started")
    with files.locked(next((tmp_path / "gen_imgs").iterdir())):  # by the run no longer
        pass
    assert "DEMO" in done.stdout and "16 training, 8 validation images): phantoms, 24 slices of 3" in done.stdout
    assert len(list((tmp_path / "phantoms").rglob("case_*.png"))) == 32
    assert {split: len(cases) for split, cases in phantoms.CASES.items()} == {"train": 16, "validate": 2, "test": 2}


def test_help_has_the_defaults_of_the_report(tmp_path):
    text = run_program("train.py", "--help", cwd=tmp_path).stdout
    for option, default in (
        ("--epochs", "12;"),
        ("--batch-size", r"32\)"),
        ("--lr", r"0.001\)"),
        ("--n-embeddings", r"512\)"),
        ("--embeddings-dim", r"64\)"),
        ("--beta", r"0.25\)"),
        ("--dcgan-epochs", "25;"),
        ("--dcgan-batch-size", r"32\)"),
        ("--dcgan-lr", r"0.0002\)"),
        ("--dcgan-betas B1", r"\(0.5, 0.999\)\)"),
        ("--out", "gen_imgs"),
    ):
        assert re.search(rf"{option} \S+\s[^-]*\(default:\s+{default}", text)
