"""Arithmetic of activation memory, traffic and time on many GPUs: the tables of docs/scale.md. Nothing is measured."""
