/*
 * The workload as the only process of a Linux guest. A thread does the disk I/O, so that the dirtying goes on.
 */
#define _GNU_SOURCE
#include "workload.h"

#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/sysinfo.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static int serial;
static int disk_fds[MAX_DISKS];
static unsigned disk_count;

static struct {
    int fd;
    enum disk_op op;
    off_t offset;
    void *buffer;
    ssize_t length;
    _Atomic enum disk_state state;
} transfer;
static sem_t transfer_wanted, wake;

static _Noreturn void die(const char *why)
{
    dprintf(serial, "\nsnaporch-guest ERROR linux=%s: %m\n", why);
    for (;;)
        pause();
}

uint64_t plat_now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* ---- disks ---- */

static void *transfer_thread(void *unused)
{
    for (;;) {
        ssize_t moved;

        while (sem_wait(&transfer_wanted))
            ;
        if (transfer.op == DISK_READ)
            moved = pread(transfer.fd, transfer.buffer, (size_t)transfer.length, transfer.offset);
        else
            moved = pwrite(transfer.fd, transfer.buffer, (size_t)transfer.length, transfer.offset);
        transfer.state = moved == transfer.length ? DISK_DONE : DISK_FAILED;
        sem_post(&wake);
    }
    return unused;
}

void plat_disk_start(unsigned disk, enum disk_op op, uint32_t sector, void *buffer, uint32_t sectors)
{
    transfer.fd = disk_fds[disk];
    transfer.op = op;
    transfer.offset = (off_t)sector * SECTOR_BYTES;
    transfer.buffer = buffer;
    transfer.length = (ssize_t)sectors * SECTOR_BYTES;
    transfer.state = DISK_BUSY;
    sem_post(&transfer_wanted);
}

enum disk_state plat_disk_poll(unsigned disk)
{
    (void)disk;
    return transfer.state;
}

unsigned plat_disks(void)
{
    return disk_count;
}

static void open_disks(void)
{
    char name[] = "/dev/vda";
    pthread_t thread;

    while (disk_count < MAX_DISKS) {
        int fd = open(name, O_RDWR | O_DIRECT | O_SYNC | O_CLOEXEC); /* O_SYNC: write, then virtio flush */

        if (fd < 0)
            break;
        disk_fds[disk_count++] = fd;
        name[7]++;
    }
    sem_init(&transfer_wanted, 0, 0);
    sem_init(&wake, 0, 0);
    if (pthread_create(&thread, NULL, transfer_thread, NULL))
        die("pthread_create");
}

/* ---- everything else ---- */

void *plat_ram(uint32_t *mib)
{
    enum { SPARE_MIB = 32 };
    struct sysinfo info;
    uint64_t most;
    void *area;

    sysinfo(&info);
    most = info.freeram * info.mem_unit >> 20;
    most = most > SPARE_MIB ? most - SPARE_MIB : 0;
    if (*mib > most)
        *mib = (uint32_t)most;
    if (!*mib)
        return NULL;
    area = mmap(NULL, (size_t)*mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (area == MAP_FAILED)
        die("mmap");
    return area;
}

static void open_serial(void)
{
    struct termios mode;

    serial = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    tcgetattr(serial, &mode);
    cfmakeraw(&mode);
    cfsetspeed(&mode, B115200);
    tcsetattr(serial, TCSANOW, &mode);
}

unsigned plat_send(const char *text, unsigned length)
{
    ssize_t sent = write(serial, text, length);

    return sent > 0 ? (unsigned)sent : 0;
}

int plat_receive(void)
{
    unsigned char byte;

    return read(serial, &byte, 1) == 1 ? byte : -1;
}

void plat_idle(void)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    sem_clockwait(&wake, CLOCK_MONOTONIC, &until);
}

void plat_power(enum power what)
{
    reboot(what == POWER_OFF ? RB_POWER_OFF : RB_AUTOBOOT);
}

int main(void)
{
    static char options[4096];
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);

    open_serial();
    if (fd < 0 || read(fd, options, sizeof options - 1) < 0)
        die("/proc/cmdline");
    close(fd);
    open_disks();
    workload_run(options);
}
