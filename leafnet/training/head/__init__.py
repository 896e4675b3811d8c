"""Fitting the head on features."""
