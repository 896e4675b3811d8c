"""Arithmetic on predictions: scores, intervals, thresholds, novelty and drift."""
