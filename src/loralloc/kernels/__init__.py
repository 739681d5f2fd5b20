"""What makes a training step fast; each exact to rounding, and held so by tests.

They know PyTorch, PEFT's layers and Transformers' attention interface, and nothing of loralloc.
"""
