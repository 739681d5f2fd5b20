"""How a run happens: attaching to a Trainer, our own runs, models by name, checkpoints."""
