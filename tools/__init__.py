"""Generators whose output is committed, and the stack that the demonstration runs."""
