"""Ways out: files that deployed engines read."""
