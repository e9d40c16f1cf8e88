"""What the scripts of the persona toolkit share: one folder for each stage of the work; CONTRIBUTING.md has the map."""
