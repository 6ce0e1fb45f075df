"""PEFT methods: a folder each, and beside them what several share."""
