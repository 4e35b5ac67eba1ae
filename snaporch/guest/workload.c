/*
 * A workload that notices when its memory and its disks are not of one instant.
 *
 * Each disk has SLOTS sectors; each sequence number overwrites one of them. Memory knows what each slot must hold: the
 * number, and the time at which it was written. Before each write all slots are read back, so that
 *   - a disk older than memory shows in the slot of the last number, which still holds an older one;
 *   - a disk newer than memory shows in the slot of a next number, which must not have been overwritten yet;
 *   - a disk that another branch of the same history went on with shows in the time stamps;
 *   - swapped disks show in the disk's index, torn or lost sectors in the pattern.
 * The clock chooses the slot just before the write. Were it number % SLOTS, a disk newer by one write would go
 * unnoticed if memory was saved between reading and writing: the guest would write the same sector again.
 * What is expected is updated for one disk at a time, when its write has completed, so a checkpoint at any instruction
 * is consistent: a request in flight is either completed in memory too, or (re)done after the restore.
 *
 * Pages of RAM hold patterns as well, each checked before it is overwritten, and by a slow sweep in between.
 */
#include "workload.h"

enum {
    SLOTS_LOG2 = 6,
    SLOTS = 1 << SLOTS_LOG2,
    FIRST_SECTOR = 2048, /* 1 MiB: leaves a boot sector and a partition table alone */
    SECTOR_WORDS = SECTOR_BYTES / 4,
    PAGE_WORDS = PAGE_BYTES / 4,
    LINE_WORDS = 16,       /* one cache line a page is written and checked; the page counts as 4096 bytes dirtied */
    SWEEP_PAGES = 8,       /* pages checked a millisecond without being written */
    MAX_CREDIT = 16 << 20, /* bytes of dirtying that a delayed guest catches up with at most */
    FILL_SECTOR = 8192,    /* 4 MiB: where bulk begins */
    FILL_SECTORS = 512,    /* a write of bulk */
    MAX_ERROR_LINES = 4,   /* a report interval; all errors are counted */
    MAGIC = 0x504e5331,
};

enum phase { REST, READING, CHECKING, WRITING, FILLING, RUINING };

struct sector {
    uint32_t magic, disk, number, stamp;
    uint32_t pattern[SECTOR_WORDS - 4];
};

struct expected {
    uint32_t number[SLOTS], stamp[SLOTS];
    uint32_t done; /* the last number that is durably on this disk */
};

static struct {
    uint32_t rate, dirty, ram, report, bulk, pour, span;
} options = {.rate = 50, .dirty = 0, .ram = 8, .report = 100, .bulk = 0, .pour = 0, .span = 32};

static struct sector slots[SLOTS] __attribute__((aligned(PAGE_BYTES)));
static struct sector outgoing __attribute__((aligned(PAGE_BYTES)));
static struct expected expected[MAX_DISKS];
static unsigned disks;

static enum phase phase;
static unsigned disk;       /* the one at work */
static unsigned slot;       /* the one to check next, or being written */
static uint32_t seq;        /* the last number that is on all disks */
static uint64_t next_round; /* when the next number is due */
static int ruin_wanted;

static uint32_t bulk[FILL_SECTORS * SECTOR_WORDS] __attribute__((aligned(PAGE_BYTES)));
static uint32_t bulk_at, bulk_number; /* the next sector of it, and how many writes there have been */
static uint64_t bulk_credit;

static uint32_t *ram;
static uint32_t pages, cursor, sweep, generation; /* pages before the cursor have this generation, the rest the last */
static uint64_t dirtied_pages;

static uint64_t now, started, max_gap, checked, errors;
static uint64_t request_started, max_request;
static unsigned error_lines;

/* ---- text ---- */

static char line[256];
static unsigned line_length;

/* Lines wait here to be sent: a host that reads slowly must not show as a gap. */
static char output[8192];
static unsigned output_head, output_tail;

static void put(const char *text)
{
    while (*text && line_length < sizeof line - 1)
        line[line_length++] = *text++;
}

/* By 16 bits at a time: 64-bit division would need libgcc, which -m32 often lacks. */
static uint64_t divide(uint64_t value, uint16_t by, uint32_t *remainder)
{
    uint64_t quotient = 0;
    uint32_t rest = 0;

    for (int shift = 48; shift >= 0; shift -= 16) {
        uint32_t part = rest << 16 | (uint16_t)(value >> shift);
        quotient |= (uint64_t)(part / by) << shift;
        rest = part % by;
    }
    *remainder = rest;
    return quotient;
}

static void put_number(const char *name, uint64_t value)
{
    char digits[21];
    unsigned at = sizeof digits - 1;
    uint32_t digit;

    digits[at] = 0;
    do {
        value = divide(value, 10, &digit);
        digits[--at] = (char)('0' + digit);
    } while (value);
    put(name);
    put(&digits[at]);
}

/* A line for which there is no room is dropped: the next report says the same. */
static void end_line(void)
{
    line[line_length++] = '\n';
    if (output_head - output_tail + line_length <= sizeof output)
        for (unsigned i = 0; i < line_length; i++)
            output[output_head++ % sizeof output] = line[i];
    line_length = 0;
}

static void send_output(void)
{
    unsigned at = output_tail % sizeof output, length = output_head - output_tail;

    if (length > sizeof output - at)
        length = sizeof output - at;
    if (length)
        output_tail += plat_send(output + at, length);
}

/* Counts an error; true when there is room for a line about it. */
static int error(void)
{
    errors++;
    if (error_lines >= MAX_ERROR_LINES)
        return 0;
    error_lines++;
    put("snaporch-guest ERROR");
    return 1;
}

static void put_status(void)
{
    uint32_t rest;

    put_number(" seq=", seq);
    put_number(" disks=", disks);
    put_number(" checked=", checked);
    put_number(" errors=", errors);
    put_number(" gap_us=", max_gap);
    put_number(" ram_mb=", pages >> 8);
    put_number(" dirty_mb=", dirtied_pages >> 8);
    put_number(" up_ms=", divide(now - started, 1000, &rest));
    put_number(" io_us=", max_request);
}

static void report(void)
{
    put("snaporch-guest");
    put_status();
    end_line();
    max_gap = max_request = 0;
    error_lines = 0;
}

/* ---- options ---- */

/* The text after prefix when text begins with it, else 0. */
static const char *after(const char *text, const char *prefix)
{
    while (*prefix)
        if (*text++ != *prefix++)
            return 0;
    return text;
}

static void set_option(const char *word, const char *name, uint32_t *value)
{
    const char *digit = after(word, name);

    if (!digit || *digit < '0' || *digit > '9')
        return;
    for (*value = 0; *digit >= '0' && *digit <= '9'; digit++)
        *value = *value * 10 + (uint32_t)(*digit - '0');
}

static void parse_options(const char *text)
{
    while (*text) {
        const char *word = after(text, "snaporch.");

        if (!word)
            word = text;
        set_option(word, "rate=", &options.rate);
        set_option(word, "dirty=", &options.dirty);
        set_option(word, "ram=", &options.ram);
        set_option(word, "report=", &options.report);
        set_option(word, "bulk=", &options.bulk);
        set_option(word, "pour=", &options.pour);
        set_option(word, "span=", &options.span);
        while (*text && *text != ' ' && *text != '\n')
            text++;
        while (*text == ' ' || *text == '\n')
            text++;
    }
}

/* ---- patterns ---- */

static uint32_t mix(uint32_t value)
{
    return value * 1664525u + 1013904223u;
}

static uint32_t seed_of(const struct sector *s)
{
    return mix(s->number ^ mix(s->stamp ^ mix(s->disk)));
}

static void fill_sector(struct sector *s, unsigned which, uint32_t number, uint32_t stamp)
{
    *s = (struct sector){.magic = MAGIC, .disk = which, .number = number, .stamp = stamp};
    uint32_t value = seed_of(s);

    for (unsigned i = 0; i < SECTOR_WORDS - 4; i++)
        s->pattern[i] = value = mix(value);
}

/* Whether the sector is one that fill_sector() made for this disk. */
static int sector_is_whole(const struct sector *s, unsigned which)
{
    uint32_t value = seed_of(s);

    if (s->magic != MAGIC || s->disk != which)
        return 0;
    for (unsigned i = 0; i < SECTOR_WORDS - 4; i++)
        if (s->pattern[i] != (value = mix(value)))
            return 0;
    return 1;
}

static void fill_page(uint32_t page, uint32_t of_generation)
{
    volatile uint32_t *word = ram + (uint64_t)page * PAGE_WORDS;
    uint32_t value = mix(page ^ mix(of_generation));

    for (unsigned i = 0; i < LINE_WORDS; i++)
        word[i] = value = mix(value);
}

static void check_page(uint32_t page)
{
    const volatile uint32_t *word = ram + (uint64_t)page * PAGE_WORDS;
    uint32_t of_generation = page < cursor ? generation : generation - 1;
    uint32_t value = mix(page ^ mix(of_generation));

    checked++;
    for (unsigned i = 0; i < LINE_WORDS; i++) {
        uint32_t found = word[i];

        value = mix(value);
        if (found == value)
            continue;
        if (error()) {
            put_number(" page=", page);
            put_number(" word=", i);
            put_number(" expected=", value);
            put_number(" found=", found);
            put_number(" generation=", of_generation);
            end_line();
        }
        return;
    }
}

/* ---- disks ---- */

static void disk_error(void)
{
    if (error()) {
        put_number(" disk=", disk);
        put_number(" io=failed seq=", seq);
        end_line();
    }
}

static void check_slot(void)
{
    const struct sector *s = &slots[slot];
    const struct expected *e = &expected[disk];
    int whole = sector_is_whole(s, disk);

    checked++;
    if (whole && s->number == e->number[slot] && s->stamp == e->stamp[slot])
        return;
    if (!error())
        return;
    put_number(" disk=", disk);
    put_number(" expected=", e->number[slot]);
    if (whole)
        put_number(" found=", s->number);
    else
        put(" found=garbage");
    put_number(" slot=", slot);
    put_number(" seq=", seq);
    if (whole && s->number == e->number[slot])
        put(" why=written-by-another-branch");
    else if (whole)
        put(s->number < e->number[slot] ? " why=disk-older-than-memory" : " why=disk-newer-than-memory");
    end_line();
}

static void start(enum phase next, enum disk_op op, uint32_t sector, void *buffer, uint32_t sectors)
{
    request_started = now;
    plat_disk_start(disk, op, sector, buffer, sectors);
    phase = next;
}

static void start_read(void)
{
    /* Memory against itself: the disks before this one have the next number already, this one must not. */
    if (expected[disk].done != seq && error()) {
        put_number(" disk=", disk);
        put_number(" done=", expected[disk].done);
        put_number(" seq=", seq);
        end_line();
    }
    start(READING, DISK_READ, FIRST_SECTOR, slots, SLOTS);
}

static void start_write(void)
{
    fill_sector(&outgoing, disk, seq + 1, (uint32_t)now);
    slot = mix((uint32_t)now) >> (32 - SLOTS_LOG2);
    start(WRITING, DISK_WRITE, FIRST_SECTOR + slot, &outgoing, 1);
}

static void finish_write(void)
{
    struct expected *e = &expected[disk];

    e->number[slot] = outgoing.number;
    e->stamp[slot] = outgoing.stamp;
    e->done = outgoing.number;
    if (++disk < disks) {
        start_read();
        return;
    }
    seq++;
    phase = REST;
}

/* Overwrites the slots without telling memory, as a crash or a mistake would: a demo's damage to be reverted. */
static void start_ruin(void)
{
    uint32_t *word = (uint32_t *)slots;

    for (unsigned i = 0; i < SLOTS * SECTOR_WORDS; i++)
        word[i] = 0xdeadbeef;
    start(RUINING, DISK_WRITE, FIRST_SECTOR, slots, SLOTS);
}

/*
 * Bulk is only written, to the first disk: a load for the host. What is poured, to a disk that gets nothing else, is not
 * flushed either. Each page differs from those before it.
 */
static void start_bulk(void)
{
    disk = options.pour ? disks : 0;
    for (unsigned page = 0; page < FILL_SECTORS * SECTOR_BYTES / PAGE_BYTES; page++)
        bulk[page * PAGE_WORDS] = mix(bulk_number ^ mix(page));
    bulk_number++;
    start(FILLING, options.pour ? DISK_POUR : DISK_WRITE, FILL_SECTOR + bulk_at, bulk, FILL_SECTORS);
    bulk_at += FILL_SECTORS;
    if (bulk_at >= options.span * ((1 << 20) / SECTOR_BYTES))
        bulk_at = 0;
}

static void start_round(void)
{
    uint32_t interval = options.rate ? 1000000 / options.rate : 0;

    next_round += interval;
    if (next_round < now)
        next_round = now;
    disk = 0;
    if (ruin_wanted)
        start_ruin();
    else
        start_read();
}

/* Takes the disk work one small step on without waiting, as the dirtying goes on. True when there is more to do now. */
static int disk_step(void)
{
    enum disk_state state;

    switch (phase) {
    case REST:
        if (disks && bulk_credit >= sizeof bulk) {
            bulk_credit -= sizeof bulk;
            start_bulk();
            return 1;
        }
        if (!disks || now < next_round)
            return 0;
        start_round();
        return 1;
    case CHECKING:
        check_slot();
        if (++slot == SLOTS)
            start_write();
        return 1;
    default:
        break;
    }

    state = plat_disk_poll(disk);
    if (state == DISK_BUSY)
        return 0;
    if (state == DISK_FAILED)
        disk_error();
    if (now - request_started > max_request)
        max_request = now - request_started;
    switch (phase) {
    case FILLING:
        phase = REST;
        break;
    case READING:
        slot = 0;
        phase = CHECKING;
        break;
    case WRITING:
        finish_write();
        break;
    default:
        if (++disk < disks) {
            start_ruin();
        } else {
            ruin_wanted = 0;
            phase = REST;
        }
    }
    return 1;
}

static void transfer(enum disk_op op)
{
    enum disk_state state;

    plat_disk_start(disk, op, FIRST_SECTOR, slots, SLOTS);
    while ((state = plat_disk_poll(disk)) == DISK_BUSY)
        plat_idle();
    if (state == DISK_FAILED)
        disk_error();
}

/* Begins a run after the highest number that any disk holds, whatever an earlier run left on them. */
static void start_disks(void)
{
    seq = SLOTS;
    for (disk = 0; disk < disks; disk++) {
        transfer(DISK_READ);
        for (unsigned i = 0; i < SLOTS; i++)
            if (sector_is_whole(&slots[i], disk) && slots[i].number > seq)
                seq = slots[i].number;
    }
    for (disk = 0; disk < disks; disk++) {
        struct expected *e = &expected[disk];

        for (unsigned i = 0; i < SLOTS; i++) {
            e->number[i] = seq - (SLOTS - 1) + i;
            e->stamp[i] = (uint32_t)now;
            fill_sector(&slots[i], disk, e->number[i], e->stamp[i]);
        }
        transfer(DISK_WRITE);
        e->done = seq;
    }
}

/* ---- RAM ---- */

static void start_ram(void)
{
    uint32_t mib = options.ram;

    ram = plat_ram(&mib);
    pages = mib << 8;
    generation = 1;
    for (uint32_t page = 0; page < pages; page++)
        fill_page(page, generation - 1);
}

static void dirty_page(void)
{
    check_page(cursor);
    fill_page(cursor, generation);
    dirtied_pages++;
    if (++cursor == pages) {
        cursor = 0;
        generation++;
    }
}

static void sweep_pages(void)
{
    for (unsigned i = 0; i < SWEEP_PAGES && pages; i++) {
        check_page(sweep);
        sweep = sweep + 1 < pages ? sweep + 1 : 0;
    }
}

/* ---- commands ---- */

static void obey(const char *command)
{
    if (after(command, "mark"))
        report();
    else if (after(command, "ruin"))
        ruin_wanted = 1;
    else if (after(command, "off"))
        plat_power(POWER_OFF);
    else if (after(command, "reboot"))
        plat_power(POWER_REBOOT);
}

static void serial_step(void)
{
    static char command[16];
    static unsigned length;
    int byte;

    send_output();
    while ((byte = plat_receive()) >= 0) {
        if (byte != '\n' && byte != '\r') {
            if (length < sizeof command - 1)
                command[length++] = (char)byte;
            continue;
        }
        command[length] = 0;
        length = 0;
        obey(command);
    }
}

/* ---- the loop ---- */

/* The time since the last call is time in which the guest could have written RAM once more. */
static uint64_t tick(void)
{
    uint64_t before = now;

    now = plat_now_us();
    if (now - before > max_gap)
        max_gap = now - before;
    return now - before;
}

_Noreturn void workload_run(const char *text)
{
    uint64_t credit = 0, next_serial = 0, next_report;

    parse_options(text);
    started = now = plat_now_us();
    disks = plat_disks();
    if (options.pour && disks)
        disks--; /* the last one is for that */
    start_ram();
    start_disks();

    now = next_round = plat_now_us();
    next_report = now + options.report * 1000;
    put("snaporch-guest ready");
    put_status();
    put_number(" rate=", options.rate);
    put_number(" dirty=", options.dirty);
    end_line();

    for (;;) {
        uint64_t passed = tick();
        int busy;

        credit += passed * options.dirty; /* 1 MB/s is one byte a microsecond */
        if (credit > MAX_CREDIT)
            credit = MAX_CREDIT;
        bulk_credit += passed * (options.pour ? options.pour : options.bulk);
        if (bulk_credit > MAX_CREDIT)
            bulk_credit = MAX_CREDIT;
        busy = disk_step();
        if (credit >= PAGE_BYTES && pages) {
            dirty_page();
            credit -= PAGE_BYTES;
            busy = 1;
        }
        if (now >= next_serial) {
            next_serial = now + 1000;
            serial_step();
            sweep_pages();
        }
        if (now >= next_report) {
            next_report += options.report * 1000;
            if (next_report < now)
                next_report = now + options.report * 1000;
            report();
        }
        if (!busy)
            plat_idle();
    }
}
