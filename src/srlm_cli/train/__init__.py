"""Training with TRL: rows checked first, the reference declared, a model folder that appears when whole."""
