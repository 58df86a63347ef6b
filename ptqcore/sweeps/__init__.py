"""Sweeps: recipes × models × seeds, several runs at a time, in worker processes of Ray."""
