"""What the scripts of the persona toolkit share; see CONTRIBUTING.md for the layers."""
