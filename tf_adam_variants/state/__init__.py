"""Saving and restoring the state of an optimizer."""
