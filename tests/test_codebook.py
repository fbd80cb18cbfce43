"""The codebook's three ways: each step against its definition or a plain loop."""

import copy

import pytest
import torch

import codebook
from modules import VQVAE, VectorQuantizer


def test_start_from_takes_latents(random):
    quantizer, z_e = VectorQuantizer(20, 4), torch.randn(2, 4, 8, 8)
    codebook.start_from(quantizer, z_e, random)
    rows = {tuple(row.tolist()) for row in z_e.permute(0, 2, 3, 1).reshape(-1, 4)}
    assert all(tuple(row.tolist()) in rows for row in quantizer.embedding.weight)


def test_k_means_steps_find_separate_clusters(random):
    centres = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, 0.0], [0.0, -5.0]])
    rows = centres.repeat(64, 1) + 0.1 * torch.randn(256, 2, generator=random)
    z_e = rows.T.reshape(1, 2, 16, 16)
    quantizer = VectorQuantizer(4, 2)  # starts at ±1/4, near none of them: all latents fall into few cells
    for _ in range(6):
        codebook.k_means_step(quantizer, z_e, random)
    expected = torch.stack([rows[i::4].mean(0) for i in range(4)])
    found = quantizer.embedding.weight[quantizer.nearest(expected.T.reshape(1, 2, 2, 2)).flatten()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_only_the_dead_move_and_most_to_the_costly_cell(random):
    quantizer = VectorQuantizer(4, 2)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [99.0, 99.0], [99.0, 98.0]]))
    z_e = torch.zeros(1, 2, 4, 4)
    z_e[0, 0, 2:] = 10  # half the latents on each of the first two embeddings ...
    z_e[0, 1, 2:] = torch.linspace(0.5, 1, 8).view(2, 4)  # ... but only the second half deviates
    codebook.move_dead(quantizer, torch.tensor([False, False, True, True]), z_e, random)
    weight = quantizer.embedding.weight
    assert weight[:2].tolist() == [[0.0, 0.0], [10.0, 0.0]]
    assert (weight[2:, 0] == 10).all() and (weight[2:, 1] >= 0.5).all()


def test_nothing_moves_where_nothing_can_be_gained(random):
    quantizer = VectorQuantizer(3, 2)
    before = quantizer.embedding.weight.detach().clone()
    for z_e in (before[0].view(1, 2, 1, 1).repeat(1, 1, 2, 2), torch.full((1, 2, 2, 2), torch.nan)):
        codebook.move_dead(quantizer, torch.tensor([False, True, True]), z_e, random)
        assert torch.equal(quantizer.embedding.weight, before)


def test_reviving_forgets_the_momentum_of_the_dead(random):
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
    codebook.KMeans(quantizer, optimizer).revive(dead, torch.randn(1, 4, 8, 8), random)
    assert not moments["exp_avg"][dead].any() and not moments["exp_avg_sq"][dead].any()
    assert torch.equal(moments["exp_avg"][~dead], before[~dead])
    assert torch.equal(quantizer.embedding.weight[~dead], alive[~dead])
    assert (quantizer.embedding.weight[dead] != alive[dead]).any(1).all()


def one_update(way, update, z_e, random):
    """As train_vqvae makes it: the way's own step, the loss's, the count."""
    way.before_update(update, lambda: z_e, len(z_e), random)
    vq_loss, _, codes = way.quantizer(z_e)
    way.optimizer.zero_grad()
    if vq_loss.requires_grad:
        vq_loss.backward()
    way.optimizer.step()
    way.after_update(codes)


def a_way(kind, n=16, dim=4):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(n, dim)
    return kind(quantizer, torch.optim.Adam(quantizer.parameters(), lr=1e-3))


def test_k_means_uses_every_code_from_the_first_update_and_revives_later(random, monkeypatch):
    monkeypatch.setattr(codebook.KMeans, "K_MEANS_UPDATES", 10)
    way = a_way(codebook.KMeans)
    for update in range(10):
        one_update(way, update, torch.randn(2, 4, 8, 8, generator=random), random)
        assert len(way.quantizer.nearest(torch.randn(8, 4, 8, 8, generator=random)).unique()) == 16
    with torch.no_grad():
        way.quantizer.embedding.weight[3] = 1e3  # out of everything's reach
    way.usage.zero_()
    for update in range(11, 20):
        one_update(way, update, torch.randn(2, 4, 8, 8, generator=random), random)
    assert way.quantizer.embedding.weight[3].min() > 900 and way.usage[3] == 0
    z_e = torch.randn(2, 4, 8, 8, generator=random)
    way.before_update(20, lambda: z_e, 2, random)
    assert (codebook.rows(z_e) == way.quantizer.embedding.weight[3]).all(1).any()  # it lies on a latent
    assert not way.usage.any()


def test_paper_leaves_the_codebook_to_the_loss(random):
    way = a_way(codebook.Paper)
    z_e = torch.randn(2, 4, 8, 8, generator=random)
    assert way.embeddings.abs().max() <= 1 / 16  # uniform in ±1/n_embeddings
    before = way.embeddings.clone()
    way.before_update(0, lambda: pytest.fail("no latents are needed"), 2, random)
    assert torch.equal(way.embeddings, before)
    one_update(way, 0, z_e, random)
    moved = (way.embeddings != before).any(1)
    chosen = torch.isin(torch.arange(16), VectorQuantizer.nearest(a_way(codebook.Paper).quantizer, z_e))
    assert torch.equal(moved, chosen) and way.state() == {}


def test_ema_is_the_papers_appendix_by_a_plain_loop(random):
    way = a_way(codebook.Ema)
    e = way.embeddings.clone().double()
    n, m = torch.ones(16).double(), e.clone()
    for update in range(5):
        z_e = torch.randn(2, 4, 8, 8, generator=random)
        one_update(way, update, z_e, random)
        vectors = [z_e[b, :, i, j].double() for b in range(2) for i in range(8) for j in range(8)]
        nearest = [min(range(16), key=lambda k, z=z: ((z - e[k]) ** 2).sum().item()) for z in vectors]
        for k in range(16):
            mine = [z for z, chosen in zip(vectors, nearest, strict=True) if chosen == k]
            n[k] = 0.99 * n[k] + 0.01 * len(mine)
            m[k] = 0.99 * m[k] + 0.01 * sum(mine, torch.zeros(4).double())
            e[k] = m[k] / n[k]
        torch.testing.assert_close(way.embeddings.double(), e, rtol=1e-4, atol=1e-6)
    assert way.quantizer.embedding.weight.grad is None  # the loss has no say


def test_ema_keeps_what_nothing_chooses_where_it_is_even_after_very_many_updates(random):
    way = a_way(codebook.Ema)
    with torch.no_grad():
        way.quantizer.embedding.weight[5] = 1e3
    way.sums.copy_(way.embeddings)
    z_e = torch.randn(1, 4, 2, 2, generator=random)
    for update in range(12_000):  # 0.99 to this power is below float32's least number
        way.before_update(update, lambda: z_e, len(z_e), random)
    torch.testing.assert_close(way.embeddings[5], torch.full((4,), 1e3), rtol=1e-5, atol=0)
    assert way.embeddings.isfinite().all()


@pytest.mark.parametrize("name", codebook.WAYS)
def test_a_way_goes_on_from_its_state(name, random):
    batches = [torch.randn(2, 4, 8, 8, generator=random) for _ in range(14)]
    way = a_way(codebook.WAYS[name])
    for update in range(7):
        one_update(way, 96 + update, batches[update], torch.Generator().manual_seed(update))
    state = {key: value.clone() for key, value in way.state().items()}
    weights = way.embeddings.clone()
    adam = copy.deepcopy(way.optimizer.state_dict())
    again = a_way(codebook.WAYS[name])
    with torch.no_grad():
        again.quantizer.embedding.weight.copy_(weights)
    again.optimizer.load_state_dict(adam)
    again.restore(state)
    for update in range(7, 14):
        for each in (way, again):
            one_update(each, 96 + update, batches[update], torch.Generator().manual_seed(update))
    assert torch.equal(way.embeddings, again.embeddings)
    for key, value in way.state().items():  # what revival at update 110 goes by
        assert torch.equal(value, again.state()[key]), key
