"""PEFT methods, one folder each, and modules that several methods share."""
