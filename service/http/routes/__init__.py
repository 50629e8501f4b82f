"""The routes, one module per concern; each is an APIRouter that app.py includes."""
