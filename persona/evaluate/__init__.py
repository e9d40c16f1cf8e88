"""How good a tuned model is: measured on held-out text, on what it writes, and by readers in a blind comparison."""
