# A boot sector that does what every operating system does first, and then asks QEMU to exit: protected mode, long
# mode with paging, an interrupt and its return in each, and the timer. snaporch/drivers/qemu/kvm.py has it in bytes.
        .set    EXIT, 0x2a              # isa-debug-exit at port 0xf4 makes (EXIT << 1) | 1 of it
        .set    IDT, 0x1000
        .set    PML4, 0x3000
        .set    TICKS, 0x6000

        .code16
        .globl  _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp
        cld
        movw    $IDT, %di               # all tables are zero at first
        movw    $0x2800, %cx
        rep stosw
        lgdtl   gdtr
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmp    $0x08, $protected

        .code32
protected:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $0x7c00, %esp
        movl    $(0x80000 + return32), IDT + 0x30 * 8
        movl    $0x8e00, IDT + 0x30 * 8 + 4
        lidtl   idtr
        int     $0x30
        movl    $(PML4 + 0x1000 + 3), PML4      # one page of 2 MiB, mapped to itself
        movl    $(PML4 + 0x2000 + 3), PML4 + 0x1000
        movl    $0x83, PML4 + 0x2000
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    %cr4, %eax
        orb     $0x20, %al              # PAE
        movl    %eax, %cr4
        movl    $0xc0000080, %ecx       # EFER
        rdmsr
        orb     $1, %ah                 # LME
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000000, %eax       # PG
        movl    %eax, %cr0
        ljmp    $0x18, $long
return32:
        iretl

        .code64
long:   movl    $(0x180000 + return64), IDT + 0x30 * 16
        movl    $0x8e00, IDT + 0x30 * 16 + 4
        movl    $(0x180000 + timer), IDT + 8 * 16       # where the BIOS has IRQ 0
        movl    $0x8e00, IDT + 8 * 16 + 4
        lidt    idtr
        int     $0x30
        movb    $0xfe, %al              # of the interrupt controller's, the timer alone
        outb    %al, $0x21
        sti
1:      hlt
        cmpl    $2, TICKS
        jb      1b
        movw    $0xf4, %dx
        movb    $EXIT, %al
        outb    %al, %dx
2:      hlt
        jmp     2b
timer:  incl    TICKS
        pushq   %rax
        movb    $0x20, %al
        outb    %al, $0x20
        popq    %rax
return64:
        iretq

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      # 0x08: code, 32 bits
        .quad   0x00cf93000000ffff      # 0x10: data
        .quad   0x00af9b000000ffff      # 0x18: code, 64 bits
gdtr:   .word   . - gdt - 1
        .long   gdt
idtr:   .word   0xfff
        .quad   IDT
