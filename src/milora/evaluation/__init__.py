"""Measures models on tasks: generated answers and their accuracy, perplexity, predictions that survive interruption."""
