"""Raw files in, records out: reading, cleaning, splitting, and a report that accounts for every record."""
