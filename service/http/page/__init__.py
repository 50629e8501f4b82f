"""The live page: one self-contained HTML file."""
