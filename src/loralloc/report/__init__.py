"""What runs came to, for people: tables for the terminal, figures, one page."""
