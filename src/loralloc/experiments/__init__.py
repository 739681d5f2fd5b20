"""The paper's experiments: grids, seeds and statistics, and its tables and figures as data."""
