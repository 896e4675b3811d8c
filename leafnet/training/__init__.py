"""Fitting the head, fine-tuning the network, and publishing the model."""
