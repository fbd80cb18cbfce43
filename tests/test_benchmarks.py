"""The benchmarks run, and their reference computes what ours does."""

import io
import json
import math
import sys
from dataclasses import asdict

import ablation
import gpu_check
import lesions
import limits
import measures
import numpy as np
import peers
import pytest
import rate_codecs
import speed
import stacks
import time_to_quality
import torch
import torch.nn.functional as F
from conftest import PRETRAINED, resume_file
from skimage.metrics import structural_similarity

from dataset import OasisDataset
from evaluation import generation
from modules import VQVAE
from priors.checkpoints import load_vqvae
from support.console import UserError
from support.device import has_fast_bfloat16
from training import codebook, fit
from training.recipes import REPORT


def test_the_reports_style_equals_ours_in_losses_and_gradients(images):
    torch.manual_seed(0)
    images = images[:2]
    ours, reference = VQVAE(), peers.Autoencoder(peers.ReportStyleQuantizer())
    with torch.no_grad():
        ours.vector_quantizer.embedding.weight.normal_(std=ours.latents(images).std().item())
    reference.load_state_dict(ours.state_dict())
    vq_loss, x_hat, _, _ = ours(images)
    (F.mse_loss(x_hat, images) + vq_loss).backward()
    reference.double()  # the exact side; in float32 it is off by up to 1.2e-4 itself
    other_loss, other_x_hat = reference(images.double())
    (F.mse_loss(other_x_hat, images.double()) + other_loss).backward()
    assert vq_loss.item() == pytest.approx(other_loss.item(), rel=1e-5)
    assert (x_hat - other_x_hat).abs().max() <= 1e-5
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    for name, p in ours.named_parameters():
        exact = gradients.pop(name)
        assert (p.grad - exact).norm() <= 2e-4 * exact.norm(), name
    assert not gradients


def test_the_speed_benchmark_times_every_side(data, monkeypatch, capfd):
    monkeypatch.setattr(speed, "BATCH", 1)
    monkeypatch.setattr(speed, "PRODUCT", 64)
    for part, sides in speed.PARTS.items():
        found = {}
        for name in sides | speed.LIMITS:
            if "bfloat16" not in name or has_fast_bfloat16(torch.device("cpu")):
                monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
                capfd.readouterr()
                speed.worker(part, name, torch.device("cpu"), data)
                first, *answers = map(json.loads, capfd.readouterr().out.splitlines())
                if answers:  # else its package is missing
                    found[name] = first | answers[-1] | {"seconds": answers[:-1]}
        assert found["limit, float32"]["operations"] == 2 * 64**3
        speed.report(part, found)
        out = capfd.readouterr().out
        assert all(f"| {name} | " in out for name in found)


def run_main(module, words, monkeypatch, capfd) -> tuple[str, str]:
    """What a script's `main` prints to both streams, given these options."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
    capfd.readouterr()
    module.main()
    return capfd.readouterr()


def test_the_ablation_trains_what_is_missing_and_prints_a_table(data, tmp_path, monkeypatch, capfd, without_figures):
    words = ["vqvae", "--data", data, "--out", tmp_path, "--rows", "paper", "ema", "--seeds", "0"]
    words += ["--epochs", "2"]

    def stopped(stage, epoch, seed, train_epoch=fit.train_epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(stage, epoch, seed)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit, "train_epoch", stopped)
        run_main(ablation, words, monkeypatch, capfd)
    for begun in (["paper, seed 0 …", "ema, seed 0 …"], []):  # the first of them is resumed
        out, err = run_main(ablation, words, monkeypatch, capfd)
        assert [line for line in err.splitlines() if "…" in line] == begun
    found = {}
    for name in ("paper", "ema"):
        (folder,) = (tmp_path / f"vqvae-{name}-0-of-2").iterdir()
        saved = found[name] = resume_file(folder)
        assert len(saved["rows"]) == 2 and saved["options"]["codebook"] == name
    assert f"| paper | {found['paper']['rows'][-1]['ssim_mean']:.4f} | " in out


def test_a_row_of_the_dcgan_is_trained_with_its_recipe(data, tmp_path, monkeypatch, capfd):
    words = ["dcgan", "--data", data, "--out", tmp_path, "--vqvae", PRETRAINED / "vqvae.pth", "--rows", "report"]
    stages = []
    monkeypatch.setattr(ablation, "fit", lambda stage, run: stages.append(stage))
    monkeypatch.setattr(ablation, "print_table", lambda o: None)
    run_main(ablation, [*words, "--seeds", "0", "--epochs", "1"], monkeypatch, capfd)
    (stage,) = stages
    assert stage.recipe is REPORT and stage.epochs == 1
    assert json.loads((stage.run.folder / "run.json").read_text())["recipes"]["dcgan"] == asdict(REPORT)
    assert ablation.TABLES["dcgan"].columns.keys() <= {*stage.columns, "d_validate", *generation.MEASURES}


def test_the_limits_table_has_scikit_images_ssim(data, monkeypatch, capfd):
    out, _ = run_main(limits, [PRETRAINED / "vqvae.pth", "--data", data], monkeypatch, capfd)
    table = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    found = {name: float(ssim) for name, ssim, _ in table}
    vqvae = load_vqvae(PRETRAINED / "vqvae.pth")
    x = OasisDataset(data, "validate").batch(range(0, 10, 4))
    decoded = vqvae(x)[1].detach().clamp(0, 1)
    pairs = zip(x[:, 0].numpy(), decoded[:, 0].numpy(), strict=True)
    expected = np.mean([structural_similarity(one, other, data_range=1.0) for one, other in pairs])
    assert found["| codes"] == pytest.approx(expected, abs=1e-4)
    assert found["| codes of 64 directions"] == pytest.approx(found["| codes"], abs=3e-3)


def test_the_gpu_check_asks_for_parts_that_the_speed_benchmark_has(monkeypatch):
    monkeypatch.setattr(gpu_check, "run", lambda script, *words: words[: words.index("--device")])
    assert set(gpu_check.speed("cpu")) <= speed.PARTS.keys()


def test_the_gpu_check_refuses_a_machine_without_one_and_values_beyond_bounds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(UserError, match="no GPU here"):
        gpu_check.main()
    same = dict.fromkeys(gpu_check.BOUNDS, 0.5)
    assert gpu_check.compare(same, same).count("within") == len(gpu_check.BOUNDS)
    for name in gpu_check.BOUNDS:
        for wrong in (1.5, float("nan")):
            with pytest.raises(gpu_check.Failed, match=f"{name}: CPU 0.5000000, GPU .*BEYOND"):
                gpu_check.compare(same, same | {name: wrong})


def test_time_to_quality_counts_training_alone(data, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(time_to_quality, "EVERY", 2)
    rows = time_to_quality.train_side("ours", str(data), 1.0)
    steps, seconds, ssim = zip(*rows, strict=True)
    assert steps == tuple(range(2, 2 * len(steps) + 1, 2)) and list(seconds) == sorted(seconds)
    assert seconds[-1] > 1.0 and (len(seconds) == 1 or seconds[-2] <= 1.0)  # by time, for no level was passed
    assert all(-0.5 < value < 0.5 for value in ssim)  # it has hardly learned anything
    monkeypatch.setattr(time_to_quality, "LEVELS", {"low": -1.0})
    assert len(time_to_quality.train_side("report's style", str(data), 1000.0)) == 1
    rows = [(50, 90.0, 0.7), (100, 180.0, 0.92), (150, 276.0, 0.91)]
    assert [time_to_quality.first_passing(rows, level) for level in (0.5, 0.9, 0.95)] == ["1.5", "3.0", "not reached"]


def test_bits_of_codecs_beside_those_of_codes(images, data, tmp_path, monkeypatch, capfd):
    image = (images[0, 0] * 255).byte().numpy()
    bits, decoded = rate_codecs.coded(image, {"format": "PNG"})
    assert (decoded == image).all() and 8 * 5_000 < bits < 8 * 65_536
    curve = [100, 200, 400, 800], [0.8, 0.9, 0.7, 1.0]  # the third quality is worse than the second
    assert rate_codecs.bits_at(0.85, *curve) == pytest.approx(100 * math.sqrt(2))
    assert rate_codecs.bits_at(0.95, *curve) == pytest.approx(400)
    assert rate_codecs.bits_at(0.7, *curve) is None
    monkeypatch.setattr(rate_codecs, "CODECS", {name: settings[-2:] for name, settings in rate_codecs.CODECS.items()})
    words = [PRETRAINED / "vqvae.pth", "--data", data, "--out", tmp_path, "--every", 5]
    out, _ = run_main(rate_codecs, words, monkeypatch, capfd)
    assert (tmp_path / "rate_codecs.png").is_file() and "SSIM of 2 images" in out
    assert out.count("\n| ") == 1 + 4 + 1 + 1 and "| 36,864 |" in out


def test_the_table_of_measures_has_a_column_for_each_side(data, monkeypatch, capfd):
    monkeypatch.setattr(generation, "FEWEST_COMPARED", 5)
    words = [PRETRAINED / "vqvae.pth", "--data", data, "--priors", PRETRAINED / "autoregressive.pth"]
    out, _ = run_main(measures, words, monkeypatch, capfd)
    table = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(generation.MEASURES) and {len(line) for line in table} == {4}
    assert not any("nan" in cell for line in table for cell in line)


def test_independent_codes_are_at_each_position_those_of_some_image(data):
    images, vqvae = OasisDataset(data, "train").as_images()[[0, 3]], VQVAE()
    x = images.pixels.float() / 255
    with torch.no_grad():  # codes that spread, and a decoder that shows them
        codebook.start_from(vqvae.vector_quantizer, vqvae.latents(x), torch.Generator())
    codes = vqvae.encode(x)
    vqvae.decode = lambda codes: codes / 255
    codes = codes.clamp(max=255)  # what to_bytes keeps
    for one in measures.decode_independent_codes(vqvae, images, torch.Generator()):
        assert ((one == codes[0]) | (one == codes[1])).all()
        assert (one != codes[0]).any() and (one != codes[1]).any()


def test_height_is_read_by_ridge_regression_and_planes_are_correlated():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 20, generator=rng).double()
    y = x @ torch.arange(20).double() + 3
    weights, offset = stacks.fit_reader(x, y)
    torch.testing.assert_close(x @ weights + offset, y, rtol=0.05, atol=1.0)
    images = torch.rand(2, 9, 1, 16, 16, generator=rng)
    expected = [
        np.mean(
            [np.corrcoef(head[i].ravel(), head[i + d].ravel())[0, 1] for head in images.numpy() for i in range(9 - d)]
        )
        for d in (1, 2, 4, 8)
    ]
    np.testing.assert_allclose(stacks.correlations(images), expected, atol=1e-9)


def test_lesions_lie_in_the_brain_and_are_ranked():
    rng, brain = torch.Generator().manual_seed(0), torch.zeros(256, 256, dtype=torch.bool)
    brain[80:180, 60:200] = True
    for _ in range(20):
        image, disc = lesions.plant(torch.full((256, 256), 0.5), brain, rng)
        assert (disc[~brain] == 0).all() and 6 <= 2 * (disc.sum() / torch.pi).sqrt() <= 17
        assert 0.14 < (image - 0.5).abs().max() < 0.36 and torch.equal(image != 0.5, disc > 0)
    scores, positive = torch.rand(500, generator=rng), torch.rand(500, generator=rng) < 0.2
    expected = (scores[positive][:, None] > scores[~positive]).double().mean().item()
    assert lesions.auc(scores, positive) == pytest.approx(expected, abs=1e-9)
