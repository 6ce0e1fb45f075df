"""What there is to know about a Hugging Face model: its blocks, its shapes, and the bundled one."""
