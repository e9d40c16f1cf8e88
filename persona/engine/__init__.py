"""Many examples through the model at once, exactly: packs, attention over prefix trees, layers, the loss, the trial."""
