"""The HTTP layer: requests, answers and routes. No other part imports Starlette or FastAPI."""
