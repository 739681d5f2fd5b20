"""Data sets: where rows come from, and how a row becomes a prompt and a response.

`catalog` names the tasks, `source` loads the splits of a file, a folder or a Hub data set,
`splits` divides a task's own Hub data set as the paper does, `columns` and `classification`
turn splits into what a trainer reads. A new task is one file with one `Task` in it and one line
in `catalog`.

This package imports nothing else of loralloc, and `datasets` only when rows are loaded.
"""
