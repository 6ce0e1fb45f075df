"""Tasks: the source of rows, how outputs are read, and which answers are correct."""
