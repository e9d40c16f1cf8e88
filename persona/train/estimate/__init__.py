"""A run before it begins, from its data and the model's config: packs, memory and time on paper, `--dry-run`"""
