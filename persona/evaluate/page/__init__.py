"""The report of an evaluation as one web page: its sections and charts."""
