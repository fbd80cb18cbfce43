"""The prior over codes: its probabilities by enumeration and by a range coder, samples, conditions, and stacks."""

import itertools

import constriction
import numpy as np
import pytest
import torch

import modules
from modules import MOST_DISTANCE, N_PLANES, Autoregressive, Condition
from priors.autoregressive import (
    AutoregressivePrior,
    fit_frame,
    halving,
    halving_distances,
    plane_condition,
)
from priors.checkpoints import load_prior
from priors.code_cache import CodeCache


def random_network(n_codes: int, size: tuple[int, int], std: float = 0.5) -> Autoregressive:
    """A small network whose weights are all random, for some begin as 0."""
    torch.manual_seed(0)
    network = Autoregressive(torch.randn(n_codes, 4), size, 8, (1, 2), 8).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, std)
    return network


def repeated(condition: Condition, n: int) -> Condition:
    return Condition(*(part.expand(n, *part.shape[1:]) for part in condition))


@pytest.fixture(scope="module")
def tiny() -> tuple[torch.Tensor, torch.Tensor, Condition, Autoregressive]:
    """All 3x3 images of three codes, the probability of each, their condition, and the network."""
    network = random_network(3, (3, 3))
    codes = torch.tensor(list(itertools.product(range(3), repeat=9))).view(-1, 3, 3)
    condition = Condition(torch.tensor([5]), torch.randint(0, 3, (1, 2, 3, 3)), torch.tensor([[2, 0]]))
    with torch.no_grad():
        bits = network(codes, repeated(condition, len(codes))).double().sum((1, 2))
    return codes, 2**-bits, condition, network


def test_the_probabilities_of_all_images_add_up_to_1(tiny):
    assert tiny[1].sum().item() == pytest.approx(1, abs=1e-5)


def test_samples_come_as_often_as_their_probability_says(tiny):
    codes, probability, condition, network = tiny
    n = 20_000
    drawn = network.sample(torch.rand(n, 3, 3, generator=torch.Generator().manual_seed(0)), repeated(condition, n))
    number = (drawn.flatten(1) * 3 ** torch.arange(8, -1, -1)).sum(1)  # its row in `codes`
    share = torch.bincount(number, minlength=len(codes)) / n
    likely = probability > 0.005
    error = (share - probability) / (probability * (1 - probability) / n).sqrt()
    assert likely.sum() > 10 and error[likely].abs().max() < 4.5 and error[likely].square().mean() < 2
    assert share[~likely].sum().item() == pytest.approx(probability[~likely].sum().item(), abs=0.02)


def test_a_code_depends_on_those_before_it_alone():
    """In an order by grids, and in each by rows: a changed code changes no probability before its own."""
    network, size = random_network(5, (17, 18)), (17, 18)
    codes = torch.randint(5, (1, *size))
    condition = Condition(torch.tensor([0]), torch.zeros(1, 2, *size).long(), torch.zeros(1, 2).long())
    order = []
    for stride in (8, 4, 2, 1):
        places = itertools.product(range(0, size[0], stride), range(0, size[1], stride))
        order += [place for place in places if place not in order]
    with torch.no_grad():
        before = network(codes, condition)[0]
        for row, column in ((0, 0), (8, 16), (16, 16), (4, 12), (2, 2), (6, 9), (15, 17), (16, 17)):
            changed = codes.clone()
            changed[0, row, column] = (codes[0, row, column] + 1) % 5
            differ = (network(changed, condition)[0] != before).tolist()
            first = next(place for place in order if differ[place[0]][place[1]])
            assert first == (row, column)


def test_neighbours_that_are_not_there_are_not_read():
    network = random_network(5, (8, 8))
    codes, near = torch.randint(5, (2, 8, 8)), torch.randint(5, (2, 2, 8, 8))
    plane = torch.tensor([3, N_PLANES])

    def bits(near, distance):
        return network(codes, Condition(plane, near, torch.tensor(distance))).detach()

    other = (near + 1) % 5
    none, below = [[0, 0], [0, 0]], [[4, 0], [1, 0]]
    assert torch.equal(bits(near, none), bits(other, none))
    assert not torch.equal(bits(near, below), bits(other, below))
    assert torch.equal(bits(near, below), bits(torch.stack([near[:, 0], other[:, 1]], 1), below))


def test_a_range_coder_writes_images_in_as_many_bits_and_reads_them_again(monkeypatch):
    """A coder takes each code's probabilities in the order in which `sample` draws them."""
    network = random_network(64, (32, 24), 0.2)
    codes = torch.randint(64, (5, 32, 24))
    condition = Condition(torch.arange(5), torch.randint(64, (5, 2, 32, 24)), torch.tensor([[1, 2]] * 5))
    encoder = constriction.stream.queue.RangeEncoder()

    def each(logits, values):
        models = torch.as_tensor(logits).double().softmax(1).movedim(1, -1).reshape(-1, 64).numpy()
        for probabilities, value in zip(models, values.flatten().tolist(), strict=True):
            yield constriction.stream.model.Categorical(probabilities, perfect=False), int(value)

    def write(logits, values):
        for model, value in each(logits, values):
            encoder.encode(value, model)
        return values.long()

    monkeypatch.setattr(modules, "_draw", write)
    network.sample(codes.double(), condition)
    with torch.no_grad():
        bits = network(codes, condition).sum().item()
    assert encoder.num_bits() == pytest.approx(bits, rel=0.005)

    decoder = constriction.stream.queue.RangeDecoder(encoder.get_compressed())

    def read(logits, values):
        read = [decoder.decode(model) for model, _ in each(logits, values)]
        return torch.from_numpy(np.array(read)).view(values.shape)

    monkeypatch.setattr(modules, "_draw", read)
    assert torch.equal(network.sample(torch.zeros(5, 32, 24), condition), codes)


def test_planes_are_halved():
    steps = halving(range(32))
    assert [len(step) for step in steps] == [1, 2, 4, 8, 16, 1]
    known = set()
    for step in steps:
        for plane, below, above in step:
            assert below == (plane - max((k for k in known if k < plane), default=plane))
            assert above == (min((k for k in known if k > plane), default=plane) - plane)
        known |= {plane for plane, _, _ in step}
    assert known == set(range(32)) and halving([]) == [] and halving([7]) == [[(7, 0, 0)]]


@pytest.fixture(scope="module")
def cache(vqvae, train_set) -> CodeCache:
    return CodeCache(vqvae, train_set)


def test_slices_know_their_planes_and_neighbours(cache, vqvae, train_set):
    assert len(cache) == 15 and torch.equal(cache.batch([3, 7]), vqvae.encode(train_set.batch([3, 7])))
    numbers = [train_set.case_and_slice(i) for i in range(15)]
    assert cache.plane.tolist() == [number for _, number in numbers]
    place = {number: i for i, number in enumerate(numbers)}
    planes = sorted({number for _, number in numbers})
    gap = planes[1] - planes[0]
    condition = cache.condition(torch.arange(15), torch.tensor([[gap, gap]] * 15))
    for i, (case, number) in enumerate(numbers):
        for side, sign in enumerate((-1, 1)):
            other = place.get((case, number + sign * gap))
            assert (condition.distance[i, side] > 0) == (other is not None)
            if other is not None:
                assert torch.equal(condition.neighbours[i, side], cache.codes[other].long())
    distances = halving_distances(cache)
    assert ((distances == 0).all(1)).sum() == 3  # the first plane of each head
    assert distances.max() <= MOST_DISTANCE


@pytest.fixture(scope="module")
def prior(cache, vqvae) -> AutoregressivePrior:
    frame = fit_frame(cache.codes)
    return AutoregressivePrior(random_network(64, frame.size, 0.2), frame, vqvae, [3, 9], phantoms=True)


def test_around_heads_codes_are_the_frames(cache, prior, rng):
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[prior.frame.box] = True
    usual = cache.codes.mode(0).values
    assert torch.equal(prior.frame.codes, usual.long()) and 0 < inside.sum() < 64 * 64
    assert (cache.codes == usual)[:, ~inside].all()
    codes = prior.sample(prior.noise(2, rng), plane_condition(torch.tensor([3, 9])))
    assert (codes == usual)[:, ~inside].all() and not (codes == usual)[:, inside].all()
    bits = prior.bits(codes, plane_condition(torch.tensor([3, 9])))
    assert bits[:, ~inside].max() < 1e-2 and bits[:, inside].mean() > 1
    row, column = (~inside).nonzero()[0].tolist()
    codes[0, row, column] = (usual[row, column] + 1) % 64
    other = prior.bits(codes, plane_condition(torch.tensor([3, 9])))[0, row, column].item()
    assert other == pytest.approx(-np.log2(prior.frame.rare / 63), rel=1e-5) and other > 15


def test_a_sample_depends_on_its_noise_alone(prior, rng):
    noise = prior.noise(5, rng)
    whole = prior.sample(noise, plane_condition(torch.tensor([3, 9, 3, 9, 3])))
    assert torch.equal(prior.sample(noise[3:], plane_condition(torch.tensor([9, 3]))), whole[3:])
    images = prior.sample_images(noise)
    assert torch.equal(images[3:4], prior.decode(whole[3:4])) and 0 <= images.min() and images.max() <= 1


def test_a_stack_is_told_what_has_been_drawn_of_it(prior, rng, monkeypatch):
    """Each plane, drawn again from its neighbours in the finished stack, is the same."""
    noise, planes = prior.noise(2 * 5, rng).unflatten(0, (2, 5)), [4, 5, 6, 20, 21]
    codes = prior.sample_stacks(noise, planes)
    steps = halving(planes)
    assert [[plane for plane, _, _ in step] for step in steps] == [[6], [5, 21], [4, 20]]
    assert halving([0, 31]) == [[(31, 0, 0)], [(0, 0, 0)]]  # too far apart
    index = {plane: i for i, plane in enumerate(planes)}
    for plane, below, above in (each for step in steps for each in step):
        at = index[plane]
        near = torch.stack([codes[:, index[plane - below]], codes[:, index[plane + above]]], 1)
        distance = torch.tensor([[below, above]] * 2)
        condition = Condition(torch.tensor([plane] * 2), near, distance)
        assert torch.equal(prior.sample(noise[:, at], condition), codes[:, at])


def test_the_file(prior, tmp_path, rng):
    path = tmp_path / "autoregressive.pth"
    torch.save(prior.checkpoint(), path)
    loaded = load_prior(path, prior.vqvae)
    assert loaded.planes == [3, 9] and loaded.phantoms
    noise, condition = prior.noise(2, rng), plane_condition(torch.tensor([3, 9]))
    assert torch.equal(loaded.sample(noise, condition), prior.sample(noise, condition))


def test_a_second_scan_is_a_head_of_its_own(vqvae, images):
    """Its slices have numbers from 32 on, as `preparation.oasis` writes them."""

    class Scans:
        split = "train"

        def __len__(self):
            return 4

        def batch(self, indices):
            return images[list(indices)]

        def case_and_slice(self, i):
            return 1, (30, 31, 32, 33)[i]

        def subject(self, i):
            return 1

    cache = CodeCache(vqvae, Scans())
    assert cache.plane.tolist() == [30, 31, N_PLANES, N_PLANES] and len(cache.heads) == 2
    distance = cache.condition(torch.arange(4), torch.ones(4, 2, dtype=torch.long)).distance
    assert distance.tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]


def test_one_code_has_no_information():
    network = Autoregressive(torch.ones(1, 4), (8, 8), 8, (1,), 8)
    condition = Condition(torch.zeros(1).long(), torch.zeros(1, 2, 8, 8).long(), torch.zeros(1, 2).long())
    assert torch.equal(network(torch.zeros(1, 8, 8).long(), condition), torch.zeros(1, 8, 8))
