"""The pieces of training: each update against its definition."""

import copy

import pytest
import torch
from conftest import quiet

import metrics
import options
import runs
import train
from dataset import OasisDataset
from hardware import FastPath
from modules import Generator, dcgan_init


def test_average_follows_the_weights_and_batchnorm_statistics():
    average, model = Generator(), Generator()
    start = copy.deepcopy(average)
    model.net[0][1].running_mean += 3
    model.net[0][1].num_batches_tracked += 5
    train.update_average(average, model, 10**6, 0.9)
    for key, value in average.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.9 * start.state_dict()[key] + 0.1 * model.state_dict()[key])
    assert average.net[0][1].num_batches_tracked == 5


def test_average_of_a_short_run_forgets_its_start():
    average, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        average.weight.fill_(1000.0)
        model.weight.fill_(1.0)
    for update in range(1, 101):
        train.update_average(average, model, update, 0.999)
    assert average.weight.item() == pytest.approx(1, abs=0.05)


def test_the_best_epoch_is_kept_not_the_last(data, tmp_path, monkeypatch):
    """The report's system kept the wrong epoch; here SSIM is made to fall after the second."""
    train_set = OasisDataset(data, "train", progress=quiet)
    validate_set = OasisDataset(data, "validate", progress=quiet)
    seen = []

    def falling(model, dataset, progress, rank, world):
        seen.append(copy.deepcopy(model.state_dict()))
        ssim = torch.tensor([[0.2, 0.4], [0.5, 0.7], [0.1, 0.9], [0.6, 0.6]][len(seen) - 1], dtype=torch.double)
        return metrics.Scores(ssim, 20 + ssim, torch.ones(4096, 16), torch.ones(16))

    monkeypatch.setattr(train.metrics, "score", falling)
    chosen = options.DEFAULTS | dict(epochs=4, batch_size=15, n_embeddings=16, embeddings_dim=4)
    chosen["fast_path"] = {"device": "cpu"}
    kept = train.train_vqvae(train_set, validate_set, runs.Run(tmp_path, chosen), "cpu")
    assert all(torch.equal(value, seen[1][key]) for key, value in kept.state_dict().items())
    assert not torch.equal(kept.conv1.weight, seen[3]["conv1.weight"])


def test_a_loss_that_is_not_finite_stops_the_run_by_name():
    train.check_finite(torch.tensor([1.0, 2.0]), "VQ-VAE epoch 2", 16)
    losses = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [torch.inf, 4.0]])  # of updates 14, 15 and 16
    with pytest.raises(runs.RunError, match="VQ-VAE epoch 2, update 15: .*not finite"):
        train.check_finite(losses, "VQ-VAE epoch 2", 16)


def test_dcgan_init():
    torch.manual_seed(0)
    generator = Generator().apply(dcgan_init)
    weight, gain = generator.net[1][0].weight, generator.net[0][1].weight
    assert weight.mean().abs() < 1e-3 and weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert gain.mean().item() == pytest.approx(1, abs=0.01) and gain.std().item() == pytest.approx(0.02, rel=0.2)


def test_means_by_image_weigh_the_smaller_last_batch():
    sizes = train.batch_sizes(10, 4)
    assert sizes == [4, 4, 2] and train.batch_sizes(8, 4) == [4, 4] and train.batch_sizes(3, 32) == [3]
    assert train.means_by_image({"a": torch.tensor([1.0, 1.0, 4.0])}, sizes) == {
        "a": pytest.approx((8 * 1 + 2 * 4) / 10)
    }


def test_the_fast_path_is_kept_on_resuming_and_chosen_anew_for_another_kind_of_device(tmp_path, monkeypatch):
    monkeypatch.setattr(train.hardware, "can_compile", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    run = runs.Run(tmp_path, options.DEFAULTS | {"fast_path": FastPath("cpu", bfloat16=True)._asdict()})
    assert options.choose_fast_path(run, cpu, 9664) == FastPath("cpu", bfloat16=True)
    assert options.choose_fast_path(run, cuda, 9664) == FastPath("cuda", bfloat16=True, compiled=True)
    assert options.choose_fast_path(run, cuda, 640) == FastPath("cuda", bfloat16=True)  # 240 updates do not repay it
    run.options |= {"fast_path": None, "only": "gan"}
    assert options.choose_fast_path(run, cuda, 9664) == FastPath("cuda")


@pytest.mark.parametrize(
    "words",
    [
        ("--batch-size", "0"),
        ("--gan-batch-size", "-3"),
        ("--epochs", "0"),
        ("--gan-epochs", "1e3"),
        ("--lr", "0"),
        ("--gan-lr", "inf"),
        ("--beta", "-0.1"),
        ("--gan-betas", "0.5"),
        ("--gan-betas", "-0.1", "0.9"),
        ("--n-embeddings", "65537"),
        ("--embeddings-dim", "0"),
        ("--seed", "-1"),
        ("--seed", "9" * 5000),
        ("--codebook", "fsq"),
        ("--only", "both"),
        ("--no-such-option",),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(words, capsys):
    with pytest.raises(SystemExit) as caught:
        options.parse(list(words))
    said = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and words[0] in said[-1] and "error: " in said[-1]


@pytest.mark.parametrize(
    "only, vqvae, gan, said",
    [
        (None, 1, None, "VQ-VAE epoch 2"),
        (None, 2, None, "DCGAN epoch 1"),
        (None, 2, 1, "DCGAN epoch 2"),
        (None, 2, 3, "the last figures"),
        ("vqvae", 2, None, "the last figures"),
        ("gan", None, 2, "DCGAN epoch 3"),
    ],
)
def test_where_a_stopped_run_goes_on(tmp_path, only, vqvae, gan, said):
    state = {stage: {"epoch": n} for stage, n in (("vqvae", vqvae), ("gan", gan)) if n is not None}
    run = runs.Run(tmp_path / "a b", options.DEFAULTS | {"epochs": 2, "gan_epochs": 3, "only": only}, state)
    assert "nothing to go on from" in options.how_to_go_on(run)
    run.folder.mkdir()
    run.save()
    assert options.how_to_go_on(run).startswith(f"Stopped. It goes on with {said} by: python train.py --resume '")


@pytest.mark.parametrize(
    "spoilt",
    [
        {"epochs": "x"},
        {"data": None},
        {3: 4},
        {"seed": -1},
        {"fast_path": {"device": "cpu", "unknown": 1}},
        {"batch_size": 1.5},
        {"no_such_option": 1},
    ],
)
def test_options_that_no_run_has_are_not_resumed(spoilt):
    good = options.DEFAULTS | {"data": "there", "gan_betas": [0.5, 0.999]}
    options.check_types(good)
    with pytest.raises((ValueError, TypeError)):
        options.check_types(good | spoilt)
