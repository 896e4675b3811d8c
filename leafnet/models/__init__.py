"""The network, its weights and engines, and the published model."""
