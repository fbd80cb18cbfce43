"""vqvae.pth and the files of priors, loaded with care."""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from modules import VQVAE
from priors import autoregressive
from priors.autoregressive import AutoregressivePrior
from priors.flow import FlowPrior
from priors.latent_space import LatentSpace, checked
from priors.prior import DCGANPrior, Prior
from priors.spectrum import N_RINGS
from support import files
from support.console import UserError


class PriorFiles(NamedTuple):
    """What a prior is called, and the files of a run that belong to it.

    Attributes:
        title: on the console.
        weights: the prior's file first.
        prefix: of the names of figures.
    """

    title: str
    weights: tuple[str, ...]
    prefix: str


# by the values of --prior and the kind that a prior's file names
PRIORS = {
    "dcgan": PriorFiles("DCGAN", ("generator.pth", "discriminator.pth"), "gan"),
    "flow": PriorFiles("Flow", ("flow.pth",), "flow"),
    "autoregressive": PriorFiles("Autoregressive prior", ("autoregressive.pth",), "autoregressive"),
}
PRIOR_NAMES = " or ".join(prior.weights[0] for prior in PRIORS.values())


def load_vqvae(path: str | Path) -> VQVAE:
    """The network in a vqvae.pth, in eval mode on the CPU, sized as its codebook says.

    Raises UserError if the file cannot be read or does not hold a VQ-VAE with finite weights.
    """

    def build(state: dict[str, Tensor]) -> VQVAE:
        weight = state.get("vector_quantizer.embedding.weight") if isinstance(state, dict) else None
        shape = getattr(weight, "shape", ())
        if len(shape) != 2 or not all(1 <= size <= 65536 for size in shape):
            raise ValueError(f"it holds no VQ-VAE ({_what_is_there(state)})")
        vqvae = VQVAE(n_embeddings=shape[0], embeddings_dim=shape[1])
        files.load_state(vqvae, state)
        return vqvae.eval()

    return files.load(path, build)


KINDS = {kind.kind: kind for kind in (DCGANPrior, FlowPrior)}


def load_prior(path: str | Path, vqvae: VQVAE) -> Prior | AutoregressivePrior:
    """The prior in a file that `PRIORS` names, on the VQ-VAE's device.

    Raises UserError if the file holds none, or not one for this VQ-VAE.
    """
    return files.load(path, partial(prior_of, vqvae=vqvae))


def load_autoregressive(path: str | Path, vqvae: VQVAE) -> AutoregressivePrior:
    """As `load_prior`, of an autoregressive.pth. Raises UserError if the file holds another prior, too."""
    prior = load_prior(path, vqvae)
    if not isinstance(prior, AutoregressivePrior):
        raise UserError(f"{path}: is no autoregressive prior")
    return prior


def prior_of(contents: dict, vqvae: VQVAE) -> Prior | AutoregressivePrior:
    """The prior of a `checkpoint`, on the VQ-VAE's device. Raises ValueError if it is none, or not this VQ-VAE's."""
    if isinstance(contents, dict) and contents.get("kind") == "autoregressive":
        return autoregressive.prior_of(contents, vqvae)
    needed = {"state_dict", "codebook"} | {field.name for field in fields(LatentSpace)}
    if not isinstance(contents, dict) or contents.get("kind") not in KINDS or not needed <= contents.keys():
        raise ValueError(f"it holds no prior of this version (name a {PRIOR_NAMES})")
    if contents["codebook"] != files.digest(vqvae.vector_quantizer.embedding.weight):
        raise ValueError("it belongs to another codebook; use the vqvae.pth that it was trained with")
    weight = vqvae.vector_quantizer.embedding.weight
    space = LatentSpace.from_tensors(contents, weight.shape[1]).to(weight.device)
    prior = KINDS[contents["kind"]].untrained(contents, space, vqvae, bool(contents.get("phantoms", False)))
    for key, network in prior.networks.items():
        files.load_state(network, contents[key])
    if "gain" in contents:
        n = space.rank
        prior.gain = checked(contents["gain"], "gain", (N_RINGS, n, n)).to(weight.device)
    for network in (*prior.networks.values(), vqvae):  # as in training, for the same digits
        network.to(weight.device, memory_format=torch.channels_last).eval()
    return prior


def _what_is_there(state: object) -> str:
    """Where the codebook is in the contents of a file that has none where it should be."""
    name = "vector_quantizer.embedding.weight"
    keys = [key for key in state if isinstance(key, str)] if isinstance(state, dict) else []
    for key in keys:
        if key.endswith(f".{name}"):
            prefix = key.removesuffix(name)
            return f"its keys begin with '{prefix}', of a wrapper; save {{key.removeprefix('{prefix}'): …}} of them"
        if isinstance(state[key], dict) and name in state[key]:
            return f"its weights are under '{key}'; save what is there, torch.load(…)['{key}']"
    first = f"; it begins with '{keys[0][:99]}'" if keys else ""
    return f"no codebook '{name}'{first}"
