"""What becomes of an adapter: its ranks in the words of other trainers."""
