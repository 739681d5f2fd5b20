"""Importance of ranks: one file per score, all with one signature."""
