"""Adapter + 16-bit base -> one standard Hugging Face folder, block by block, and the proof that it says the same."""
