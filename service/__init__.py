"""How an encoder is served: HTTP at the edge, one bounded queue, one torch thread, a monitor beside the path."""
