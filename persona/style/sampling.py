"""Samples of equal length: texts in random order up to a number of characters, the last one counted in part.

A distance between two samples shrinks as they grow, since chance falls away; only samples of one length compare.
"""

import numpy as np


def orders(generator: np.random.Generator, repeats: int, passages: int) -> np.ndarray:
    """Random orders of the passages: (repeats, passages)."""
    return generator.permuted(np.tile(np.arange(passages), (repeats, 1)), axis=1)


def multiplicities(generator: np.random.Generator, repeats: int, passages: int) -> np.ndarray:
    """How often a bootstrap draws each passage: (repeats, passages). Efron 1979."""
    return generator.multinomial(passages, np.full(passages, 1 / passages), size=repeats)


def weights(order: np.ndarray, times: np.ndarray, characters: np.ndarray, sample: float) -> np.ndarray:
    """How much each passage counts in a sample of `sample` characters drawn in this order: (repeats, passages).

    `order` is (repeats, those to draw from); `times`, (repeats, passages), says how often a passage is there.
    """
    there = np.take_along_axis(times * characters, order, axis=1)
    before = np.cumsum(there, axis=1) - there
    share = np.clip((sample - before) / np.maximum(there, 1e-9), 0, 1)
    found = np.zeros((len(order), len(characters)))
    np.put_along_axis(found, order, share, axis=1)
    return (found * times).astype(np.float32)
