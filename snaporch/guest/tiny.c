/*
 * The tiny guest: the workload on bare metal, up in a fraction of a second even without KVM.
 *
 * 32-bit protected mode, entered as a multiboot kernel (qemu -kernel). Drives virtio-blk through the legacy interface
 * of transitional PCI devices ("Legacy Interface" sections of the virtio specification), COM1, the PIC and the PIT.
 */
#include "workload.h"

enum {
    COM1 = 0x3f8,
    COM2 = 0x2f8,
    PIC1 = 0x20,
    PIC2 = 0xa0,
    PIT0 = 0x40,
    PIT2 = 0x42,
    PIT_COMMAND = 0x43,
    PIT_GATE = 0x61,
    PIT_HZ = 1193182,
    PCI_ADDRESS = 0xcf8,
    PCI_DATA = 0xcfc,
    PM1A_CONTROL = 0x604, /* where SeaBIOS puts it, on pc as on q35 */
    RESET_CONTROL = 0xcf9,
    RAM_START = 4 << 20, /* well after the image and what the boot loader put behind it */
};

static inline void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outw(uint16_t port, uint16_t value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outl(uint16_t port, uint32_t value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint16_t inw(uint16_t port)
{
    uint16_t value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* GCC may call these for structures, even in freestanding code. */
void *memset(void *to, int byte, unsigned length)
{
    void *at = to;
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(length) : "a"(byte) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, unsigned length)
{
    void *at = to;
    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(length)::"memory");
    return to;
}

/* ---- serial port ---- */

static void serial_init(uint16_t port)
{
    outb(port + 1, 0);    /* no interrupts */
    outb(port + 3, 0x80); /* divisor latch: 115200 baud */
    outb(port + 0, 1);
    outb(port + 1, 0);
    outb(port + 3, 3); /* 8n1 */
    outb(port + 2, 0xc7); /* FIFOs on and empty; QEMU fills one up to its trigger level, 14, at once */
    outb(port + 4, 3); /* DTR, RTS */
}

unsigned plat_send(const char *text, unsigned length)
{
    if (!(inb(COM1 + 5) & 0x20))
        return 0;
    if (length > 16) /* what an empty FIFO takes */
        length = 16;
    for (unsigned i = 0; i < length; i++)
        outb(COM1, (uint8_t)text[i]);
    return length;
}

/* ---- the link: numbered messages to and from another guest, over a second serial port where there is one ---- */

enum { MESSAGE_BYTES = 8 };

/*
 * Looked at from outside, when we stand: whoever has heard a number that the other has not sent is of a later instant.
 * A number counts as sent before its first byte leaves, and as heard after its last has come.
 */
volatile struct {
    uint32_t sent, heard, wrong, present;
} guest_link;

static void link_init(void)
{
    outb(COM2 + 7, 0x5a); /* the scratch register */
    guest_link.present = inb(COM2 + 7) == 0x5a;
    if (guest_link.present)
        serial_init(COM2);
}

/* The wire may lose bytes, so that what comes may be put together from two messages: only the first byte has its
 * highest bit set, and the last three are a checksum. */
static void put_message(uint8_t *bytes, uint32_t number)
{
    uint32_t check = number * 2654435761u;

    for (unsigned i = 0; i < MESSAGE_BYTES; i++) {
        bytes[i] = (i < 5 ? number >> 7 * i : check >> (11 + 7 * (i - 5))) & 0x7f;
    }
    bytes[0] |= 0x80;
}

static void hear(uint8_t byte)
{
    static uint8_t bytes[MESSAGE_BYTES], wanted[MESSAGE_BYTES];
    static unsigned length;
    uint32_t number = 0;

    if (byte & 0x80)
        length = 0;
    if (length == MESSAGE_BYTES || (!length && !(byte & 0x80)))
        return; /* of a message whose beginning was lost */
    bytes[length++] = byte;
    if (length < MESSAGE_BYTES)
        return;
    for (unsigned i = 0; i < 5; i++)
        number |= (uint32_t)(bytes[i] & 0x7f) << 7 * i;
    put_message(wanted, number);
    for (unsigned i = 0; i < MESSAGE_BYTES; i++)
        if (bytes[i] != wanted[i])
            return;
    if (number <= guest_link.heard)
        guest_link.wrong++; /* sent once more, by somebody who does not know that we have heard it */
    guest_link.heard = number;
}

/* At most one message each time. */
static void link_step(void)
{
    uint8_t bytes[MESSAGE_BYTES];

    if (!guest_link.present)
        return;
    while (inb(COM2 + 5) & 1)
        hear(inb(COM2));
    if (!(inb(COM2 + 5) & 0x20))
        return;
    guest_link.sent++;
    put_message(bytes, guest_link.sent);
    for (unsigned i = 0; i < MESSAGE_BYTES; i++)
        outb(COM2, bytes[i]);
}

/* Called every millisecond. */
int plat_receive(void)
{
    link_step();
    return inb(COM1 + 5) & 1 ? inb(COM1) : -1;
}

static _Noreturn void die(const char *why)
{
    for (const char *text = why; *text; text++) {
        while (!(inb(COM1 + 5) & 0x20))
            ;
        outb(COM1, (uint8_t)*text);
    }
    for (;;)
        __asm__ volatile("cli; hlt");
}

/* Memory that is not of one instant may well crash us. Restarting would hide that behind errors=0. */
void fault(void)
{
    die("\nsnaporch-guest ERROR cpu=fault\n");
}

/* ---- clock ---- */

static uint32_t tsc_factor; /* microseconds a TSC tick, times 2^32 */

static inline uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

/* (high * 2^32) / by, for high < by: the one 64-bit division that is needed. */
static inline uint32_t divide_shifted(uint32_t high, uint32_t by)
{
    uint32_t quotient, rest;
    __asm__("divl %4" : "=a"(quotient), "=d"(rest) : "a"(0), "d"(high), "r"(by) : "cc");
    return quotient;
}

struct instant {
    uint64_t tsc;
    uint16_t pit;
};

/* TSC and PIT read together; of several tries the quickest, as the host may have interrupted the others. */
static struct instant read_clocks(void)
{
    struct instant best = {0, 0};
    uint64_t best_width = ~0ull;

    for (int i = 0; i < 8; i++) {
        uint64_t before = rdtsc(), width;
        uint16_t pit;

        outb(PIT_COMMAND, 0x80); /* latch counter 2 */
        width = rdtsc() - before;
        pit = inb(PIT2);
        pit |= (uint16_t)(inb(PIT2) << 8);
        if (width < best_width) {
            best_width = width;
            best = (struct instant){before + (width >> 1), pit};
        }
    }
    return best;
}

/* One measurement of 5 ms. */
static uint32_t measure_tsc(void)
{
    struct instant from = read_clocks(), to;
    uint32_t pit_ticks;

    do {
        to = read_clocks();
        pit_ticks = (uint16_t)(from.pit - to.pit);
    } while (pit_ticks < PIT_HZ / 200);
    /* 8582/10240 is 1000000/PIT_HZ without an overflow */
    return divide_shifted(pit_ticks * 8582 / 10240, (uint32_t)(to.tsc - from.tsc));
}

static void clock_init(void)
{
    outb(PIT_GATE, (inb(PIT_GATE) & ~2) | 1); /* counter 2 runs, the speaker is off */
    outb(PIT_COMMAND, 0xb4);                  /* counter 2, mode 2, both bytes */
    outb(PIT2, 0xff);
    outb(PIT2, 0xff);
    /* A busy host may let the 55 ms of the PIT's counter pass unseen: too few PIT ticks, so the largest is right. */
    for (int i = 0; i < 3; i++) {
        uint32_t factor = measure_tsc();

        if (factor > tsc_factor)
            tsc_factor = factor;
    }
}

uint64_t plat_now_us(void)
{
    uint64_t tsc = rdtsc();

    return (tsc >> 32) * tsc_factor + ((tsc & 0xffffffff) * tsc_factor >> 32);
}

/* ---- interrupts: only to end the hlt in plat_idle() ---- */

struct gate {
    uint16_t low, selector, type, high;
};

void timer_stub(void), disk_stub(void), fault_stub(void);

static struct gate idt[48];
static volatile int interrupted;

static void set_gate(unsigned vector, void (*stub)(void))
{
    uint32_t address = (uint32_t)stub;

    idt[vector] = (struct gate){(uint16_t)address, 8, 0x8e00, (uint16_t)(address >> 16)};
}

static void unmask(unsigned irq)
{
    if (irq >= 8) {
        outb(PIC2 + 1, inb(PIC2 + 1) & (uint8_t)~(1 << (irq - 8)));
        irq = 2; /* the cascade */
    }
    outb(PIC1 + 1, inb(PIC1 + 1) & (uint8_t)~(1 << irq));
}

static void interrupts_init(void)
{
    struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) pointer = {sizeof idt - 1, (uint32_t)idt};

    for (unsigned vector = 0; vector < 48; vector++)
        set_gate(vector, vector < 32 ? fault_stub : vector == 32 ? timer_stub : disk_stub);
    __asm__ volatile("lidt %0" ::"m"(pointer));

    /* Both PICs: initialise, vectors 32.. and 40.., cascade on 2, 8086 mode, all masked. */
    outb(PIC1, 0x11);
    outb(PIC2, 0x11);
    outb(PIC1 + 1, 32);
    outb(PIC2 + 1, 40);
    outb(PIC1 + 1, 4);
    outb(PIC2 + 1, 2);
    outb(PIC1 + 1, 1);
    outb(PIC2 + 1, 1);
    outb(PIC1 + 1, 0xff);
    outb(PIC2 + 1, 0xff);

    outb(PIT_COMMAND, 0x34); /* counter 0, mode 2: 1 kHz */
    outb(PIT0, (PIT_HZ / 1000) & 0xff);
    outb(PIT0, (PIT_HZ / 1000) >> 8);
    unmask(0);
}

void timer_interrupt(void)
{
    interrupted = 1;
    outb(PIC1, 0x20);
}

void plat_idle(void)
{
    __asm__ volatile("cli");
    if (!interrupted)
        __asm__ volatile("sti; hlt"); /* sti takes effect after hlt has begun: no interrupt is missed */
    interrupted = 0;
    __asm__ volatile("sti");
}

/* ---- PCI ---- */

static uint32_t pci_read(unsigned device, unsigned offset)
{
    outl(PCI_ADDRESS, 0x80000000 | device << 11 | offset);
    return inl(PCI_DATA);
}

static void pci_write(unsigned device, unsigned offset, uint32_t value)
{
    outl(PCI_ADDRESS, 0x80000000 | device << 11 | offset);
    outl(PCI_DATA, value);
}

/* ---- virtio-blk ---- */

/* "Legacy Interfaces: A Note on PCI Device Layout": registers in I/O space at BAR 0. */
enum {
    VIRTIO_HOST_FEATURES = 0,
    VIRTIO_GUEST_FEATURES = 4,
    VIRTIO_QUEUE_ADDRESS = 8,
    VIRTIO_QUEUE_SIZE = 12,
    VIRTIO_QUEUE_SELECT = 14,
    VIRTIO_QUEUE_NOTIFY = 16,
    VIRTIO_STATUS = 18,
    VIRTIO_ISR = 19,

    STATUS_ACKNOWLEDGE = 1,
    STATUS_DRIVER = 2,
    STATUS_DRIVER_OK = 4,

    BLK_FEATURE_FLUSH = 1 << 9,
    BLK_IN = 0,
    BLK_OUT = 1,
    BLK_FLUSH = 4,

    DESC_NEXT = 1,
    DESC_WRITE = 2, /* the device writes to the buffer */
    MAX_QUEUE = 1024,
};

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct available {
    uint16_t flags, index, ring[];
};

struct used {
    uint16_t flags;
    volatile uint16_t index;
};

struct virtio_disk {
    uint8_t queue[32768] __attribute__((aligned(PAGE_BYTES)));
    uint16_t port, queue_size, seen;
    int can_flush, flush_due;
    struct available *available;
    struct used *used;
    struct {
        uint32_t type, reserved;
        uint64_t sector;
    } header;
    volatile uint8_t status;
};

static struct virtio_disk virtio_disks[MAX_DISKS];
static unsigned disk_count;

/* "Device Initialization" with "Legacy Interface: Device Initialization" (no FEATURES_OK step). */
static void disk_init(struct virtio_disk *disk, unsigned device)
{
    unsigned used_at;
    uint32_t features;

    pci_write(device, 4, pci_read(device, 4) | 5); /* I/O space, bus master */
    disk->port = (uint16_t)(pci_read(device, 0x10) & ~3u);
    outb(disk->port + VIRTIO_STATUS, 0);
    outb(disk->port + VIRTIO_STATUS, STATUS_ACKNOWLEDGE);
    outb(disk->port + VIRTIO_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);

    features = inl(disk->port + VIRTIO_HOST_FEATURES) & BLK_FEATURE_FLUSH;
    outl(disk->port + VIRTIO_GUEST_FEATURES, features);
    disk->can_flush = features != 0;

    /* "Virtqueue Configuration"; the device dictates the size and "Legacy Interfaces: A Note on Virtqueue Layout"
     * the places: descriptors, available ring, and on the next page boundary the used ring. */
    outw(disk->port + VIRTIO_QUEUE_SELECT, 0);
    disk->queue_size = inw(disk->port + VIRTIO_QUEUE_SIZE);
    if (!disk->queue_size || disk->queue_size > MAX_QUEUE)
        die("snaporch-guest ERROR virtio=bad-queue-size\n");
    disk->available = (struct available *)(disk->queue + disk->queue_size * sizeof(struct descriptor));
    used_at = disk->queue_size * (sizeof(struct descriptor) + 2) + 6;
    used_at = (used_at + PAGE_BYTES - 1) & ~(unsigned)(PAGE_BYTES - 1);
    disk->used = (struct used *)(disk->queue + used_at);
    outl(disk->port + VIRTIO_QUEUE_ADDRESS, (uint32_t)disk->queue / PAGE_BYTES);

    outb(disk->port + VIRTIO_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK);
    unmask(pci_read(device, 0x3c) & 15);
}

static void disks_init(void)
{
    for (unsigned device = 0; device < 256; device++) {
        uint32_t id = pci_read(device, 0);

        if (id == 0x10421af4)
            die("snaporch-guest ERROR virtio=modern-only (put the disk on the root bus, or disable-legacy=off)\n");
        if (id == 0x10011af4 && disk_count < MAX_DISKS)
            disk_init(&virtio_disks[disk_count++], device);
    }
}

/* "Supplying Buffers to The Device", with one request at a time: always descriptors 0 to 2. */
static void submit(struct virtio_disk *disk, uint32_t type, uint32_t sector, void *buffer, uint32_t length)
{
    struct descriptor *descriptors = (struct descriptor *)disk->queue;
    unsigned last = length ? 2 : 1;

    disk->header.type = type;
    disk->header.sector = sector;
    disk->status = 0xff;
    descriptors[0] = (struct descriptor){(uint32_t)&disk->header, sizeof disk->header, DESC_NEXT, 1};
    if (length)
        descriptors[1] =
            (struct descriptor){(uint32_t)buffer, length, DESC_NEXT | (type == BLK_IN ? DESC_WRITE : 0), 2};
    descriptors[last] = (struct descriptor){(uint32_t)&disk->status, 1, DESC_WRITE, 0};

    disk->available->ring[disk->available->index % disk->queue_size] = 0;
    __asm__ volatile("" ::: "memory"); /* x86 keeps the order of stores: only the compiler must be told */
    disk->available->index++;
    __asm__ volatile("lock; addl $0, (%%esp)" ::: "memory", "cc");
    outw(disk->port + VIRTIO_QUEUE_NOTIFY, 0);
}

void plat_disk_start(unsigned which, enum disk_op op, uint32_t sector, void *buffer, uint32_t sectors)
{
    struct virtio_disk *disk = &virtio_disks[which];

    disk->flush_due = op == DISK_WRITE && disk->can_flush;
    submit(disk, op == DISK_READ ? BLK_IN : BLK_OUT, sector, buffer, sectors * SECTOR_BYTES);
}

/* "Receiving Used Buffers From The Device". */
enum disk_state plat_disk_poll(unsigned which)
{
    struct virtio_disk *disk = &virtio_disks[which];

    if (disk->used->index == disk->seen)
        return DISK_BUSY;
    __asm__ volatile("" ::: "memory");
    disk->seen++;
    if (disk->status)
        return DISK_FAILED;
    if (disk->flush_due) { /* written is not durable yet */
        disk->flush_due = 0;
        submit(disk, BLK_FLUSH, 0, 0, 0);
        return DISK_BUSY;
    }
    return DISK_DONE;
}

void disk_interrupt(void)
{
    for (unsigned i = 0; i < disk_count; i++)
        inb(virtio_disks[i].port + VIRTIO_ISR); /* reading it takes the interrupt back */
    interrupted = 1;
    outb(PIC2, 0x20);
    outb(PIC1, 0x20);
}

unsigned plat_disks(void)
{
    return disk_count;
}

/* ---- multiboot ---- */

struct multiboot {
    uint32_t flags, mem_lower, mem_upper, boot_device, command_line, modules[2], symbols[4], map_length, map;
};

struct memory_range {
    uint32_t size;
    uint64_t start, length;
    uint32_t type;
} __attribute__((packed));

static uint32_t ram_end;
static char command_line[1024];

/* Copies what is needed: the RAM area may overwrite it later. */
static void read_multiboot(const struct multiboot *info)
{
    const char *text = info->flags & 4 ? (const char *)info->command_line : "";

    for (unsigned i = 0; i < sizeof command_line - 1 && text[i]; i++)
        command_line[i] = text[i];
    for (uint32_t at = info->map; at < info->map + info->map_length; at += ((struct memory_range *)at)->size + 4) {
        const struct memory_range *range = (const struct memory_range *)at;

        if (range->type == 1 && range->start <= RAM_START && range->start + range->length > RAM_START)
            ram_end = (uint32_t)(range->start + range->length);
    }
}

void *plat_ram(uint32_t *mib)
{
    uint32_t most = ram_end > RAM_START ? (ram_end - RAM_START) >> 20 : 0;

    if (*mib > most)
        *mib = most;
    return (void *)RAM_START;
}

void plat_power(enum power what)
{
    if (what == POWER_OFF)
        outw(PM1A_CONTROL, 0x2000); /* SLP_EN with sleep type 0: QEMU's S5 */
    else
        outb(RESET_CONTROL, 6);
}

void tiny_main(const struct multiboot *info)
{
    serial_init(COM1);
    link_init();
    read_multiboot(info);
    clock_init();
    interrupts_init();
    disks_init();
    workload_run(command_line);
}
