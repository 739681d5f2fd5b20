"""Whole runs whose losses and ranks are recorded, so that a change of the code shows in them."""
