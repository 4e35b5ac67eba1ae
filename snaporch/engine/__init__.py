"""Runs the steps of operations: tables, states, journal, events."""
