"""The executor, the stages, and the vocabulary that they share."""
