"""Generators of committed files, and the service and Prometheus that the demonstration runs."""
