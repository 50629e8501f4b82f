"""Imported encoders against the libraries that they come from: `make` runs there, `compare` here."""
