"""The methods of keeping the codebook in use: each step against its definition or a plain loop."""

import copy

import pytest
import torch

from modules import VQVAE, VectorQuantizer, rows
from training import codebook


def test_start_from_takes_latents(rng):
    quantizer, z_e = VectorQuantizer(20, 4), torch.randn(2, 4, 8, 8)
    codebook.start_from(quantizer, z_e, rng)
    found = {tuple(row.tolist()) for row in z_e.permute(0, 2, 3, 1).reshape(-1, 4)}
    assert all(tuple(row.tolist()) in found for row in quantizer.embedding.weight)


def test_k_means_steps_find_separate_clusters(rng):
    centres = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, 0.0], [0.0, -5.0]])
    latents = centres.repeat(64, 1) + 0.1 * torch.randn(256, 2, generator=rng)
    z_e = latents.T.reshape(1, 2, 16, 16)
    quantizer = VectorQuantizer(4, 2)
    with torch.no_grad():  # near none of the centres: all latents fall into few cells
        quantizer.embedding.weight.copy_(torch.rand(4, 2, generator=rng) / 2 - 0.25)
    for _ in range(6):
        codebook.k_means_step(quantizer, z_e, rng)
    expected = torch.stack([latents[i::4].mean(0) for i in range(4)])
    found = quantizer.embedding.weight[quantizer.nearest(expected.T.reshape(1, 2, 2, 2)).flatten()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_only_the_dead_move_and_most_to_the_costly_cell(rng):
    quantizer = VectorQuantizer(4, 2)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [99.0, 99.0], [99.0, 98.0]]))
    z_e = torch.zeros(1, 2, 4, 4)
    z_e[0, 0, 2:] = 10  # half the latents on each of the first two embeddings ...
    z_e[0, 1, 2:] = torch.linspace(0.5, 1, 8).view(2, 4)  # ... but only the second half deviates
    codebook.move_dead(quantizer, torch.tensor([False, False, True, True]), z_e, rng)
    weight = quantizer.embedding.weight
    assert weight[:2].tolist() == [[0.0, 0.0], [10.0, 0.0]]
    assert (weight[2:, 0] == 10).all() and (weight[2:, 1] >= 0.5).all()


def test_nothing_moves_where_nothing_can_be_gained(rng):
    quantizer = VectorQuantizer(3, 2)
    before = quantizer.embedding.weight.detach().clone()
    for z_e in (before[0].view(1, 2, 1, 1).repeat(1, 1, 2, 2), torch.full((1, 2, 2, 2), torch.nan)):
        codebook.move_dead(quantizer, torch.tensor([False, True, True]), z_e, rng)
        assert torch.equal(quantizer.embedding.weight, before)


def test_reviving_forgets_the_momentum_of_the_dead(rng):
    model = VQVAE(8, 4)
    quantizer = model.vector_quantizer
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    vq_loss, _, _ = quantizer(torch.randn(1, 4, 8, 8))
    vq_loss.backward()
    optimizer.step()
    moments = optimizer.state[quantizer.embedding.weight]
    before = moments["exp_avg"].clone() + 1
    moments["exp_avg"] += 1
    dead = torch.tensor([5, 0, 1, 1, 0, 2, 2, 2]) == 0
    alive = quantizer.embedding.weight.detach().clone()
    codebook.KMeans(quantizer, optimizer).revive(dead, torch.randn(1, 4, 8, 8), rng)
    assert not moments["exp_avg"][dead].any() and not moments["exp_avg_sq"][dead].any()
    assert torch.equal(moments["exp_avg"][~dead], before[~dead])
    assert torch.equal(quantizer.embedding.weight[~dead], alive[~dead])
    assert (quantizer.embedding.weight[dead] != alive[dead]).any(1).all()


def one_step(method, step, z_e, rng):
    """As the VQ-VAE's stage makes it: the method's own step, the loss's, the count."""
    method.before_lookup(step, z_e, len(z_e), rng)
    vq_loss, _, codes = method.quantizer(z_e)
    method.optimizer.zero_grad()
    if vq_loss.requires_grad:
        vq_loss.backward()
    method.optimizer.step()
    method.after_step(codes)


def new_method(kind):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4)
    return kind(quantizer, torch.optim.Adam(quantizer.parameters(), lr=1e-3))


def test_k_means_uses_every_code_from_the_first_update_and_revives_later(rng):
    method = new_method(codebook.KMeans)
    for update in range(10):
        one_step(method, update, torch.randn(2, 4, 8, 8, generator=rng), rng)
        assert len(method.quantizer.nearest(torch.randn(8, 4, 8, 8, generator=rng)).unique()) == 16
    with torch.no_grad():
        method.quantizer.embedding.weight[3] = 1e3  # out of everything's reach
    method.usage.zero_()
    for update in range(101, 110):
        one_step(method, update, torch.randn(2, 4, 8, 8, generator=rng), rng)
    assert method.quantizer.embedding.weight[3].min() > 900 and method.usage[3] == 0
    z_e = torch.randn(2, 4, 8, 8, generator=rng)
    method.before_lookup(110, z_e, 2, rng)
    assert (rows(z_e) == method.quantizer.embedding.weight[3]).all(1).any()  # it lies on a latent
    assert not method.usage.any()


def test_paper_leaves_the_codebook_to_the_loss(rng):
    method = new_method(codebook.LossOnly)
    z_e = torch.randn(2, 4, 8, 8, generator=rng)
    assert method.embeddings.abs().max() <= 1 / 16  # uniform in ±1/n_embeddings
    before = method.embeddings.clone()
    method.before_lookup(0, z_e, 2, rng)
    assert torch.equal(method.embeddings, before)
    one_step(method, 0, z_e, rng)
    moved = (method.embeddings != before).any(1)
    chosen = torch.isin(torch.arange(16), VectorQuantizer.nearest(new_method(codebook.LossOnly).quantizer, z_e))
    assert torch.equal(moved, chosen) and method.state_dict() == {}


def test_ema_is_the_papers_appendix_by_a_plain_loop(rng):
    method = new_method(codebook.EMA)
    e = method.embeddings.clone().double()
    n, m = torch.ones(16).double(), e.clone()
    for update in range(5):
        z_e = torch.randn(2, 4, 8, 8, generator=rng)
        one_step(method, update, z_e, rng)
        vectors = [z_e[b, :, i, j].double() for b in range(2) for i in range(8) for j in range(8)]
        nearest = [min(range(16), key=lambda k, z=z: ((z - e[k]) ** 2).sum().item()) for z in vectors]
        for k in range(16):
            mine = [z for z, chosen in zip(vectors, nearest, strict=True) if chosen == k]
            n[k] = 0.99 * n[k] + 0.01 * len(mine)
            m[k] = 0.99 * m[k] + 0.01 * sum(mine, torch.zeros(4).double())
            e[k] = m[k] / n[k]
        torch.testing.assert_close(method.embeddings.double(), e, rtol=1e-4, atol=1e-6)
    assert method.quantizer.embedding.weight.grad is None  # the loss has no say


def test_ema_keeps_what_nothing_chooses_where_it_is_even_after_very_many_updates(rng):
    method = new_method(codebook.EMA)
    with torch.no_grad():
        method.quantizer.embedding.weight[5] = 1e3
    method.sums.copy_(method.embeddings)
    z_e = torch.randn(1, 4, 2, 2, generator=rng)
    for update in range(12_000):  # 0.99 to this power is below float32's least number
        method.before_lookup(update, z_e, len(z_e), rng)
    torch.testing.assert_close(method.embeddings[5], torch.full((4,), 1e3), rtol=1e-5, atol=0)
    assert method.embeddings.isfinite().all()


@pytest.mark.parametrize("name", codebook.METHODS)
def test_a_method_continues_from_its_state(name, rng):
    batches = [torch.randn(2, 4, 8, 8, generator=rng) for _ in range(14)]
    method = new_method(codebook.METHODS[name])
    for update in range(7):
        one_step(method, 96 + update, batches[update], torch.Generator().manual_seed(update))
    state = {key: value.clone() for key, value in method.state_dict().items()}
    weights = method.embeddings.clone()
    adam = copy.deepcopy(method.optimizer.state_dict())
    again = new_method(codebook.METHODS[name])
    with torch.no_grad():
        again.quantizer.embedding.weight.copy_(weights)
    again.optimizer.load_state_dict(adam)
    again.load_state_dict(state)
    for update in range(7, 14):
        for each in (method, again):
            one_step(each, 96 + update, batches[update], torch.Generator().manual_seed(update))
    assert torch.equal(method.embeddings, again.embeddings)
    for key, value in method.state_dict().items():  # what revival at update 110 goes by
        assert torch.equal(value, again.state_dict()[key]), key
