"""vqvae.pth, and what ties a prior's file to the VQ-VAE that it belongs to."""

import hashlib
from pathlib import Path

from torch import Tensor

from modules import VQVAE
from support import files


def codebook_hash(vqvae: VQVAE) -> str:
    """SHA-256 of the codebook's float32 values."""
    values = vqvae.vector_quantizer.embedding.weight.detach().cpu().float().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


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
