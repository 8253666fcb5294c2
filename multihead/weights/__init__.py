"""Weights that are there already: runs of our own, and Hugging Face folders of the families we can read."""

from multihead.weights.origin import Origin, open_origin

__all__ = ["Origin", "open_origin"]
