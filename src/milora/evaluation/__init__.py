"""Measures models on tasks: accuracy of generated answers, perplexity, and resumable predictions."""
