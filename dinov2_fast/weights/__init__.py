"""Weights: checkpoints of any origin and layout are found, opened, loaded, converted and saved."""
