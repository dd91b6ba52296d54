"""Starts and supervises the processes of a run, and reports why they ended."""
