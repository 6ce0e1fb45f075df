"""Experiments on SmolLM2-135M-Instruct: a settings file lists runs, and each run writes a line of JSON."""
