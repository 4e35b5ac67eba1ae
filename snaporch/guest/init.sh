#!/bin/busybox sh
# /init of the Linux guest: drivers, then the workload as process 1. If that dies, the kernel panics and stays so:
# a restart would hide a broken checkpoint.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for module in /modules/*; do
    /bin/busybox insmod "$module" || echo "snaporch-guest ERROR insmod=$module"
done
if [ -e /usr/sbin/qemu-ga ]; then exec /bin/busybox sh /quiesce.sh; fi
exec /workload
