"""HTTP: requests in, answers out. The only part that knows Starlette and FastAPI."""
