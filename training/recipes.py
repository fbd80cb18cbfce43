"""What decides a training besides the options, as frozen dataclasses."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class AutoregressiveRecipe:
    """Of the prior over codes.

    Attributes:
        width, dilations, hidden: of a `modules.GridNetwork`.
        without_plane, without_neighbours: shares of slices that are not told their plane, or no neighbour, so that the
            prior also draws without.
        without_one: share of each neighbour, of slices that are told some, that is left out: the first planes of a
            stack have neighbours on one side alone.
        exchanged: up to such a share of a neighbour's codes are another slice's, for it will be drawn, not real.
        average_decay: of the EMA of the weights.
        warm_up: steps in which the learning rate rises.
        constant_rate, last_rate: of `training.fit.falling_rate`.
        gradient_norm: at most.
    """

    width: int = 64
    dilations: tuple[int, ...] = (1, 2, 4, 1, 2, 4)
    hidden: int = 96
    without_plane: float = 0.1
    without_neighbours: float = 0.3
    without_one: float = 0.25
    exchanged: float = 0.1
    average_decay: float = 0.998
    warm_up: int = 100
    constant_rate: float = 0.5
    last_rate: float = 0.01
    gradient_norm: float = 1.0


AUTOREGRESSIVE = AutoregressiveRecipe()
RECIPES = {"autoregressive": asdict(AUTOREGRESSIVE)}  # as run.json has them
