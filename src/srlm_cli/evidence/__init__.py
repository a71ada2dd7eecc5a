"""Passages of a corpus in one SQLite file: cut, indexed and found."""
