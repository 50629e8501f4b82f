"""The embedding service: HTTP at the edge, one bounded queue, an engine, and a monitor off the request path."""
