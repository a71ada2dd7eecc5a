"""The report of a run, round by round."""
