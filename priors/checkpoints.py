"""What ties a prior's file to the VQ-VAE that it belongs to."""

import hashlib

from modules import VQVAE


def codebook_hash(vqvae: VQVAE) -> str:
    """SHA-256 of the codebook's float32 values."""
    values = vqvae.vector_quantizer.embedding.weight.detach().cpu().float().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
