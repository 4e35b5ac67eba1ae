"""The QEMU driver: QMP over a unix socket, images by qemu-img."""
