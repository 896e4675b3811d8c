"""Errors, files and S3, locks, settings, the terminal and the hardware: what any job needs."""
