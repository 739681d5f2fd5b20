"""SSP (S3Delta, Hu et al. 2022): gates find which small modules to train."""
