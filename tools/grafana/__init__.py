"""Dashboards and alerting for Grafana, written by program."""
