#!/bin/busybox sh
# The guest of QUIESCE: an ext4 on the first disk, which is written to all the time, and the QEMU guest agent.
# While the file system is frozen the count stands still, and so does what the serial port says.
bb=/bin/busybox
say() { echo "snaporch-guest $*" >/dev/ttyS0; }
$bb mkdir -p /run /mnt /sbin
$bb ln -s $bb /sbin/hwclock # without it the agent sets no clock
$bb mount -t ext4 /dev/vda /mnt || say "ERROR mount=$?"
# The port comes some time after its driver, and the agent does not wait for it. It is named after its device's number
# among all virtio devices, which disks count to as well.
until port=$($bb ls /dev/vport*p1 2>/dev/null); do $bb usleep 20000; done
/usr/sbin/qemu-ga -m virtio-serial -p $port -t /run &
count=$($bb cat /mnt/count 2>/dev/null || echo 0)
say "mounted count=$count"
while :; do
    count=$((count + 1))
    echo $count >/mnt/new && $bb mv /mnt/new /mnt/count && $bb sync || say "ERROR write=$?"
    say "count=$count"
    $bb usleep 20000
done
