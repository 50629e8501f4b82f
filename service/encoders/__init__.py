"""The encoders in service: loaded, judged, swapped and retired."""
