"""Ray: the session, groups of workers that survive failures, checkpoints, one pipeline."""
