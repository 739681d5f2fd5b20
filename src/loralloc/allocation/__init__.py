"""The method: score every rank, plan the move, resize the adapter.

Knows torch and PEFT's LoRA layers; no Trainer, no files, no console.
"""
