"""LST (Sung et al. 2022): a ladder beside the backbone, which needs no graph of it."""
