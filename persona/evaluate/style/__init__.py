"""Stylometry of plain text, Chinese and English, without a model: how near two ways of writing are."""
