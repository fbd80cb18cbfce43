"""The training loop: averages, checks, means, and which epoch is kept."""

import copy
import math
import time
from pathlib import Path

import pytest
import torch

from dataset import OasisDataset, picture_box
from evaluation import reconstruction
from modules import VQVAE, Generator
from report import page
from support import console, files
from support.device import FastPath
from support.run import Run, open_run
from training import dcgan, fit, start
from training.autoregressive import AutoregressiveStage
from training.dcgan import DCGANStage
from training.options import Options
from training.samples import Samples
from training.vqvae import VQVAEStage


def new_run(folder: Path, **options) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(Options(**options), folder, fast_path=FastPath("cpu"))


def test_average_follows_the_weights_and_batchnorm_statistics():
    average, model = Generator(), Generator()
    start = copy.deepcopy(average)
    model.net[0][1].running_mean += 3
    model.net[0][1].num_batches_tracked += 5
    fit.update_average(average, model, 10**6, 0.9)
    for key, value in average.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.9 * start.state_dict()[key] + 0.1 * model.state_dict()[key])
    assert average.net[0][1].num_batches_tracked == 5


def test_average_of_a_short_run_forgets_its_start():
    average, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        average.weight.fill_(1000.0)
        model.weight.fill_(1.0)
    for step in range(1, 101):
        fit.update_average(average, model, step, 0.999)
    assert average.weight.item() == pytest.approx(1, abs=0.05)


def test_the_best_epoch_is_kept_not_the_last(data, tmp_path, monkeypatch, without_figures):
    """The report's system kept the wrong epoch; here SSIM is made to fall after the second."""
    train_set, validate_set = (OasisDataset(data, split) for split in ("train", "validate"))
    train_set.files, train_set.images = train_set.files[:2], train_set.images[:2]
    seen = []

    def falling(vqvae, dataset, labels, rank, world_size):
        seen.append(copy.deepcopy(vqvae.state_dict()))
        ssim = torch.tensor([[0.2, 0.4], [0.5, 0.7], [0.1, 0.9], [0.5, 0.6]][len(seen) - 1], dtype=torch.double)
        return reconstruction.Scores(ssim, 20 + ssim, torch.ones(4096, 16), torch.ones(16), *torch.ones(2, 2, 4))

    monkeypatch.setattr(reconstruction, "score", falling)
    run = new_run(tmp_path, epochs=4, batch_size=15, n_embeddings=16, embeddings_dim=4)
    stage = VQVAEStage(run, train_set, validate_set)
    fit.fit(stage, run)
    kept = stage.best()
    assert all(torch.equal(value, seen[1][key]) for key, value in kept.state_dict().items())
    assert not torch.equal(kept.conv1.weight, seen[3]["conv1.weight"])


def test_the_kept_epoch_is_the_last_of_the_best_ones_that_were_measured():
    rows = [{"epoch": i + 1, "texture_auc": auc} for i, auc in enumerate([0.9, 0.8, math.nan, 0.8, 0.85])]
    del rows[0]["texture_auc"]
    kept = [DCGANStage.kept_row(rows[:n])["epoch"] for n in range(1, 6)]
    assert kept == [1, 2, 2, 4, 4]
    assert DCGANStage.kept_row([rows[0], rows[2]])["epoch"] == 3  # none was measured


def test_a_run_that_ends_below_a_black_image_says_so(splits, tmp_path, capsys):
    run = new_run(tmp_path, epochs=1, batch_size=15, n_embeddings=16, embeddings_dim=4)
    stage = VQVAEStage(run, *splits)
    x = splits[1].batch([0, 8])  # every eighth of ten
    black = reconstruction.ssim(x, torch.zeros_like(x)).mean().item()
    assert stage.ssim_of_black == pytest.approx(black, abs=1e-9) and 0.2 < black < 0.8
    files.save(stage.vqvae.state_dict(), run.folder / "vqvae.pth")
    stage.kept = files.digest(stage.vqvae.vector_quantizer.embedding.weight)
    for ssim, warned in ((black - 0.01, True), (black + 0.01, False)):
        run.rows = [{"stage": "vqvae", "epoch": 1, "ssim_mean": ssim, "ssim_black": black}]
        stage.best()
        said = f"less than a black image has, {black:.4f}; train longer, or with a lower --lr"
        assert (said in capsys.readouterr().out) == warned


@pytest.mark.parametrize("kind", [DCGANStage, AutoregressiveStage])
def test_priors_learn_what_was_encoded_in_exact_float32(kind, splits, vqvae, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as a run has set it
    encode, seen = VQVAE.latents, []
    monkeypatch.setattr(VQVAE, "latents", lambda *args: seen.append(torch.backends.cudnn.allow_tf32) or encode(*args))
    kind(new_run(tmp_path, embeddings_dim=8), vqvae, *splits)
    assert seen and not any(seen)


def test_a_start_that_was_interrupted_goes_on_to_the_same_weights(splits, vqvae, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "SAVE_EVERY", 2)
    monkeypatch.setattr(Samples, "begin", lambda *words: None)

    def stop(stage, run, complete):
        fit.save_start(stage, run, complete)
        if stage.begun["step"] == 4:
            raise console.Stopped(143)

    weights = {}
    for interrupted in (False, True):
        run = new_run(tmp_path / str(interrupted), embeddings_dim=8, dcgan_epochs=4, dcgan_batch_size=4)
        torch.save(vqvae.state_dict(), run.folder / "vqvae.pth")
        if interrupted:
            with monkeypatch.context() as patch, pytest.raises(console.Stopped):
                patch.setattr(dcgan, "save_start", stop)
                fit.fit(DCGANStage(run, copy.deepcopy(vqvae), *splits), run)
            run = Run(**vars(open_run(run.folder, Options)))
            assert not run.state["dcgan"]["started"]
        stage = DCGANStage(run, copy.deepcopy(vqvae), *splits)
        monkeypatch.setattr(stage, "step", lambda *words: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit.fit(stage, run)
        assert run.state["dcgan"]["started"] and run.state["dcgan"]["extra"]["begun"] == {}
        weights[interrupted] = stage.generator.state_dict()
    assert all(torch.equal(value, weights[True][key]) for key, value in weights[False].items())


class Numbers(torch.utils.data.Dataset):
    """0 to 9."""

    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return torch.tensor(indices, dtype=torch.float)


class OneWeight(fit.Stage):
    """The smallest stage: a weight that each step raises by the mean of its batch. No more is needed for a new one."""

    name, title, columns = "dcgan", "One weight", ("loss",)
    epochs, batch_size, average_decay = 3, 4, 0.5
    chosen_by = ("loss", min, "loss {:.1f}")

    def __init__(self, run: Run):
        super().__init__(run)
        self.network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.network.weight)
        self.networks, self.optimizers = {"one": self.network}, {}
        self.averages = {"one": copy.deepcopy(self.network)}
        self.data = Numbers()

    def evaluate(self, epoch):
        return {"tf32": float(torch.backends.cudnn.allow_tf32)}

    def draw(self, row, history):
        assert not torch.backends.cudnn.allow_tf32

    def step(self, batch, n, step, rng):
        with torch.no_grad():
            self.network.weight += batch.mean()
        assert len(batch) == n
        return batch.mean()[None]


def test_a_stage_needs_no_more_than_its_data_and_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    run = new_run(tmp_path)
    stage = OneWeight(run)
    fit.fit(stage, run)
    assert [row["updates"] for row in run.rows] == [3, 3, 3]
    # what is measured and drawn is exact float32, whatever training uses
    assert torch.backends.cudnn.allow_tf32 and not any(row["tf32"] for row in run.rows)
    assert [row["loss"] for row in run.rows] == pytest.approx([4.5] * 3)  # each of 0 to 9 once an epoch
    total = sum(run.state["dcgan"]["history"]["loss"])
    assert stage.network.weight.item() == pytest.approx(total) and len(run.state["dcgan"]["history"]["loss"]) == 9
    resumed = Run(run.options, tmp_path, run.state, run.rows, fast_path=run.fast_path)
    again = OneWeight(resumed)
    again.epochs = 4
    fit.fit(again, resumed)
    assert again.network.weight.item() > stage.network.weight.item() and resumed.rows[-1]["epoch"] == 4


def test_a_run_stopped_in_its_first_epoch_keeps_the_start(tmp_path, monkeypatch):
    run = new_run(tmp_path)
    stage = OneWeight(run)
    monkeypatch.setattr(stage, "start", lambda: torch.nn.init.constant_(stage.network.weight, 5))
    monkeypatch.setattr(stage, "step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit.fit(stage, run)
    assert not (tmp_path / "metrics.csv").exists()  # there is no epoch
    again = Run(**vars(open_run(tmp_path, Options)))
    stage = OneWeight(again)
    monkeypatch.setattr(stage, "start", lambda: 1 / 0)
    fit.fit(stage, again)
    assert stage.network.weight.item() == pytest.approx(5 + sum(again.state["dcgan"]["history"]["loss"]))


def test_a_loss_or_a_weight_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, monkeypatch):
    for loss, weight, where in ((math.inf, 0.0, "step 2"), (1.0, math.nan, "step 3")):
        run = new_run(tmp_path / where)
        stage = OneWeight(run)

        def step(batch, n, step, rng, stage=stage, loss=loss, weight=weight):
            torch.nn.init.constant_(stage.network.weight, weight if step == 2 else 0.0)
            return torch.tensor([loss if step == 1 else 1.0])

        monkeypatch.setattr(stage, "step", step)
        with pytest.raises(console.UserError, match=f"^One weight epoch 1, {where}: .*not finite; try a lower"):
            fit.fit(stage, run)
        assert not run.rows and open_run(run.folder, Options).epochs_of("dcgan") == 0


def test_the_rows_say_where_the_time_went(tmp_path, monkeypatch):
    run = new_run(tmp_path)
    stage = OneWeight(run)
    for name, seconds in (("evaluate", 0.06), ("draw", 0.04)):
        monkeypatch.setattr(stage, name, lambda *args, seconds=seconds: time.sleep(seconds) or {})
    began = run.clock
    fit.fit(stage, run)
    assert all(row["evaluation_seconds"] >= 0.06 and row["other_seconds"] >= 0.04 for row in run.rows)
    assert sum(row[key] for row in run.rows for key in page.TIMES) == pytest.approx(run.clock - began, abs=0.05)


def test_a_run_says_which_epoch_it_kept(tmp_path, capsys):
    run = new_run(tmp_path)
    stage = OneWeight(run)
    run.rows = [{"stage": "dcgan", "epoch": epoch, "loss": loss} for epoch, loss in ((1, 2.0), (2, 1.0), (3, 1.5))]
    fit.fit(stage, run)  # nothing is left to train
    assert "Best epoch: 2, loss 1.0" in capsys.readouterr().out
    for row in run.rows:
        row["loss"] = math.nan
    fit.fit(stage, run)
    assert "Best epoch: 3, the last one, because none was measured" in capsys.readouterr().out


def test_means_over_images_weigh_the_smaller_last_batch():
    assert fit.mean_over_images(torch.tensor([1.0, 1.0, 4.0]), [4, 4, 2]) == pytest.approx((8 * 1 + 2 * 4) / 10)


def test_the_rate_is_constant_at_first_and_falls_along_a_cosine():
    rates = [fit.rate_factor(step, 100, constant=0.6, last=0.01) for step in range(101)]
    assert rates[:61] == [1.0] * 61 and rates == sorted(rates, reverse=True)
    assert rates[80] == pytest.approx((1 + 0.01) / 2)  # half way down
    assert rates[70] == pytest.approx(0.01 + 0.99 * (2 + 2**0.5) / 4)  # a quarter
    assert rates[100] == pytest.approx(0.01) == fit.rate_factor(1000, 100, 0.6, 0.01)
    assert {fit.rate_factor(step, 100, constant=1.0, last=0.01) for step in range(100)} == {1.0}


def test_a_step_sees_the_box_of_the_pictures_at_the_rate_of_the_step(data, tmp_path):
    train_set, validate_set = OasisDataset(data, "train"), OasisDataset(data, "validate", with_labels=True)
    run = new_run(tmp_path / "run", epochs=2, batch_size=8, n_embeddings=16, embeddings_dim=4)  # 4 steps in all
    boxed, cut, whole = (VQVAEStage(run, train_set, validate_set) for _ in range(3))
    assert boxed.box == picture_box(train_set.images) != (slice(0, 256), slice(0, 256))
    cut.box = whole.box = slice(None), slice(None)
    x = train_set.batch(range(8))
    sides = ((boxed, x), (cut, x[(..., *boxed.box)]), (whole, x))
    losses = [stage.step(images, 8, 0, torch.Generator().manual_seed(0)) for stage, images in sides]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    assert all(torch.equal(a, b) for a, b in zip(boxed.vqvae.parameters(), cut.vqvae.parameters(), strict=True))
    for step, rate in ((2, 1e-3), (3, 1e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * 0.375)) / 2)), (4, 1e-5)):
        boxed.step(x, 8, step, torch.Generator().manual_seed(step))
        assert boxed.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    assert 0 < boxed.evaluate(1)["ssim_brain"] < 1  # phantoms have label maps
    boxed.labels = None
    assert "ssim_brain" not in boxed.evaluate(1)


def test_a_step_of_the_vqvae_is_equation_3_and_records_its_first_term(splits, tmp_path):
    run = new_run(tmp_path, n_embeddings=16, embeddings_dim=4, beta=0.7, lr=0.1, codebook="paper")
    stage = VQVAEStage(run, *splits)
    stage.optimizer, vqvae = torch.optim.SGD(stage.vqvae.parameters()), copy.deepcopy(stage.vqvae)
    batch = stage.data.batch([0, 7])
    x = batch[(..., *stage.box)]
    z_e = vqvae.latents(x)
    e = vqvae.vector_quantizer.look_up(vqvae.vector_quantizer.nearest(z_e))
    recon_loss = (vqvae.decoder(z_e + (e - z_e).detach()) - x).square().mean()
    vq_loss = (e - z_e.detach()).square().mean() + 0.7 * (z_e - e.detach()).square().mean()
    (recon_loss + vq_loss).backward()
    values = stage.step(batch, 2, 0, torch.Generator())
    assert values.tolist() == pytest.approx([recon_loss.item(), vq_loss.item()], rel=1e-5)
    for new, old in zip(stage.vqvae.parameters(), vqvae.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * old.grad, rtol=1e-4, atol=1e-6)


def test_adam_has_the_rates_and_betas_of_the_options(splits, vqvae, tmp_path):
    options = {"lr": 0.02, "dcgan_lr": 0.01, "dcgan_betas": (0.3, 0.6), "embeddings_dim": 8}
    run = new_run(tmp_path, **options)
    assert VQVAEStage(run, *splits).optimizer.defaults["lr"] == 0.02
    for optimizer in DCGANStage(run, vqvae, *splits).optimizers.values():
        assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (0.01, (0.3, 0.6))


def test_32_training_images_spaced_evenly_are_shown(data, tmp_path):
    train_set = OasisDataset(data, "train")
    train_set.files, train_set.images = 5 * train_set.files, train_set.images.repeat(5, 1, 1, 1)
    stage = VQVAEStage(new_run(tmp_path, n_embeddings=16, embeddings_dim=4), train_set, train_set)
    assert torch.equal(stage.shown, train_set.batch([int(i * 75 / 32) for i in range(32)]))


def test_samples_are_always_drawn_from_the_same_noise(splits, vqvae, tmp_path, monkeypatch, without_figures):
    stage = DCGANStage(new_run(tmp_path, embeddings_dim=8), vqvae, *splits)
    noises = []
    monkeypatch.setattr(stage.prior, "sample_images", lambda noise: noises.append(noise) or noise[:, :1].tile(8, 8))
    for epoch in (0, 1, 7):
        stage.samples.draw(stage.prior, epoch)
    assert len(noises[0]) == 64 and torch.equal(noises[0], noises[1]) and torch.equal(noises[0], noises[2])


def test_another_seed_gives_other_weights(splits, tmp_path):
    runs = [new_run(tmp_path / str(seed), seed=seed, n_embeddings=16, embeddings_dim=4) for seed in (0, 0, 1)]
    first, same, other = (VQVAEStage(run, *splits).vqvae.conv1.weight for run in runs)
    assert torch.equal(first, same) and not torch.equal(first, other)
