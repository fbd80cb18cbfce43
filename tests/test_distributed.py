"""Two processes on the CPU against one: the same steps, the same files, one voice, one end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import (
    PRETRAINED,
    PROJECT,
    close,
    free_port,
    resume_file,
    run_program,
    start_two,
    train_as_one_of_two,
)

from modules import VQVAE
from report.plots import Figures
from support import distributed
from support.console import UserError
from support.device import FastPath
from support.run import Run
from training import begin, codebook, options
from training.autoregressive import AutoregressiveStage
from training.dcgan import DCGANStage
from training.recipes import BALANCED

# float32, for two processes differ from one by rounding: of bfloat16, the default on some processors, far too much
SMALL = ("--batch-size", 7, "--dcgan-batch-size", 6, "--n-embeddings", 32, "--device", "cpu", "--seed", 5)
SMALL += ("--precision", "float32")
EPOCHS = ("--epochs", 2, "--dcgan-epochs", 1)


def torchrun(script, *words, cwd, n=2) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", script, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums depend on the number of threads; torchrun's processes have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs_of_one_and_two(data, tmp_path_factory, start):
    """The same training in one process and in two, as what the first one printed and the run's folder."""
    folder = tmp_path_factory.mktemp("distributed")
    words = ("--data", data, *SMALL, *EPOCHS, "--out")
    both = start_two(start, folder, *words, "two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figures, "_save", close)
        one = run_program("train.py", *words, "one", cwd=folder)
    for rank, process in enumerate(both):
        process.join()
        assert process.exitcode == 0, (folder / f"errors_{rank}").read_text()
    assert not (folder / "printed_1").read_text()
    printed = one.stdout, (folder / "printed_0").read_text()
    return [(text, next((folder / name).iterdir())) for text, name in zip(printed, ("one", "two"), strict=True)]


def test_two_processes_give_the_curve_of_one(runs_of_one_and_two):
    # 15 images in batches of 7: shares of 3 and 4, and a last batch that leaves one of the processes without an image
    one, two = (resume_file(run) for _, run in runs_of_one_and_two)
    losses = [torch.tensor(saved["state"]["vqvae"]["history"]["training_loss"]) for saved in (one, two)]
    assert len(losses[0]) == 6
    torch.testing.assert_close(losses[0][:3], losses[1][:3], rtol=1e-4, atol=0)
    # Then rounding grows, with torch 2.5 faster than with 2.15; one process with two threads differs by 5 % from one.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0)
    row, other = one["rows"][0], two["rows"][0]
    for key in ("training_loss", "vq_loss", "ssim_mean", "ssim_min", "ssim_max"):
        assert other[key] == pytest.approx(row[key], rel=2e-3), key
    assert row["codes_used"] == other["codes_used"]
    assert int(two["state"]["vqvae"]["extra"]["usage"].sum()) == int(one["state"]["vqvae"]["extra"]["usage"].sum())


def test_one_process_goes_on_with_what_two_began(runs_of_one_and_two, tmp_path, without_figures):
    _, two = runs_of_one_and_two[1]
    run = shutil.copytree(two, tmp_path / "run")
    done = run_program("train.py", "--resume", run, "--dcgan-epochs", 2, cwd=tmp_path)
    assert done.returncode == 0 and resume_file(run)["state"]["dcgan"]["epoch"] == 2, done.stderr


def test_the_dcgan_of_two_processes_begins_as_that_of_one(runs_of_one_and_two, data, tmp_path, without_figures):
    """On the same VQ-VAE: the two runs' own ones differ by rounding, which the start of the generator magnifies."""
    _, two = runs_of_one_and_two[1]
    words = (*SMALL, "--dcgan-epochs", 1, "--out", "again")
    done = run_program(
        "train.py", "--data", data, "--only", "dcgan", "--vqvae", two / "vqvae.pth", *words, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (again,) = (tmp_path / "again").iterdir()
    histories = [resume_file(run)["state"]["dcgan"]["history"] for run in (again, two)]
    first = [[history[key][0] for key in ("d_loss", "d_real", "d_fake")] for history in histories]
    assert first[0] == pytest.approx(first[1], rel=1e-4)


def test_one_process_speaks_and_writes(runs_of_one_and_two):
    (one, run_one), (two, run_two) = runs_of_one_and_two

    def shape(text):
        return re.sub(r"[\d.]+(e-\d+)?|one|two", "#", text)

    assert shape(one) == shape(two.replace("torchrun ...", "python")).replace("# processes, ", "")
    assert {path.name for path in run_one.iterdir()} == {path.name for path in run_two.iterdir()}
    assert len(list(run_two.parent.iterdir())) == 1


def test_a_worker_that_dies_ends_the_job_with_its_error(data, tmp_path):
    script = f"""
        import os, sys
        sys.path.insert(0, {str(PROJECT)!r})
        import train
        from support import distributed
        distributed.GRACE = 0.5
        class Dying(train.VQVAEStage):
            def step(self, *args):
                if distributed.rank() == 1:
                    raise RuntimeError('the second process broke')
                return super().step(*args)
        train.VQVAEStage = Dying
        train.main()
    """
    (tmp_path / "dying.py").write_text(textwrap.dedent(script))
    done = torchrun(tmp_path / "dying.py", "--data", data, *SMALL, cwd=tmp_path)
    assert done.returncode != 0
    assert "the second process broke" in done.stderr


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory, start) -> list[dict]:
    """What each of the functions below returns in each of two processes, by its name."""
    folder = tmp_path_factory.mktemp("two")
    for rank, process in enumerate([start(folder, _join, rank) for rank in range(2)]):
        process.join(120)
        assert process.exitcode == 0, (folder / f"errors_{rank}").read_text()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _join(words: list[str]) -> None:
    rank = int(words[0])
    sys.stderr = open(f"errors_{rank}", "w", buffering=1)
    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/meet", rank=rank, world_size=2)
    works = {"dcgan step": _dcgan_step, "codebook": _codebook, "autoregressive step": _autoregressive_step}
    torch.save({name: work(rank) for name, work in works.items()}, f"{rank}.pt")
    dist.destroy_process_group()


def _dcgan(run: Run) -> DCGANStage:
    """A stage without training images, the map between latents and coefficients that of the codebook."""
    torch.manual_seed(0)
    images = Images(torch.rand(2, 1, 256, 256))
    return DCGANStage(run, VQVAE(16, 8), images, images, replace(BALANCED, directions=None))


def _dcgan_step(rank):
    """One update of each network by plain gradient descent, in float64, on a batch of 5; and one in bfloat16."""
    stage = _dcgan(Run(options.Options(embeddings_dim=8), fast_path=FastPath("cpu")))
    found = {}
    for dtype, rate in ((torch.double, 0.1), (torch.float, 0.0)):
        for name, network in stage.networks.items():
            stage.optimizers[name] = torch.optim.SGD(network.to(dtype).parameters(), rate)
        noise = torch.randn(5, 128, 1, 1, generator=torch.Generator().manual_seed(1)).to(dtype)
        stage.prior.noise = lambda n, rng, noise=noise: noise
        stage.space = replace(stage.space, support=stage.space.support.to(dtype), mix=stage.space.mix.to(dtype))
        real = torch.rand(5, 8, 64, 64, generator=torch.Generator().manual_seed(2)).to(dtype) - 0.5
        values = stage.step(distributed.part(real).clone(), 5, 0, torch.Generator())
        total = distributed.total(values * distributed.weight(5))
        if dtype is torch.double:
            found |= {key: value.clone() for key, value in torch.nn.ModuleDict(stage.networks).state_dict().items()}
            found |= {"values": total}
            stage.autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    return found | {"values in bfloat16": total}


def test_a_dcgan_update_of_two_processes_is_that_of_one(in_two_processes):
    """Batch statistics, R1's second derivatives and gradients of a batch cut into 2 and 3, against the batch in one."""
    expected = _dcgan_step(0)
    for process in in_two_processes:
        found = process["dcgan step"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # bfloat16 has 8 bits, and a sure discriminator's loss is the small difference of what has been rounded
            rtol, atol = (0.02, 1e-3) if "bfloat16" in key else (1e-9, 1e-12)
            torch.testing.assert_close(found[key], value, rtol=rtol, atol=atol, msg=key)


class Images(list):
    """A data set as far as `LatentCache` looks."""

    def batch(self, indices) -> torch.Tensor:
        return torch.stack([self[int(i)] for i in indices])


def _codebook(rank):
    """The codebook of each method after steps on batches of 3 of which each process has a part, with a revival."""
    found = {}
    for name, kind in codebook.METHODS.items():
        torch.manual_seed(0)
        model, batches = VQVAE(16, 4), torch.randn(4, 3, 4, 8, 8)
        rng = torch.Generator().manual_seed(1 + rank)  # the first process's draws are to count
        optimizer = torch.optim.Adam(model.parameters())
        method = kind(model.vector_quantizer, optimizer)
        for step, z_e in zip((0, 1, 109, 110), batches, strict=True):
            if step == 110 and name == "kmeans":
                method.usage[[2, 7]] = 0
                if distributed.world_size() > 1 and rank == 0:
                    method.usage[5] = 0  # which the other process has counted
            part = distributed.part(z_e)
            method.before_lookup(step, part, 3, rng)
            vq_loss, _, codes = model.vector_quantizer(z_e)  # the whole batch: gradients are not what is tested here
            if vq_loss.requires_grad:
                optimizer.zero_grad()
                vq_loss.backward()
                optimizer.step()
            if distributed.weight(3):
                method.after_step(codes[distributed.share(3)])
        found[name] = method.embeddings
        found |= {f"{name} {key}": value for key, value in method.state_dict().items()}
    return found


def test_the_codebooks_agree_across_processes_and_with_one(in_two_processes):
    expected = _codebook(0)
    assert expected["kmeans usage"].sum() == 3 * 64
    for process in in_two_processes:
        found = process["codebook"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 31])
def test_shares_make_up_the_whole(n, monkeypatch):
    for world in (1, 2, 3, 8):
        monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
        parts, weights = [], []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts += list(range(n))[distributed.share(n)]
            weights.append(distributed.weight(n))
            assert len(distributed.part(torch.arange(n))) == max(1, round(weights[-1] * n))
        assert parts == list(range(n)) and sum(weights) == pytest.approx(1)


@pytest.mark.parametrize(
    "words", [("--batch-size", "1"), ("--only", "dcgan", "--dcgan-batch-size", "1"), ("--device", "cpu:0")]
)
def test_what_several_processes_cannot_do_is_refused_by_name(words, data, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    given = options.parse(["--data", str(data), *words])
    given |= {"vqvae": str(PRETRAINED / "vqvae.pth")} if "dcgan" in words else {}
    with pytest.raises(UserError, match=f"^{words[-2]} {words[-1]}: "):
        begin.prepare(given)


def _wait_for_another(words: list[str]) -> None:
    distributed.GRACE = 0.1
    train_as_one_of_two(words)


def test_a_process_that_waits_for_others_says_so_and_stops_when_it_is_told(tmp_path, start):
    port, errors = free_port(), tmp_path / "errors_0"
    process = start(tmp_path, _wait_for_another, 0, port, "--demo")
    while process.is_alive() and not (errors.exists() and errors.read_text().endswith("\n")):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == -signal.SIGINT
    assert f"Waiting for all 2 processes (WORLD_SIZE) to meet at 127.0.0.1:{port}" in errors.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"errors_0", "printed_0"}


class Slices(Images):
    """A data set as far as `CodeCache` and the stage look: two slices of one head."""

    split, phantoms = "train", True

    def case_and_slice(self, i: int) -> tuple[int, int]:
        return 1, i

    def subject(self, i: int) -> int:
        return 1


def _autoregressive() -> AutoregressiveStage:
    """A stage on five slices, its weights random and the same in each process."""
    torch.manual_seed(0)
    vqvae, slices = VQVAE(16, 6), Slices(torch.rand(5, 1, 256, 256))
    run = Run(options.Options(embeddings_dim=6, autoregressive_epochs=10**6), None, fast_path=FastPath("cpu"))
    stage = AutoregressiveStage(run, vqvae, slices, slices)
    for parameter in stage.network.parameters():  # some begin as 0
        torch.nn.init.normal_(parameter, std=0.1)
    return stage


def _autoregressive_step(rank):
    """The gradients, clipped, that the prior over codes is updated with on a batch of 5, and its loss."""
    stage = _autoregressive()
    bits = stage.step(distributed.part(torch.arange(5)), 5, 199, torch.Generator().manual_seed(1))
    found = {key: parameter.grad for key, parameter in stage.network.named_parameters()}
    return found | {"bits": distributed.total(bits * distributed.weight(5))}


def test_an_update_of_the_prior_over_codes_of_two_processes_is_that_of_one(in_two_processes):
    expected = _autoregressive_step(0)
    norm = torch.cat([value.flatten() for key, value in expected.items() if key != "bits"]).norm()
    assert norm.item() == pytest.approx(1, rel=1e-3)
    for process in in_two_processes:
        found = process["autoregressive step"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key != "bits":  # all of them together have a norm of 1; float32 sums in another order
                assert (found[key] - value).norm() < 3e-4 * value.norm() + 1e-5, key
        torch.testing.assert_close(found["bits"], expected["bits"], rtol=1e-5, atol=0)
