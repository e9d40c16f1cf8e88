"""Stylometry of plain text, Chinese and English, without a model: how near two ways of writing are."""

from persona.style.comparison import compare, distance_matrix
from persona.style.results import Comparison, Distance, Estimate, Histogram, Level, Phrase, Texts
from persona.style.units import sentences

__all__ = [
    "Comparison", "Distance", "Estimate", "Histogram", "Level", "Phrase", "Texts", "compare", "distance_matrix",
    "sentences",
]  # fmt: skip
