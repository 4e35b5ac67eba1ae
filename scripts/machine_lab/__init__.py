"""Machines as people start them, taken from attach to revert and judged: see scripts/proofs/machines.py."""
