"""Checkpoints of earlier versions: what one version saved, every later one loads and goes on from."""
