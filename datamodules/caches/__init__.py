"""Shards of what a stage's frozen models make of each sample, so that training need not run them again (docs/data.md)."""
