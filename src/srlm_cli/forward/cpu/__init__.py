"""The same passes compiled for a CPU."""
