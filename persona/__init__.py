"""The code that the scripts share: one folder for each stage of the work; CONTRIBUTING.md has the map."""
