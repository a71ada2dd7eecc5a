"""Transformers in this process: the engine, and what schedules, samples and stops its completions."""
