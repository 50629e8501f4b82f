"""make e2e: from a healthy encoder to a page and back, with real parts and every way of going wrong."""
