// The threads of a block as fibers, and the collectives between them.

#include "cuemu.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuemu {

Thread *current = nullptr;
uint3 block_index{};
Launch launched{};
char *dynamic_shared = nullptr;

namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned MAX_THREADS = 1024;

const std::function<void()> *body = nullptr;
std::vector<Thread> threads;

// A copy that was started, or the end of a group of them.
struct Copy {
    void *to;
    const void *from;
    bool ends_group;
};

// Those of each thread, oldest first.
std::deque<Copy> copies[MAX_THREADS];

[[noreturn]] void fail(const char *what) {
    fprintf(stderr, "cuemu: %s (block %u,%u,%u of %u threads)\n", what, block_index.x, block_index.y, block_index.z,
            static_cast<unsigned>(threads.size()));
    for (const Thread &thread : threads) {
        if (!thread.done) {
            fprintf(stderr, "  thread %u waits in collective %d, mask %08x\n", thread.index.x,
                    static_cast<int>(thread.waits_for), thread.mask);
        }
    }
    abort();
}

char *stack_of(size_t thread) {
    static char *stacks = [] {
        void *memory = mmap(nullptr, STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return memory == MAP_FAILED ? nullptr : static_cast<char *>(memory);
    }();
    if (!stacks) {
        fail("no memory for stacks");
    }
    return stacks + thread * STACK_BYTES;
}

void suspend();

void entry() {
    (*body)();
    current->done = true;
    for (;;) {
        suspend();
    }
}

#if defined(__x86_64__)

extern "C" void cuemu_switch(void **save, void *to);
asm(R"(
.text
.globl cuemu_switch
.hidden cuemu_switch
.type cuemu_switch,@function
cuemu_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp,(%rdi)
    movq %rsi,%rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size cuemu_switch,.-cuemu_switch
)");

void *scheduler_context = nullptr;

void suspend() { cuemu_switch(&current->context, scheduler_context); }

void resume(Thread &thread) {
    current = &thread;
    cuemu_switch(&scheduler_context, thread.context);
}

void prepare(Thread &thread, char *stack) {
    void **top = reinterpret_cast<void **>(stack + STACK_BYTES);
    *--top = nullptr; // Where `entry` would return to, which it doesn't.
    *--top = reinterpret_cast<void *>(entry);
    for (int saved = 0; saved < 6; saved++) {
        *--top = nullptr;
    }
    thread.context = top;
}

#else

ucontext_t scheduler_context;
ucontext_t contexts[MAX_THREADS];

void suspend() { swapcontext(static_cast<ucontext_t *>(current->context), &scheduler_context); }

void resume(Thread &thread) {
    current = &thread;
    swapcontext(&scheduler_context, static_cast<ucontext_t *>(thread.context));
}

void prepare(Thread &thread, char *stack) {
    ucontext_t &context = contexts[&thread - threads.data()];
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
    thread.context = &context;
}

#endif

// Carries out the first collective of a warp that is complete; whether there was one.
bool complete_warp(Thread *warp, unsigned lanes) {
    for (unsigned lane = 0; lane < lanes; lane++) {
        Thread &first = warp[lane];
        if (first.waits_for == Collective::none || first.waits_for == Collective::barrier) {
            continue;
        }
        unsigned mask = lanes < 32 ? first.mask & ((1u << lanes) - 1) : first.mask;
        if (!(mask >> lane & 1)) {
            fail("a lane is not in its own mask");
        }
        bool complete = true;
        unsigned votes = 0;
        for (unsigned other = 0; other < lanes; other++) {
            if (mask >> other & 1) {
                if (warp[other].done) {
                    fail("a lane that the mask names has exited");
                }
                complete &= warp[other].waits_for == first.waits_for && warp[other].mask == first.mask &&
                            warp[other].work == first.work;
                votes |= (warp[other].gives != 0) << other;
            }
        }
        if (!complete) {
            continue;
        }
        Collective collective = first.waits_for;
        if (collective == Collective::together) {
            if (lanes < 32) {
                fail("a warp of fewer than 32 lanes works together");
            }
            void *brought[32];
            for (unsigned other = 0; other < lanes; other++) {
                brought[other] = reinterpret_cast<void *>(warp[other].gives);
            }
            first.work(brought);
        }
        for (unsigned other = 0; other < lanes; other++) {
            if (!(mask >> other & 1)) {
                continue;
            }
            unsigned from = warp[other].reads_from;
            if (collective == Collective::shuffle && (from >= lanes || !(mask >> from & 1))) {
                fail("a shuffle reads a lane outside its mask");
            }
            warp[other].gets = collective == Collective::shuffle ? warp[from].gives : votes;
        }
        for (unsigned other = 0; other < lanes; other++) {
            if (mask >> other & 1) {
                warp[other].waits_for = Collective::none;
            }
        }
        return true;
    }
    return false;
}

void run_block(bool reverse) {
    size_t count = threads.size();
    size_t done = 0;
    while (done < count) {
        bool progress = false;
        for (size_t first = 0; first < count; first += 32) {
            unsigned lanes = static_cast<unsigned>(std::min<size_t>(32, count - first));
            do {
                for (unsigned step = 0; step < lanes; step++) {
                    Thread &thread = threads[first + (reverse ? lanes - 1 - step : step)];
                    if (thread.done || thread.waits_for != Collective::none) {
                        continue;
                    }
                    resume(thread);
                    progress = true;
                    done += thread.done;
                }
            } while (complete_warp(&threads[first], lanes));
        }
        size_t waiting = 0;
        for (const Thread &thread : threads) {
            waiting += thread.waits_for == Collective::barrier;
        }
        if (waiting > 0 && waiting + done == count) {
            if (done > 0) {
                fail("a barrier is not reached by threads that exited");
            }
            for (Thread &thread : threads) {
                thread.waits_for = Collective::none;
            }
            progress = true;
        }
        if (!progress) {
            fail("threads wait for each other: a barrier or shuffle in divergent code");
        }
    }
}

} // namespace

uint64_t arrive(Collective collective, unsigned mask, uint64_t gives, unsigned reads_from) {
    Thread *self = current;
    self->waits_for = collective;
    self->mask = mask;
    self->gives = gives;
    self->reads_from = reads_from;
    suspend();
    return self->gets;
}

void together(Together work, void *brings) {
    current->work = work;
    arrive(Collective::together, ~0u, reinterpret_cast<uintptr_t>(brings), current->lane);
    current->work = nullptr;
}

void copy_later(void *to, const void *from) { copies[current - threads.data()].push_back({to, from, false}); }

void commit_copies() {
    auto &mine = copies[current - threads.data()];
    // A group's last copy marks its end; a group may be empty.
    mine.push_back({nullptr, nullptr, true});
}

void wait_for_copies(int pending) {
    auto &mine = copies[current - threads.data()];
    long groups = std::count_if(mine.begin(), mine.end(), [](const Copy &copy) { return copy.ends_group; });
    for (; groups > pending; mine.pop_front()) {
        const Copy &copy = mine.front();
        groups -= copy.ends_group;
        if (copy.from) {
            memcpy(copy.to, copy.from, 16);
        } else if (copy.to) {
            memset(copy.to, 0, 16);
        }
    }
}

void run(const Launch &launch, const std::function<void()> &kernel) {
    static const bool reverse = getenv("CUEMU_REVERSE") != nullptr;
    launched = launch;
    body = &kernel;
    // An allocation of its own for each launch, so that AddressSanitizer knows where it ends.
    void *shared = aligned_alloc(128, std::max<size_t>(launch.shared_bytes + 127, 128) / 128 * 128);
    std::unique_ptr<char, decltype(&free)> owned(static_cast<char *>(shared), free);
    dynamic_shared = owned.get();
    const uint3 block = launch.block, grid = launch.grid;
    threads.resize(size_t(block.x) * block.y * block.z);
    size_t blocks = size_t(grid.x) * grid.y * grid.z;
    for (size_t number = 0; number < blocks; number++) {
        size_t at = reverse ? blocks - 1 - number : number;
        block_index = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
        memset(dynamic_shared, 0xFF, launch.shared_bytes);
        for (size_t index = 0; index < threads.size(); index++) {
            threads[index] = Thread{};
            threads[index].index = {unsigned(index % block.x), unsigned(index / block.x % block.y),
                                    unsigned(index / block.x / block.y)};
            threads[index].lane = index % 32;
            copies[index].clear();
            prepare(threads[index], stack_of(index));
        }
        run_block(reverse);
    }
    current = nullptr;
}

static std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

Kernel *find_kernel(const std::string &name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

int add_kernel(const std::string &name, Kernel kernel) {
    kernels()[name] = std::move(kernel);
    return 0;
}

} // namespace cuemu
