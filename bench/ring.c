// The least that harvesting and resetting a KVM dirty ring can cost: the anchor of kvm_ring.py. For x86_64.
//
// usage: ring PROGRAM BASE PAGES ROUNDS REGISTER=VALUE...
//
// Makes a virtual machine with PAGES pages of memory at guest address BASE, and the machine code in the file PROGRAM. Each round
// sets the registers, runs the guest until it halts, and then, timed: harvests every entry in order into a bitmap, and has them
// reset. Prints for each round: entries, nanoseconds of all of it, nanoseconds of the reset.
//
// Sources: Linux Documentation/virt/kvm/api.rst (8.29, dirty ring); Intel SDM volume 3, chapters 3.4, 4.5 and 9.8.

#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, ENTRIES = 65536, GIBS = 8, ROM_PAGES = 64, MAX_CPUID = 256, MEMORY_SLOT = 0, ROM_SLOT = 1 };

// The read-only part, from guest address 0: descriptors, three levels of tables, the program.
enum { GDT = 0, LEVEL4 = PAGE, LEVEL3 = 2 * PAGE, LEVEL2 = 3 * PAGE, PROGRAM = LEVEL2 + GIBS * PAGE };

// Accessed, and dirty, are set beforehand: the processor would set them, and cannot.
static const uint64_t TABLE = 0x23, LARGE_PAGE = 0xe3;

static const char *const NAMES[] = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8",
                                    "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};

static int call(int fd, unsigned long request, void *argument, const char *what)
{
    int result = ioctl(fd, request, argument);
    if (result < 0)
        err(1, "%s", what);
    return result;
}

static void *map(size_t nbytes, int fd, off_t offset)
{
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, flags, fd, offset);
    if (memory == MAP_FAILED)
        err(1, "mmap");
    return memory;
}

static void set_region(int vm, uint32_t slot, uint32_t flags, uint64_t address, uint64_t nbytes, void *memory)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot, .flags = flags, .guest_phys_addr = address, .memory_size = nbytes, .userspace_addr = (uintptr_t)memory};
    call(vm, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
}

// Identity-mapped 2 MiB pages, and a program.
static uint8_t *make_rom(const char *path)
{
    uint8_t *rom = map(ROM_PAGES * PAGE, -1, 0);
    static const uint64_t gdt[] = {0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00008b0000000067, 0};
    memcpy(rom + GDT, gdt, sizeof gdt);
    uint64_t *level4 = (uint64_t *)(rom + LEVEL4), *level3 = (uint64_t *)(rom + LEVEL3), *level2 = (uint64_t *)(rom + LEVEL2);
    level4[0] = LEVEL3 | TABLE;
    for (uint64_t gib = 0; gib < GIBS; gib++)
        level3[gib] = (LEVEL2 + gib * PAGE) | TABLE;
    for (uint64_t page = 0; page < GIBS * 512; page++)
        level2[page] = page << 21 | LARGE_PAGE;
    FILE *file = fopen(path, "rb");
    if (!file)
        err(1, "%s", path);
    if (!fread(rom + PROGRAM, 1, ROM_PAGES * PAGE - PROGRAM, file))
        errx(1, "%s: no program", path);
    fclose(file);
    return rom;
}

static void enter_long_mode(int kvm, int vcpu)
{
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + MAX_CPUID * sizeof *cpuid->entries);
    cpuid->nent = MAX_CPUID;
    call(kvm, KVM_GET_SUPPORTED_CPUID, cpuid, "KVM_GET_SUPPORTED_CPUID");
    call(vcpu, KVM_SET_CPUID2, cpuid, "KVM_SET_CPUID2");
    free(cpuid);
    struct kvm_sregs sregs;
    call(vcpu, KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
    sregs.cs = (struct kvm_segment){.limit = ~0u, .selector = 0x08, .type = 0xb, .present = 1, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {.limit = ~0u, .selector = 0x10, .type = 0x3, .present = 1, .s = 1, .db = 1, .g = 1};
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.tr = (struct kvm_segment){.limit = 0x67, .selector = 0x18, .type = 0xb, .present = 1};
    sregs.gdt = (struct kvm_dtable){.base = GDT, .limit = 39};
    sregs.idt = (struct kvm_dtable){0};
    sregs.cr0 = 0x80050033;
    sregs.cr3 = LEVEL4;
    sregs.cr4 = 0x620;
    sregs.efer = 0x500;
    call(vcpu, KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
}

// kvm_regs begins with the sixteen registers, in the order of NAMES.
static struct kvm_regs parse_registers(int count, char **words)
{
    struct kvm_regs regs = {.rip = PROGRAM, .rflags = 2};
    for (int word = 0; word < count; word++) {
        char *value = strchr(words[word], '=');
        size_t number = 0;
        for (; value && number < 16; number++)
            if (strlen(NAMES[number]) == (size_t)(value - words[word]) && !strncmp(NAMES[number], words[word], value - words[word]))
                break;
        if (!value || number == 16)
            errx(2, "%s: not a register", words[word]);
        (&regs.rax)[number] = strtoull(value + 1, NULL, 0);
    }
    return regs;
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

// What is measured. *fetch counts the entries harvested so far.
static uint32_t harvest(struct kvm_dirty_gfn *ring, uint32_t *fetch, uint64_t *bitmap)
{
    uint32_t count = 0;
    for (;; count++) {
        struct kvm_dirty_gfn *entry = &ring[*fetch & (ENTRIES - 1)];
        if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
            return count;
        if (entry->slot == MEMORY_SLOT)
            bitmap[entry->offset / 64] |= UINT64_C(1) << entry->offset % 64;
        __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
        ++*fetch;
    }
}

int main(int argc, char **argv)
{
    if (argc < 5)
        errx(2, "usage: ring PROGRAM BASE PAGES ROUNDS REGISTER=VALUE...");
    uint64_t base = strtoull(argv[2], NULL, 0), pages = strtoull(argv[3], NULL, 0);
    int rounds = atoi(argv[4]);
    struct kvm_regs regs = parse_registers(argc - 5, argv + 5);

    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        err(1, "/dev/kvm");
    int vm = call(kvm, KVM_CREATE_VM, 0, "KVM_CREATE_VM");
    struct kvm_enable_cap cap = {.cap = KVM_CAP_DIRTY_LOG_RING, .args = {ENTRIES * sizeof(struct kvm_dirty_gfn)}};
    call(vm, KVM_ENABLE_CAP, &cap, "KVM_CAP_DIRTY_LOG_RING");
    void *memory = map(pages * PAGE, -1, 0);
    madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
    memset(memory, 1, pages * PAGE);
    set_region(vm, MEMORY_SLOT, 0, base, pages * PAGE, memory);
    set_region(vm, ROM_SLOT, KVM_MEM_READONLY, 0, ROM_PAGES * PAGE, make_rom(argv[1]));
    int vcpu = call(vm, KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU");
    struct kvm_run *run = map(call(kvm, KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE"), vcpu, 0);
    struct kvm_dirty_gfn *ring = map(cap.args[0], vcpu, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
    enter_long_mode(kvm, vcpu);

    uint64_t *bitmap = calloc((pages + 63) / 64, sizeof *bitmap);
    uint32_t fetch = 0;
    // Round 0 runs without logging: it maps the pages.
    for (int round = 0; round <= rounds; round++) {
        call(vcpu, KVM_SET_REGS, &regs, "KVM_SET_REGS");
        call(vcpu, KVM_RUN, 0, "KVM_RUN");
        if (run->exit_reason != KVM_EXIT_HLT)
            errx(1, "the guest was left for reason %u", run->exit_reason);
        int64_t begin = now();
        uint32_t count = harvest(ring, &fetch, bitmap);
        int64_t harvested = now();
        uint32_t reset = call(vm, KVM_RESET_DIRTY_RINGS, 0, "KVM_RESET_DIRTY_RINGS");
        int64_t end = now();
        if (!round)
            set_region(vm, MEMORY_SLOT, KVM_MEM_LOG_DIRTY_PAGES, base, pages * PAGE, memory);
        else
            printf("%u %lld %lld\n", count, (long long)(end - begin), (long long)(end - harvested));
        uint64_t dirty = 0;
        for (uint64_t word = 0; word < (pages + 63) / 64; word++)
            dirty += __builtin_popcountll(bitmap[word]);
        if (dirty != count || reset != count)
            errx(1, "%u entries, %llu pages, %u entries reset", count, (unsigned long long)dirty, reset);
        memset(bitmap, 0, (pages + 63) / 64 * sizeof *bitmap);
    }
}
