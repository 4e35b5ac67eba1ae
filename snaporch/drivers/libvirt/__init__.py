"""Domains that a libvirt of this host manages.

libvirt owns these machines: it starts them, knows their disks, and is the only one who may change them. So
whatever libvirt has a call for is done by that call. QEMU is spoken to through libvirt (`qmp`), and only for what
libvirt has no call for: the memory stream. The binding, libvirt-python, is an extra (``snaporch[libvirt]``) and is
imported when it is needed.
"""
