"""What the paper reports, and what reproduces it."""
