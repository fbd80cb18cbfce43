"""What sets the rows of the flow's ablation apart."""

import copy

import flow_ablation
import pytest
import torch

from modules import UNetBlock
from support.device import FastPath
from support.run import Run
from training.config import Config
from training.flow import FlowStage


@pytest.fixture
def flow_stage(vqvae, train_set, tmp_path, monkeypatch):
    """The started stage of a row."""

    def new(name: str) -> FlowStage:
        torch.manual_seed(0)
        run = Run(Config(embeddings_dim=8, flow_batch_size=3, flow_epochs=1), tmp_path, fast_path=FastPath("cpu"))
        stage = flow_ablation.ROWS[name][1](run, vqvae, train_set, None)
        monkeypatch.setattr(stage, "begin", lambda: None)
        stage.start()
        return stage

    return new


@pytest.mark.parametrize("name", flow_ablation.ROWS)
def test_each_row_of_the_flow_ablation_learns(name, flow_stage, rng):
    stage = flow_stage(name)
    network = stage.networks["flow"]
    before = copy.deepcopy(stage.networks)
    c = stage.data().batch([0, 7, 14])
    assert c.shape == (3, {"four-directions": 4, "eight-directions": 8}.get(name, 6), 64, 64)
    assert stage.step(c, 3, 0, rng).isfinite().all()
    for key, each in stage.networks.items():
        pairs = zip(each.parameters(), before[key].parameters(), strict=True)
        assert any(not torch.equal(p, old) for p, old in pairs), key
    assert (stage.prior.guidance == 0) == (name == "unguided")
    for each in (network, stage.averages["flow"]):
        assert each.last[0].num_channels == {"narrow": 48, "wide": 80}.get(name, 64)


def test_dropout_is_in_each_block_and_in_training_alone(flow_stage):
    network = flow_stage("dropout").networks["flow"]
    blocks = [block for block in network.modules() if isinstance(block, UNetBlock)]
    assert len(blocks) == 14
    for training in (True, False):
        network.train(training)
        for block in blocks:
            share = (block.after[0](torch.ones(100, 100)) == 0).float().mean().item()
            assert share == pytest.approx(0.1 * training, abs=0.01)


def test_later_times_are_nearer_to_the_data_in_training_alone(flow_stage):
    class Recorded(torch.nn.Module):
        def forward(self, x, t):
            self.t = t
            return x

    stage, network, t = flow_stage("later"), Recorded(), torch.tensor([0.1, 0.5])
    for training, expected in ((True, t.logit() + 0.5), (False, t.logit())):
        stage.losses(network.train(training), torch.zeros(2, 6, 64, 64), t, torch.zeros(2, 24, 32, 32))
        torch.testing.assert_close(network.t.logit(), expected)


def test_about_half_of_the_images_are_mirrored(flow_stage, train_set):
    data = flow_stage("mirrored").data()
    assert not data.stored  # so that each epoch mirrors others
    images, found = train_set.batch(range(15)), data.dataset.batch(range(15))
    mirrored = [not torch.equal(image, shown) for image, shown in zip(images, found, strict=True)]
    assert torch.equal(found[mirrored], images[mirrored].flip(3)) and 3 <= sum(mirrored) <= 12
