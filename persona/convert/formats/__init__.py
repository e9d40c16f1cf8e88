"""One module for each family of input formats: recognised by content, read into drafts of conversations."""
