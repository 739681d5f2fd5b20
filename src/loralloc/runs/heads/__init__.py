"""What depends on a task's type: its rows, batches and trainer, one file a head."""
