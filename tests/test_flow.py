"""The flow's stage: what its network is shown."""

import torch
from test_distributed import new_flow


def test_the_network_is_shown_moved_images_and_told_their_positions(images):
    stage, shown = new_flow(), []
    network = stage.network
    stage.network = lambda x, t, position: shown.append((x, t, position)) or network(x, t, position)
    stage.network.parameters = network.parameters
    batch = images[:1].expand(16, -1, -1, -1)
    stage.step(batch, 16, 0, torch.Generator().manual_seed(3))

    rng, ((x, t, position),) = torch.Generator().manual_seed(3), shown
    (times, noise), along = stage.drawn(16, rng), torch.linspace(-1, 1, 32)
    assert torch.equal(t, times)
    for columns, image in ((along, images[:1]), (-along, images[:1].flip(3))):
        found = position.isclose(torch.stack([columns.expand(32, 32), along[:, None].expand(32, 32)]), atol=1e-5)
        alike = found.all((1, 2, 3))
        assert 0 < alike.sum() < 8
        expected = stage.prior.packed(stage.latents.encode(image).float())
        at = times[alike, None, None, None]
        torch.testing.assert_close(x[alike], (1 - at) * noise[alike] + at * expected, rtol=0, atol=5e-3)
