"""Photographs worth a label, and the labels that come back."""
