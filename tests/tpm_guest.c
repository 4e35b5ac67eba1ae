/*
 * A guest on bare metal that works with its TPM, and compares what it finds there with what it has in its RAM: both are
 * of one instant, or it says ERROR. It extends a register, which is gone at a reset, and counts in a counter, which
 * stays. Chapters and numbers: TCG PC Client Platform TPM Profile (CRB), TPM 2.0 Library, parts 2 and 3.
 */
#include <stdint.h>

enum { COM1 = 0x3f8, LOOP_PORTS = 20000 };
enum { LOC_CTRL = 0x08, CTRL_REQ = 0x40, CTRL_START = 0x4c, BUFFER = 0x80 };
enum { CC_DEFINE = 0x12a, CC_INCREMENT = 0x134, CC_STARTUP = 0x144, CC_NV_READ = 0x14e, CC_PCR_READ = 0x17e, CC_EXTEND = 0x182 };
enum { COUNTER = 0x01500001, OWNER = 0x40000001, PASSWORD = 0x40000009, PCR = 16, SHA256 = 0x0b, DIGEST = 32 };

static volatile uint8_t *const crb = (volatile uint8_t *)0xfed40000;
static uint8_t command[128];
static unsigned length;

static inline void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

void timer_interrupt(void) {}
void disk_interrupt(void) {}
void fault(void) {}

static void put(char c)
{
    while (!(inb(COM1 + 5) & 0x20))
        ;
    outb(COM1, (uint8_t)c);
}

static void say(const char *text)
{
    while (*text)
        put(*text++);
}

static void say_number(uint32_t number)
{
    if (number > 9)
        say_number(number / 10);
    put((char)('0' + number % 10));
}

/* The sum tells a line that was put together from two guests' in one log. */
static void report(const char *what, uint32_t number, uint32_t counter)
{
    say(what);
    say_number(number);
    say(" counter=");
    say_number(counter);
    say(" sum=");
    say_number(number + counter);
    put('\n');
}

/* ---- commands: big-endian ---- */

static void add(uint32_t value, unsigned bytes)
{
    while (bytes--)
        command[length++] = (uint8_t)(value >> 8 * bytes);
}

static void begin(uint32_t code, unsigned sessions)
{
    length = 0;
    add(sessions ? 0x8002 : 0x8001, 2);
    add(0, 4);
    add(code, 4);
}

/* An empty password. */
static void add_session(void)
{
    add(9, 4);
    add(PASSWORD, 4);
    add(0, 5);
}

static uint32_t number_at(unsigned offset)
{
    uint32_t value = 0;

    for (unsigned i = 0; i < 4; i++)
        value = value << 8 | crb[BUFFER + offset + i];
    return value;
}

/* Returns the TPM's answer: 0 is success. */
static uint32_t run(void)
{
    unsigned size = length;

    length = 2;
    add(size, 4);
    for (unsigned i = 0; i < size; i++)
        crb[BUFFER + i] = command[i];
    *(volatile uint32_t *)(crb + CTRL_REQ) = 1;
    *(volatile uint32_t *)(crb + CTRL_START) = 1;
    while (*(volatile uint32_t *)(crb + CTRL_START) & 1)
        ;
    return number_at(6);
}

static void define_counter(void)
{
    begin(CC_DEFINE, 1);
    add(OWNER, 4);
    add_session();
    add(0, 2);
    add(14, 2);
    add(COUNTER, 4);
    add(SHA256, 2);
    add(0x02060016, 4); /* a counter; owner and password may write and read; no protection from guessing */
    add(0, 2);
    add(8, 2);
    run(); /* it may be there already */
}

static uint32_t increment(void)
{
    begin(CC_INCREMENT, 1);
    add(COUNTER, 4);
    add(COUNTER, 4);
    add_session();
    return run();
}

static uint32_t read_counter(uint32_t *value)
{
    uint32_t answer;

    begin(CC_NV_READ, 1);
    add(COUNTER, 4);
    add(COUNTER, 4);
    add_session();
    add(8, 2);
    add(0, 2);
    answer = run();
    *value = answer ? 0 : number_at(20);
    return answer;
}

static uint32_t extend(uint32_t number)
{
    begin(CC_EXTEND, 1);
    add(PCR, 4);
    add_session();
    add(1, 4);
    add(SHA256, 2);
    for (unsigned i = 0; i < DIGEST / 4; i++)
        add(number, 4);
    return run();
}

static uint32_t read_register(uint32_t *value)
{
    uint32_t answer;

    begin(CC_PCR_READ, 0);
    add(1, 4);
    add(SHA256, 2);
    add(3, 1);
    add(1u << PCR % 8, 3); /* its bit in the third byte */
    answer = run();
    for (unsigned i = 0; i < DIGEST / 4; i++)
        value[i] = number_at(30 + 4 * i);
    return answer;
}

static void check(uint32_t answer, const char *what)
{
    if (answer) {
        say("tpm ERROR ");
        say(what);
        put('=');
        say_number(answer);
        put('\n');
    }
}

void tiny_main(uint32_t multiboot)
{
    static uint32_t expected[DIGEST / 4], found[DIGEST / 4];
    uint32_t counted = 0, counter;

    (void)multiboot;
    *(volatile uint32_t *)(crb + LOC_CTRL) = 1;
    begin(CC_STARTUP, 0);
    add(0, 2);
    run(); /* firmware may have done it */
    define_counter();
    read_counter(&counter);
    report("\ntpm boot=", 0, counter);
    check(read_register(expected), "register");
    counted = counter;
    for (uint32_t number = 1;; number++) {
        check(read_register(found), "register");
        for (unsigned i = 0; i < DIGEST / 4; i++)
            check(found[i] != expected[i], "another-register");
        read_counter(&counter);
        check(counter != counted, "another-counter");
        check(extend(number), "extend");
        check(increment(), "increment");
        check(read_register(expected), "register");
        check(read_counter(&counted), "counter");
        report("tpm number=", number, counted);
        for (unsigned i = 0; i < LOOP_PORTS; i++)
            inb(COM1 + 5);
    }
}
