"""What a run came to, for people: tables for the terminal, heat maps for a page."""
