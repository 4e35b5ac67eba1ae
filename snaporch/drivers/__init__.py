"""Hypervisor drivers: one small interface, a record of what each can do, and a registry."""
