"""How adapted layers compute their rows: layer by layer in a pass, by prepared decode steps, or not."""
