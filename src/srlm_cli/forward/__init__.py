"""Passes of a causal model over packed sequences and a paged cache, for the hf engine and for training."""
