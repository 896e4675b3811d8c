"""The nightly job: a row for every new photograph."""
