"""Domains under Xen: memory by libxl's stream, disks by the QEMU that serves them (qdisk)."""
