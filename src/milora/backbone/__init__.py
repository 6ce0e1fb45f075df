"""Facts about a Hugging Face model: its blocks, shapes, and the bundled backbone."""
