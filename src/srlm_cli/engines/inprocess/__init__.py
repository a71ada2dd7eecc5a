"""The parts of the `hf` engine: a model run in this process, one job a file."""
