"""Xen and a Debian dom0 inside an emulated machine: there the Xen driver is tested."""
