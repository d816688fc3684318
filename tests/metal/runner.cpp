// Runs Metal kernels that were compiled for the CPU: a fiber for each thread of a group.
//
// A request comes on descriptor 0, its answer goes to descriptor 1: status (0 fine, 1 a fault) and the outputs' bytes or
// a message. After a fault the process ends, and whoever started it starts another.

#include <dlfcn.h>
#include <pmmintrin.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr unsigned LANES = 32, MOST_THREADS = 1024, PAGE = 4096;
constexpr size_t STACK = 128 << 10, MOST_THREADGROUP_BYTES = 32 << 10;
constexpr size_t MOST_KEPT_BYTES = 256 << 10;
constexpr unsigned char OUTSIDE = 0xA5;

struct Position {
  unsigned group, groups, thread_, threads;
};

struct Program {
  void (*entry)(void* const*, const Position*);
  char *shared_begin, *shared_end;
};

// One array in memory: a mapping with an inaccessible page at each end.
struct Buffer {
  std::string name;
  bool is_output;
  size_t item_bytes, bytes;
  std::vector<char> content;  // of an input
  char *mapping = nullptr, *data = nullptr;
  size_t mapped = 0;
};

std::vector<Buffer> buffers;

void write_all(const void* from, size_t bytes) {
  for (auto at = static_cast<const char*>(from); bytes > 0;) {
    const ssize_t wrote = write(1, at, bytes);
    if (wrote <= 0) _exit(3);
    at += wrote;
    bytes -= wrote;
  }
}

void read_all(void* to, size_t bytes) {
  for (auto at = static_cast<char*>(to); bytes > 0;) {
    const ssize_t got = read(0, at, bytes);
    if (got <= 0) _exit(0);
    at += got;
    bytes -= got;
  }
}

template <typename T> T next() {
  T value;
  read_all(&value, sizeof(T));
  return value;
}

std::string next_text() {
  std::string text(next<uint32_t>(), ' ');
  read_all(text.data(), text.size());
  return text;
}

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  char text[600];
  va_list arguments;
  va_start(arguments, format);
  const uint32_t length = std::min<int>(vsnprintf(text, sizeof text, format, arguments), sizeof text - 1);
  const uint32_t status = 1;
  write_all(&status, 4);
  write_all(&length, 4);
  write_all(text, length);
  _exit(1);
}

// --- fibers

enum State { READY, AT_SIMD, AT_BARRIER, ENDED };

struct Fiber {
  char* stack;
  void* stack_pointer;
  State state;
  int line, operation, argument;
  float value;
  Position position;
};

Fiber fibers[MOST_THREADS];
Fiber* running;
void* scheduler;
const Program* program;
std::vector<void*> arguments;

extern "C" void metal_switch(void** save_to, void* go_to);
asm(R"(
.text
.globl metal_switch
metal_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void pause_fiber() { metal_switch(&running->stack_pointer, scheduler); }

void begin_fiber() {
  program->entry(arguments.data(), &running->position);
  running->state = ENDED;
  pause_fiber();
}

// Stacks that no thread has; the last one given back is the next one taken, since it is in the cache.
std::vector<char*> free_stacks;

void start(Fiber& fiber) {
  fiber.stack = free_stacks.back();
  free_stacks.pop_back();
  // Six registers, the address to go to, and one more so that the stack is aligned as after a call
  void** top = reinterpret_cast<void**>(fiber.stack + STACK) - 2;
  top[1] = nullptr;
  top[0] = reinterpret_cast<void*>(begin_fiber);
  fiber.stack_pointer = std::fill_n(top - 6, 6, nullptr) - 6;
}

float of_lane(const Fiber* lanes, unsigned count, unsigned lane) { return lane < count ? lanes[lane].value : NAN; }

// The result of a lane for the operations of exec_prelude.h, in their order.
float simd_result(const Fiber* lanes, unsigned count, unsigned lane) {
  const unsigned argument = lanes[lane].argument;
  switch (lanes[lane].operation) {
    case 0: return of_lane(lanes, count, lane ^ argument);
    case 1: return of_lane(lanes, count, lane + argument);
    case 2: return of_lane(lanes, count, argument);
    default: break;
  }
  float result = lanes[0].value;
  for (unsigned i = 1; i < count; ++i)
    result = lanes[lane].operation == 3 ? result + lanes[i].value : std::max(result, lanes[i].value);
  return result;
}

void check_together(const Fiber* first, unsigned count, State state, const char* what) {
  const Fiber* waiting = std::find_if(first, first + count, [&](const Fiber& each) { return each.state == state; });
  for (const Fiber* each = first; each < first + count; ++each) {
    const unsigned group = each->position.group, thread = each->position.thread_;
    if (each->state == ENDED) fail("%s in line %d: thread %u of group %u has ended", what, waiting->line, thread, group);
    if (each->state != state || each->line != waiting->line || each->operation != waiting->operation)
      fail("%s in line %d: thread %u of group %u waits in line %d", what, waiting->line, thread, group, each->line);
  }
}

// Let the threads of a simdgroup run until each waits for the whole group or has ended.
void advance(Fiber* lanes, unsigned count, const std::vector<unsigned>& order) {
  for (;;) {
    for (unsigned lane : order) {
      if (lane >= count || lanes[lane].state != READY) continue;
      running = &lanes[lane];
      if (!running->stack) start(*running);
      metal_switch(&scheduler, running->stack_pointer);
      if (running->state == ENDED) free_stacks.push_back(running->stack);
    }
    const auto at_simd = [](const Fiber& each) { return each.state == AT_SIMD; };
    if (std::none_of(lanes, lanes + count, at_simd)) return;
    check_together(lanes, count, AT_SIMD, "simdgroup operation");
    float results[LANES] = {};
    if (lanes[0].operation >= 0)
      for (unsigned lane = 0; lane < count; ++lane) results[lane] = simd_result(lanes, count, lane);
    for (unsigned lane = 0; lane < count; ++lane) {
      lanes[lane].value = results[lane];
      lanes[lane].state = READY;
    }
  }
}

// The numbers below a count in an order; a few shuffles are kept and taken in turn.
const std::vector<unsigned>& ordered(unsigned count, unsigned order, unsigned seed) {
  static std::map<std::array<unsigned, 3>, std::vector<unsigned>> known;
  auto& all = known[{count, order, order == 2 ? seed % 16 : 0}];
  if (all.size() == count) return all;
  all.resize(count);
  std::iota(all.begin(), all.end(), 0);
  if (order == 1) std::reverse(all.begin(), all.end());
  if (order == 2) std::shuffle(all.begin(), all.end(), std::mt19937(seed % 16));
  return all;
}

void run_group(unsigned threads, unsigned order) {
  const unsigned simdgroups = (threads + LANES - 1) / LANES;
  for (unsigned round = 0;; ++round) {
    for (unsigned simdgroup : ordered(simdgroups, order, round + 1)) {
      const unsigned first = simdgroup * LANES;
      advance(fibers + first, std::min(LANES, threads - first), ordered(LANES, order, simdgroup + round));
    }
    const auto ended = [](const Fiber& each) { return each.state == ENDED; };
    if (std::all_of(fibers, fibers + threads, ended)) return;
    check_together(fibers, threads, AT_BARRIER, "barrier");
    for (unsigned i = 0; i < threads; ++i) fibers[i].state = READY;
  }
}

void run_all(unsigned grid, unsigned threads, unsigned order) {
  const unsigned groups = (grid + threads - 1) / threads;
  for (unsigned group : ordered(groups, order, 7)) {
    const unsigned here = std::min(threads, grid - group * threads);
    if (program->shared_begin)
      memset(program->shared_begin, order == 1 ? 0xFE : 0xFF, program->shared_end - program->shared_begin);
    for (unsigned i = 0; i < here; ++i) {
      fibers[i] = {};
      fibers[i].position = {group, groups, i, here};
    }
    run_group(here, order);
  }
}

// --- memory

// Mappings of earlier buffers by their number of bytes: to make one takes longer than most kernels.
std::map<size_t, std::vector<char*>> free_mappings;

char* mapping_of(size_t bytes) {
  auto& free = free_mappings[bytes];
  if (!free.empty()) {
    char* mapping = free.back();
    free.pop_back();
    return mapping;
  }
  void* mapping = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) fail("no memory for %zu bytes", bytes);
  return static_cast<char*>(mapping);
}

void release(Buffer& buffer) {
  if (buffer.mapped <= MOST_KEPT_BYTES) free_mappings[buffer.mapped].push_back(buffer.mapping);
  else munmap(buffer.mapping, buffer.mapped);
}

void place(Buffer& buffer, unsigned order) {
  const size_t pages = (buffer.bytes + 16 + PAGE - 1) / PAGE * PAGE;
  buffer.mapped = pages + 2 * PAGE;
  buffer.mapping = mapping_of(buffer.mapped);
  char *begin = buffer.mapping + PAGE, *end = begin + pages;
  mprotect(begin, pages, PROT_READ | PROT_WRITE);
  memset(begin, OUTSIDE, pages);
  if (buffer.is_output) {  // MLX allocates it: aligned
    buffer.data = begin + (pages - buffer.bytes) / 16 * 16;
    memset(buffer.data, order == 1 ? 0xFE : 0xFF, buffer.bytes);
    return;
  }
  buffer.data = order == 1 ? begin + buffer.item_bytes : end - buffer.bytes;  // a view may begin anywhere
  memcpy(buffer.data, buffer.content.data(), buffer.bytes);
  mprotect(begin, pages, PROT_READ);
}

void check_outside(const Buffer& buffer) {
  const char *begin = buffer.mapping + PAGE, *end = buffer.mapping + buffer.mapped - PAGE;
  const auto changed = [](char each) { return static_cast<unsigned char>(each) != OUTSIDE; };
  if (std::any_of(begin, static_cast<const char*>(buffer.data), changed) ||
      std::any_of(static_cast<const char*>(buffer.data) + buffer.bytes, end, changed))
    fail("writes outside %s", buffer.name.c_str());
}

// What clang's check found that led to a trap: its number is in the instruction.
const char* trap_reason(const unsigned char* instruction) {
  if (instruction[0] != 0x67 || instruction[1] != 0x0f || instruction[2] != 0xb9) return "stops at a trap";
  switch (instruction[4]) {
    case 0: case 12: case 13: case 21: return "an integer overflows";
    case 3: return "divides by zero";
    case 10: return "reads a boolean that is neither true nor false";
    case 18: return "an index is outside its array";
    case 20: return "shifts by too many bits";
    case 22: return "reads or writes at an address that is not aligned for the type";
    default: return "stops at a trap";
  }
}

void on_signal(int number, siginfo_t* info, void* context) {
  if (number == SIGALRM) fail("does not end");
  const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  if (number == SIGILL) fail("%s", trap_reason(reinterpret_cast<const unsigned char*>(registers[REG_RIP])));
  const bool writes = registers[REG_ERR] & 2;
  const char* address = static_cast<const char*>(info->si_addr);
  for (const Buffer& buffer : buffers) {
    if (address < buffer.mapping || address >= buffer.mapping + buffer.mapped) continue;
    if (writes && address >= buffer.data && address < buffer.data + buffer.bytes) fail("writes to the input %s", buffer.name.c_str());
    fail("%s at byte %td of %s, which has %zu", writes ? "writes" : "reads", address - buffer.data, buffer.name.c_str(), buffer.bytes);
  }
  fail("%s at an address of no buffer", writes ? "writes" : "reads");
}

const Program& load(const std::string& path) {
  static std::map<std::string, Program> loaded;
  const auto found = loaded.find(path);
  if (found != loaded.end()) return found->second;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) fail("%s", dlerror());
  const auto address = [&](const char* name) { return reinterpret_cast<char* (*)()>(dlsym(library, name))(); };
  const auto entry = reinterpret_cast<void (*)(void* const*, const Position*)>(dlsym(library, "metal_entry"));
  const Program made{entry, address("metal_threadgroup_begin"), address("metal_threadgroup_end")};
  const long shared = made.shared_end - made.shared_begin;
  if (shared > static_cast<long>(MOST_THREADGROUP_BYTES)) fail("%ld bytes of threadgroup memory: more than 32 KB", shared);
  return loaded[path] = made;
}

void compare(const Buffer& buffer, const std::vector<char>& first, unsigned order) {
  if (memcmp(first.data(), buffer.data, buffer.bytes) == 0) return;
  size_t at = 0;
  while (first[at] == buffer.data[at]) ++at;
  fail("%s differs in %s order of threads from element %zu on", buffer.name.c_str(), order == 1 ? "reverse" : "shuffled",
       at / buffer.item_bytes);
}

// Request: library, grid, threads of a group, orders (bits), seconds, buffers: name, whether an output, bytes of an
// element and of all, content of an input.
void answer_request() {
  const std::string path = next_text();
  const auto grid = next<uint32_t>(), threads = next<uint32_t>(), orders = next<uint32_t>(), seconds = next<uint32_t>();
  buffers.assign(next<uint32_t>(), {});
  for (Buffer& buffer : buffers) {
    buffer.name = next_text();
    buffer.is_output = next<uint32_t>();
    buffer.item_bytes = next<uint32_t>();
    buffer.bytes = next<uint64_t>();
    buffer.content.resize(buffer.is_output ? 0 : buffer.bytes);
    read_all(buffer.content.data(), buffer.content.size());
  }
  if (threads > MOST_THREADS) fail("%u threads in a group: more than %u", threads, MOST_THREADS);
  program = &load(path);
  alarm(seconds);
  std::vector<std::vector<char>> results;
  for (unsigned order = 0; order < 3; ++order) {
    if (!(orders >> order & 1)) continue;
    arguments.clear();
    for (Buffer& buffer : buffers) {
      place(buffer, order);
      arguments.push_back(buffer.data);
    }
    run_all(grid, threads, order);
    const bool is_first = results.empty();
    unsigned output = 0;
    for (Buffer& buffer : buffers) {
      if (buffer.is_output) {
        check_outside(buffer);
        if (is_first) results.emplace_back(buffer.data, buffer.data + buffer.bytes);
        else compare(buffer, results[output++], order);
      }
      release(buffer);
    }
  }
  alarm(0);
  const uint32_t status = 0;
  write_all(&status, 4);
  for (const auto& result : results) write_all(result.data(), result.size());
}

}  // namespace

// --- what kernels call

extern "C" float metal_simd(int operation, float value, int argument, int line) {
  running->state = AT_SIMD;
  running->operation = operation;
  running->value = value;
  running->argument = argument;
  running->line = line;
  pause_fiber();
  return running->value;
}

extern "C" void metal_barrier(int flags, int line, bool is_group) {
  if (!(flags & 2) && program->shared_begin) fail("barrier in line %d: does not order threadgroup memory", line);
  running->state = is_group ? AT_BARRIER : AT_SIMD;
  running->operation = -1;
  running->line = line;
  pause_fiber();
}

// Round to nearest, ties to even; older compiler libraries lack it.
extern "C" __bf16 __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t rounded =
      std::isnan(x) ? (bits >> 16 | 0x40) : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  __bf16 result;
  memcpy(&result, &rounded, 2);
  return result;
}

int main() {
  _MM_SET_FLUSH_ZERO_MODE(_MM_FLUSH_ZERO_ON);
  _MM_SET_DENORMALS_ZERO_MODE(_MM_DENORMALS_ZERO_ON);
  char* stacks = static_cast<char*>(mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (unsigned i = 0; i < MOST_THREADS; ++i) {
    mprotect(stacks + i * STACK, PAGE, PROT_NONE);
    free_stacks.push_back(stacks + i * STACK);
  }
  static char signal_stack[64 << 10];
  const stack_t stack = {signal_stack, 0, sizeof signal_stack};
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGALRM}) sigaction(number, &action, nullptr);
  for (;;) answer_request();
}
