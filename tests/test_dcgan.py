"""The DCGAN's stage: what it does before its first step and after an epoch."""

import copy

import pytest
import torch

from dataset import OasisDataset
from support import seeds
from support.device import FastPath
from support.run import Run
from training import dcgan
from training.config import Config
from training.latents import Latents
from training.scale import LatentScale


@pytest.mark.parametrize("epochs, n_steps", [(1, 2), (3, 6), (2000, 3000)])
def test_the_generator_and_its_average_start_from_the_same_weights(data, vqvae, tmp_path, monkeypatch, epochs, n_steps):
    asked = []

    def start(generator, latents, n_steps, *rest):
        asked.append(n_steps)
        return {key: value + 1 for key, value in generator.state_dict().items()}

    monkeypatch.setattr(dcgan, "start_generator", start)
    run = Run(Config(embeddings_dim=8, gan_batch_size=4, gan_epochs=epochs), tmp_path, fast_path=FastPath("cpu"))
    stage = dcgan.DCGANStage(run, vqvae, *(OasisDataset(data, split) for split in ("train", "validate")))
    before = copy.deepcopy(stage.average.state_dict())
    monkeypatch.setattr(stage.samples, "draw", lambda *words: None)
    monkeypatch.setattr(stage.samples, "begin", lambda prior: None)
    stage.start()
    assert asked == [n_steps]  # at most half as many as follow, of four batches an epoch
    for network in (stage.average, stage.networks["generator"]):
        assert all(torch.equal(value, before[key] + 1) for key, value in network.state_dict().items())


def test_the_validation_split_is_judged_as_in_training_and_leaves_no_trace(data, vqvae, tmp_path):
    run = Run(Config(embeddings_dim=8, gan_batch_size=4), tmp_path, fast_path=FastPath("cpu"))
    train_set, validate_set = (OasisDataset(data, split) for split in ("train", "validate"))
    stage = dcgan.DCGANStage(run, vqvae, train_set, validate_set)
    stage.set_scale(LatentScale.fit(vqvae, train_set))
    discriminator, scale = stage.networks["discriminator"], stage.scale
    before = copy.deepcopy(discriminator.state_dict())
    found = stage._judge_validation()
    assert all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())
    latents, judged = Latents(vqvae, validate_set, scale), []
    for part in torch.randperm(10, generator=seeds.generator(0, "judging")).split(4):
        c = scale.seen(latents.batch(part))
        judged += discriminator(torch.einsum("dk,bkhw->bdhw", scale.basis, c)).flatten().tolist()
    assert found == pytest.approx(sum(judged) / 10, abs=1e-4)
