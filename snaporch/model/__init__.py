"""The values that snaporch speaks in, and how they are stored and sent."""
