"""A merge with the sampling of the default settings, and verified only if a proof is given."""

from persona.config import Generation
from persona.merge import merge as merging


def merge(base, adapter, output, dtype, shard_bytes, proof=None, four_bits=None):
    return merging.merge(base, adapter, output, dtype, shard_bytes, Generation(), proof, four_bits)
