"""Guests that prove that a checkpoint's memory and disks belong to one instant."""
