#!/bin/busybox sh
# /init of the lab's Linux guest: drivers, then what is to happen to it, then the workload on whatever disks there are.
/bin/busybox mkdir -p /sys /mnt /bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
say() { echo "snaporch-guest $*" >/dev/ttyS0; }
option() { sed -n "s/.*\blab\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
for module in /more/*; do insmod "$module" $(option "$(basename "$module" .ko | sed 's/^[0-9]*-//')") || say "ERROR insmod=$module"; done
# The workload knows its disks as vda, vdb, ...: those of other controllers get these names too.
until [ "$(ls -d /dev/vd? /dev/sd? /dev/nvme?n1 /dev/fd0 2>/dev/null | wc -l)" -ge "$(option disks)" ]; do usleep 50000; done
set -- a b c d
for disk in $(ls -d /dev/vd? /dev/sd? /dev/nvme?n1 2>/dev/null); do
    [ "$disk" = "/dev/vd$1" ] || ln -s "$disk" "/dev/vd$1"
    shift
done
after() { # what seconds: in a process of its own
    ( sleep "$2"; say "now $1"
    case $1 in
    s3) echo mem >/sys/power/state; say "woke" ;;
    panic) echo c >/proc/sysrq-trigger ;;
    off) poweroff -f ;;
    reboot) reboot -f ;;
    watchdog) exec 3>/dev/watchdog && echo >&3 && sleep 1000 ;;
    esac ) &
}
for what in s3 panic off reboot watchdog; do
    [ -z "$(option $what)" ] || after $what "$(option $what)"
done
for kind in 9p virtiofs; do
    case $kind in 9p) options=trans=virtio ;; *) options= ;; esac
    [ -z "$(option $kind)" ] || mount -t $kind ${options:+-o $options} host /mnt || say "ERROR mount=$kind"
done
if [ -n "$(option tpm)" ]; then
    while :; do cat /sys/class/tpm/tpm0/pcr-sha256/0 >/dev/null || say "ERROR tpm"; sleep 1; done &
fi
exec /workload
