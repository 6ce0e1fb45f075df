"""Generation with adapters."""
