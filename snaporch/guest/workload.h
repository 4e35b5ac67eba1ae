/*
 * The workload of the test guests, and what it needs from the machine it runs on.
 *
 * workload.c is freestanding C that runs on bare metal (tiny.c) and under Linux (linux.c). A platform provides the
 * plat_ functions and calls workload_run().
 */
#ifndef SNAPORCH_WORKLOAD_H
#define SNAPORCH_WORKLOAD_H

#include <stdint.h>

enum { SECTOR_BYTES = 512, PAGE_BYTES = 4096, MAX_DISKS = 4 };

enum disk_op { DISK_READ, DISK_WRITE, DISK_POUR }; /* a write is durable; what is poured is not, with tiny */
enum disk_state { DISK_BUSY, DISK_DONE, DISK_FAILED };
enum power { POWER_OFF, POWER_REBOOT };

/* Microseconds since some fixed time. Never goes back. */
uint64_t plat_now_us(void);

/* The number of disks, at most MAX_DISKS. */
unsigned plat_disks(void);

/*
 * Starts a transfer; only one is in flight at any time. A write counts as done when it is durable. The buffer is
 * page-aligned and belongs to the transfer until plat_disk_poll() no longer says DISK_BUSY.
 */
void plat_disk_start(unsigned disk, enum disk_op op, uint32_t sector, void *buffer, uint32_t sectors);
enum disk_state plat_disk_poll(unsigned disk);

/* Page-aligned RAM for the dirtying; *mib is what is wanted, and is lowered to what there is. */
void *plat_ram(uint32_t *mib);

/* The serial port, without waiting: the number of bytes that it took; one byte of input, or -1. */
unsigned plat_send(const char *text, unsigned length);
int plat_receive(void);

/* Gives the processor back until a transfer completes or about a millisecond has passed. */
void plat_idle(void);

void plat_power(enum power what);

/* Runs for ever. options: words like "rate=50" or "snaporch.rate=50"; words it does not know are ignored. */
_Noreturn void workload_run(const char *options);

#endif
