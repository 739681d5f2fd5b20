"""What becomes of an adapter: its ranks and tensors in the forms that others read."""
