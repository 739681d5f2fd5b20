"""Whole runs: from settings to a run folder, and back from the folder to a model."""
