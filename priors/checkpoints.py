"""vqvae.pth and the files of priors, loaded with care."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from modules import VQVAE
from priors.autoregressive import AutoregressivePrior
from priors.dcgan import DCGANPrior
from support import files
from support.console import UserError

Prior = DCGANPrior | AutoregressivePrior


class PriorKind(NamedTuple):
    """What a prior is called, and the files of a run that belong to it.

    Attributes:
        title: on the console.
        weights: the names of its files, the prior's own first.
        prefix: of the names of figures.
        prior: its class.
    """

    title: str
    weights: tuple[str, ...]
    prefix: str
    prior: type[Prior]


# by the values of --prior, which a prior's file has as its "kind"
PRIORS = {
    "dcgan": PriorKind("DCGAN", ("generator.pth", "discriminator.pth"), "gan", DCGANPrior),
    "autoregressive": PriorKind("Autoregressive prior", ("autoregressive.pth",), "autoregressive", AutoregressivePrior),
}
PRIOR_NAMES = " or ".join(prior.weights[0] for prior in PRIORS.values())


def load_vqvae(path: str | Path) -> VQVAE:
    """The network in a vqvae.pth, in eval mode on the CPU, sized as its codebook says.

    Its layout is channels_last, as in training: another one rounds otherwise, and two programs would differ in a digit.

    Raises UserError if the file cannot be read or does not hold a VQ-VAE with finite weights.
    """

    def build(state: dict[str, Tensor]) -> VQVAE:
        weight = state.get("vector_quantizer.embedding.weight") if isinstance(state, dict) else None
        shape = getattr(weight, "shape", ())
        if len(shape) != 2 or not all(1 <= size <= 65536 for size in shape):
            first = f"; it begins with {next(iter(state))!r}" if isinstance(state, dict) and state else ""
            raise ValueError(f"it holds no VQ-VAE: no codebook 'vector_quantizer.embedding.weight'{first}")
        vqvae = VQVAE(n_embeddings=shape[0], embeddings_dim=shape[1])
        files.load_state(vqvae, state)
        return vqvae.eval().to(memory_format=torch.channels_last)

    return files.load(path, build)


def load_prior(path: str | Path, vqvae: VQVAE) -> Prior:
    """The prior in a generator.pth or autoregressive.pth, on the VQ-VAE's device.

    Raises UserError if the file holds none, or not one for this VQ-VAE.
    """

    def build(contents: dict) -> Prior:
        kind = contents.get("kind") if isinstance(contents, dict) else None
        if not isinstance(kind, str) or kind not in PRIORS:
            raise ValueError(f"it holds no prior (name a {PRIOR_NAMES})")
        if contents["codebook"] != files.digest(vqvae.vector_quantizer.embedding.weight):
            raise ValueError("it belongs to another codebook; use the vqvae.pth that it was trained with")
        return PRIORS[kind].prior.from_checkpoint(contents, vqvae)

    return files.load(path, build)


def load_autoregressive(path: str | Path, vqvae: VQVAE) -> AutoregressivePrior:
    """As `load_prior`. Raises UserError also if the file holds another prior."""
    prior = load_prior(path, vqvae)
    if not isinstance(prior, AutoregressivePrior):
        raise UserError(f"{path}: is no autoregressive prior")
    return prior
