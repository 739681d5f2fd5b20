"""What becomes of an adapter after training: export, merge, and checks before it is served.

This package reads and writes adapter folders and needs nothing else of loralloc.
"""
