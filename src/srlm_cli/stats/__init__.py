"""Statistics: bootstrap intervals, Bradley-Terry strengths, logistic regression."""
