"""What decides a training besides the options, as frozen dataclasses."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class VQVAERecipe:
    """How the VQ-VAE is trained.

    At a constant learning rate the weights wander from step to step, and with them the grey level of the black
    background, to which SSIM is very sensitive. So an exponential moving average (EMA) of them is scored and saved, and
    the learning rate falls at the end.

    Attributes:
        average_decay: of the EMA. The average is short: a long one decodes black to a grey level that no single set of
            weights has.
        constant_rate, last_rate: of `training.fit.rate_factor`.
        kmeans_steps: first steps, in which embeddings are moved to the means of their latents. The encoder's output
            then changes faster than Adam can move embeddings at a rate of 1e-3, and nearly all codes would die.
        start_steps: of k-means on the first batch.
        revive_every: steps between looking for embeddings that were not chosen.
        ema_decay: of the moving averages of `--codebook ema`; the paper's.
    """

    average_decay: float = 0.9
    constant_rate: float = 0.6
    last_rate: float = 0.01
    kmeans_steps: int = 100
    start_steps: int = 10
    revive_every: int = 10
    ema_decay: float = 0.99


@dataclass(frozen=True)
class DCGANRecipe:
    """How the DCGAN is trained.

    Attributes:
        quantized: whether real latents are embeddings, z_q, or the encoder's output, z_e.
        directions: how many principal ones of latents are kept (`priors.latent_space.LatentSpace.fit`). Beside all 64,
            four cost 0.0001 of SSIM, three 0.002 (benchmarks/limits.py). None only divides latents by the codebook's
            largest value.
        emphasis: exponent of the amplitude spectrum that these are divided by: 0 keeps them, 1 whitens them.
        start_lr: the learning rate at which the generator is fitted to real coefficients before adversarial training,
            for as many steps as in all epochs; 0 for no such start.
        r1: the weight γ of the penalty on the discriminator's gradient at real coefficients (arXiv 1801.04406, eq. 9);
            0 for none.
        average_decay: of the EMA of the generator's weights, which draws the samples; 0 draws with the last weights.
        calibrated: whether samples get the covariances of real coefficients.
    """

    quantized: bool = False
    directions: int | None = 4
    emphasis: float = 0.5
    start_lr: float = 1e-3
    r1: float = 0.3
    average_decay: float = 0.999
    calibrated: bool = True


BALANCED = DCGANRecipe()
# The report's procedure, that of PyTorch's DCGAN tutorial: cross entropy and nothing else.
REPORT = DCGANRecipe(
    quantized=True, directions=None, emphasis=0.0, start_lr=0.0, r1=0.0, average_decay=0.0, calibrated=False
)
DCGAN = {"balanced": BALANCED, "report": REPORT}  # by the values of --dcgan-training


@dataclass(frozen=True)
class AutoregressiveRecipe:
    """How the prior over codes is trained.

    Attributes:
        width, dilations, hidden: of a `modules.GridNetwork`.
        without_plane, without_neighbours: probability that a slice's plane, or both neighbours, is dropped, so that the
            prior can also sample without them.
        without_one: probability that each of the other neighbours is dropped: the first planes of a stack have
            neighbours on one side only.
        exchanged: greatest share of a neighbour's codes that are replaced by another slice's, because in a stack the
            neighbours are generated, not real.
        average_decay: of the EMA of the weights.
        warm_up: steps in which the learning rate rises.
        constant_rate, last_rate: of `training.fit.rate_factor`.
        gradient_norm: gradients are clipped to this norm.
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


VQVAE = VQVAERecipe()
AUTOREGRESSIVE = AutoregressiveRecipe()


def recipes_of(options) -> dict[str, dict]:
    """What run.json records: by stage the recipe that it has with these options, trained or not."""
    return {
        "vqvae": asdict(VQVAE),
        "dcgan": asdict(DCGAN[options.dcgan_training]),
        "autoregressive": asdict(AUTOREGRESSIVE),
    }
