"""The blind comparison: a sheet for readers, and the score of their answers."""
