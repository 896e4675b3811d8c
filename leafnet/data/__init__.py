"""Photographs, with the one decoder, and data sets: shards and their index."""
