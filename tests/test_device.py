"""The fast path against the plain one, and what is chosen where."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import PROJECT

from dataset import OasisDataset
from modules import VQVAE
from support import device as module
from support.console import UserError
from support.device import FastPath

PLAIN = FastPath("cpu", plain=True)


def one_step(fast_path: FastPath, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses and gradients of one step."""
    torch.manual_seed(0)
    model = VQVAE().to(memory_format=fast_path.layout)
    with torch.no_grad():  # codes that are far apart, so that rounding does not change which one is nearest
        model.vector_quantizer.embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    with fast_path.autocast():
        vq_loss, x_hat, _, _ = model(x)
    recon_loss = F.mse_loss(x_hat, x)
    (recon_loss + vq_loss).backward()
    return {"recon_loss": recon_loss, "vq_loss": vq_loss} | {key: p.grad for key, p in model.named_parameters()}


@pytest.mark.parametrize(
    "fast_path, tolerance",
    [(FastPath("cpu"), 1e-4), (FastPath("cpu", bfloat16=True), 2**-5)],
    ids=str,
)
def test_fast_paths_equal_the_plain_one_within_their_rounding(fast_path, tolerance, images):
    expected, found = one_step(PLAIN, images[:2]), one_step(fast_path, images[:2])
    for key, value in expected.items():
        error = (found[key] - value).norm() / value.norm()
        assert error <= tolerance, (key, error)


def test_adam_is_adam_fused_or_not_and_can_change_over_on_resuming():
    """Five steps against the definition (Kingma and Ba 2015, algorithm 1), the last two after a change of path."""
    gradients = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    expected, m, v = torch.ones(7, dtype=torch.double), 0, 0
    for t, g in enumerate(gradients, 1):
        m, v = 0.5 * m + 0.5 * g, 0.999 * v + 0.001 * g**2
        expected = expected - 2e-4 * (m / (1 - 0.5**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    for first, second in ((PLAIN, FastPath("cpu")), (FastPath("cpu"), PLAIN)):
        network = torch.nn.Linear(7, 1, bias=False).double()
        torch.nn.init.ones_(network.weight)
        optimizer = first.adam(network, 2e-4, (0.5, 0.999))
        for t, g in enumerate(gradients):
            if t == 3:
                saved, optimizer = optimizer.state_dict(), second.adam(network, 2e-4, (0.5, 0.999))
                second.load_adam(optimizer, saved)
                assert optimizer.param_groups[0]["fused"] is (None if second.plain else True)
            network.weight.grad = g[None].clone()
            optimizer.step()
        torch.testing.assert_close(network.weight[0].detach(), expected, rtol=1e-9, atol=0)


def test_the_rate_stays_when_moments_are_loaded():
    network = torch.nn.Linear(7, 1, bias=False)
    saved = FastPath("cpu").adam(network, 0.1).state_dict()
    optimizer = FastPath("cpu").adam(network, 0.2)
    FastPath("cpu").load_adam(optimizer, saved)
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_what_is_chosen(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert module.choose_fast_path(cpu, "bfloat16", False) == FastPath("cpu", bfloat16=True)
    assert module.choose_fast_path(cpu, "auto", True) == PLAIN
    for capability, bfloat16 in (((7, 5), False), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert module.choose_fast_path(cuda, "auto", False) == FastPath("cuda", bfloat16=bfloat16)
    assert not module.choose_fast_path(cuda, "float32", False).bfloat16


@pytest.mark.parametrize(
    "has_amx, has_avx512_bf16, name, variable, fast",
    [
        (True, True, "Intel Xeon", None, True),
        (True, True, "Intel Xeon", "ALL", True),
        (True, True, "Intel Xeon", "avx512_core_amx", True),
        (True, True, "Intel Xeon", "AVX512_CORE_BF16", False),
        (True, True, "Intel Xeon", "AVX2", False),
        (False, True, "Intel Xeon", None, False),
        (False, True, "AMD EPYC", None, True),
        (False, True, "AMD EPYC", "avx512_core_bf16", True),
        (False, True, "AMD EPYC", "AVX2", False),
        (False, False, "AMD EPYC", "ALL", False),
    ],
)
def test_bfloat16_is_fast_with_amx_and_on_amd(has_amx, has_avx512_bf16, name, variable, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    capabilities = {"avx512_bf16": has_avx512_bf16, "cpu_name": name}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if variable:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", variable)
    cpu = torch.device("cpu")
    assert module.has_fast_bfloat16(cpu) == fast
    assert module.choose_fast_path(cpu, "auto", False) == FastPath("cpu", bfloat16=fast)


def python(code: str, **variables) -> str:
    code = f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_freed_memory_is_kept():
    """The kernel's own count of page faults, over 20 tensors of 32 MB made and dropped one after another."""
    code = """
        import resource, torch
        from support import device
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(32, 64, 64, 64)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        first = faults()
        device.keep_freed_memory()
        faults()  # until the heap has grown
        print(first, faults())
    """
    before, after = map(int, python(code).split())
    assert after < before / 10


def test_free_memory_is_what_a_job_may_still_have_and_what_its_cache_would_give_back(monkeypatch):
    texts = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n",
        "/proc/self/cgroup": "0::/job\n",
        "/sys/fs/cgroup/job/memory.max": "4000\n",
        "/sys/fs/cgroup/job/memory.current": "3500\n",
        "/sys/fs/cgroup/job/memory.stat": "anon 2500\ninactive_file 1000\n",
    }

    def read_text(path):
        if str(path) not in texts:
            raise FileNotFoundError
        return texts[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert module.free_memory(torch.device("cpu")) == 4000 - 3500 + 1000
    texts["/sys/fs/cgroup/job/memory.max"] = "max\n"
    assert module.free_memory(torch.device("cpu")) == 8 * 1024


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = module.free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert module.free_memory(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.05)


def test_images_that_do_not_fit_on_the_device_are_kept_beside_it(data, monkeypatch):
    expected = OasisDataset(data, "test")
    monkeypatch.setattr("dataset.fits", lambda n_bytes, device: False)
    meta = OasisDataset(data, "test", "meta")  # torch's device that holds no data
    assert meta.images.device.type == "cpu" and torch.equal(meta.images, expected.images)
    assert meta.batch([3, 1]).device.type == "meta"


def test_unknown_devices_are_named():
    for name in ("gpu", "cuda:99", "cpu:x", "meta", "hpu", "privateuseone", ""):
        with pytest.raises(UserError, match=f"--device {name}"):
            module.choose_device(name)
    assert module.choose_device("cpu").type == "cpu" and module.choose_device("auto").type in ("cpu", "cuda", "mps")


def test_what_pytorch_has_cached_counts_as_free(monkeypatch):
    for name, value in (("mem_get_info", (5, 100)), ("memory_reserved", 40), ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert module.free_memory(torch.device("cuda")) == 15
    for name, value in (("recommended_max_memory", 70), ("current_allocated_memory", 30)):
        monkeypatch.setattr(torch.mps, name, lambda value=value: value)
    assert module.free_memory(torch.device("mps")) == 40


def test_products_of_matrices_stay_float32_whatever_the_environment_says():
    """As TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 sets it; the quantizer's distances are such a product on a GPU."""
    for fast_path in (PLAIN, FastPath("cpu")):
        torch.backends.cuda.matmul.allow_tf32 = True
        fast_path.set_up()
        assert not torch.backends.cuda.matmul.allow_tf32


def test_the_layout_is_channels_last_but_for_plain_and_mps():
    assert FastPath("cpu").layout == torch.channels_last and PLAIN.layout == torch.contiguous_format
    assert FastPath("mps").layout == torch.contiguous_format and str(FastPath("mps")).startswith("standard layout, ")
    assert FastPath("cuda").layout == torch.channels_last and str(FastPath("cuda")).startswith("channels_last, ")
