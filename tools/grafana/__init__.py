"""Generators of the Grafana dashboards and alerting files."""
