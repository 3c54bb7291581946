"""filters techniques."""
