"""``python -m snaporch`` is the command line."""

from snaporch.cli import main

if __name__ == "__main__":
    main()
