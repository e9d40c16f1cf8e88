"""Raw files in, records out: one module per family of formats, detection by content, cleaning, and an honest report."""
