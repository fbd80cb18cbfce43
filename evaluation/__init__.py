"""Measures of reconstructions, and of generated images: `python -m evaluation REAL FAKE`."""

from evaluation.generation import Images, compare, of_arrays

__all__ = ["Images", "compare", "of_arrays"]
