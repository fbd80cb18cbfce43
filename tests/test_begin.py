"""The fast path of a run, and where a stopped one resumes."""

import pytest
import torch

from support.device import FastPath
from support.run import Run
from training import begin
from training.options import Options


def test_the_fast_path_is_kept_on_resuming_and_chosen_anew_for_another_kind_of_device(tmp_path, monkeypatch):
    chosen, cpu, cuda = begin.choose_run_fast_path, torch.device("cpu"), torch.device("cuda")
    run = Run(Options(), tmp_path, fast_path=FastPath("cpu", bfloat16=True))
    assert chosen(run, cpu) == FastPath("cpu", bfloat16=True)  # whatever this processor has
    for capability, bfloat16 in ((9, True), (7, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: (c, 0))
        assert chosen(run, cuda) == FastPath("cuda", bfloat16=bfloat16)


@pytest.mark.parametrize(
    "only, vqvae, gan, said",
    [
        (None, 1, None, "To resume at VQ-VAE epoch 2"),
        (None, 2, None, "To resume at DCGAN epoch 1"),
        (None, 2, 1, "To resume at DCGAN epoch 2"),
        (None, 2, 3, "To draw the last figures"),
        ("vqvae", 2, None, "To draw the last figures"),
        ("dcgan", None, 2, "To resume at DCGAN epoch 3"),
    ],
)
def test_where_a_stopped_run_resumes(tmp_path, only, vqvae, gan, said):
    state = {stage: {"epoch": n} for stage, n in (("vqvae", vqvae), ("dcgan", gan)) if n is not None}
    run = Run(Options(epochs=2, dcgan_epochs=3, only=only), tmp_path / "a b", state, [], FastPath("cpu"))
    assert "nothing to resume" in begin.how_to_resume(run)
    run.folder.mkdir()
    run.save()
    assert begin.how_to_resume(run).startswith(f"Stopped. {said}: python train.py --resume '")
