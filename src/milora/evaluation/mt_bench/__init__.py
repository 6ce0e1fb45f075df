"""MT-Bench (Zheng et al. 2023): answers to 80 questions of two turns, judged by a language model behind an API."""
