"""Runs the command as `python -m cli`, from a working tree that is not installed."""

from cli import main

if __name__ == "__main__":
    main()
