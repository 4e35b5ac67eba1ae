/* Entry of the tiny guest: multiboot header, segments, stack, and the interrupt stubs. */

.set MULTIBOOT_MAGIC, 0x1BADB002
.set MULTIBOOT_FLAGS, 2 /* memory map wanted */

.section .multiboot, "a"
.align 4
.long MULTIBOOT_MAGIC, MULTIBOOT_FLAGS, -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

.text
.global start, timer_stub, disk_stub, fault_stub
start:
    cli
    cld
    mov $stack_top, %esp
    /* The boot loader's descriptor table may be gone: interrupts need one of our own. */
    lgdt gdt_pointer
    ljmp $8, $1f
1:  mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov %eax, %ss
    push %ebx /* multiboot information */
    call tiny_main
2:  hlt
    jmp 2b

timer_stub:
    pusha
    cld
    call timer_interrupt
    popa
    iret

disk_stub:
    pusha
    cld
    call disk_interrupt
    popa
    iret

fault_stub:
    cld
    call fault
    jmp 2b

.section .rodata
.align 8
gdt:
    .quad 0
    .quad 0x00CF9A000000FFFF /* 8: code, flat */
    .quad 0x00CF92000000FFFF /* 16: data, flat */
gdt_pointer:
    .word . - gdt - 1
    .long gdt

.bss
.align 16
.skip 16384
stack_top:

.section .note.GNU-stack, "", @progbits
