"""Each view run once through the frozen network, and kept."""
