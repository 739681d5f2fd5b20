"""The paper, literally: slow and obvious, to hold the package to."""
