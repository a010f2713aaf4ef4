"""Thin edges on TRL's trainers: collators, augmentation, checkpoints that are whole or absent."""
