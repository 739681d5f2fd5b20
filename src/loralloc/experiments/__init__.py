"""Experiments as data: grids of runs, what carries them out, and how sure what came of them is."""
