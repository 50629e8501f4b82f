"""Reports: one self-contained HTML page on an encoder, on files of rows, or on a running service."""
