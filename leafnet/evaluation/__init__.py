"""How well a published model does on a data set, and whether it may replace another."""
