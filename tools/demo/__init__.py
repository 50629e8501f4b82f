"""make demo: a collapse, and the page it raises, with real parts."""
