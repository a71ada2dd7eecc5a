"""What a run did, round by round."""
