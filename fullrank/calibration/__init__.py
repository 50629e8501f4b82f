"""Calibration: what statistics do on healthy traffic, and hence where a fault begins."""
