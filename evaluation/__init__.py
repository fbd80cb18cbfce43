"""Measures of reconstructions, and of generated images: `python -m evaluation REAL FAKE`."""

from evaluation.generation import Comparison, Images, compare, of_arrays

__all__ = ["Comparison", "Images", "compare", "of_arrays"]
