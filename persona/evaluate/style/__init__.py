"""Stylometry of plain text, Chinese and English, without a model: how near two ways of writing are."""

from persona.evaluate.style.compare import compare, distance_matrix
from persona.evaluate.style.results import Comparison, Distance, Estimate, Histogram, Level, Phrase, Texts
from persona.evaluate.style.words import sentences

__all__ = [
    "Comparison", "Distance", "Estimate", "Histogram", "Level", "Phrase", "Texts", "compare", "distance_matrix",
    "sentences",
]  # fmt: skip
