"""One run: the loop, checkpoints, the folder a run leaves, its history, curves and verdict."""
