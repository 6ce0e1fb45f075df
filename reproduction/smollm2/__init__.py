"""Experiments on SmolLM2-135M-Instruct: a settings file lists runs, each leaves a line of JSON."""
