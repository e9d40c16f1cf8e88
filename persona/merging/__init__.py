"""Adapter + 16-bit base -> one standard Hugging Face folder, tensor by tensor, and the proof that it says the same.

changes     what an adapter does to one weight matrix, a few rows at a time
adapter     the adapter's files -> the changes of every parameter
layout      the base's files -> which part of which parameter each tensor is, and the files that will be written
tensors     safetensors files, read and written block by block
four_bits   a weight as training in 4 bits saw it
merge       the merge itself, complete or not at all
verify      merged folder against base + adapter on held-out conversations
"""
