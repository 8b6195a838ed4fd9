// watch.h: sees every access of a kernel to memory, and says what a GPU would make of it.
//
// Compiled with -fsanitize=thread, a program calls __tsan_read4(address) before each access of 4
// bytes, and so on. Usually the sanitizer's library has these functions; here they are our own:
//
// * a global access outside of all arrays that the kernel was given is an error;
// * so is a race: two threads at the same byte, one of them writing, and no barrier in between
//   (of two accesses to global memory, the second must be the one that reads, or both write);
// * and since threads of a warp access memory together, the accesses that the 32 lanes make at one
//   place of the program for the k-th time are put together again, and counted as the hardware
//   would serve them: shared memory in passes of 32 banks of 4 bytes, where different words of one
//   bank need another pass each ("bank conflict"); global memory in sectors of 32 bytes.
//
// The last is exact as long as lanes do not skip each other's turns of a loop.
#pragma once

#include <dlfcn.h>

#include <map>
#include <unordered_map>

#define UNWATCHED __attribute__((no_sanitize("thread")))

extern "C" char _end[] __attribute__((visibility("hidden")));  // of this library

namespace cuda_on_cpu {

struct Request {  // of a warp: what its lanes access together
  unsigned lanes = 0;
  int bytes[warp_size];
  uintptr_t address[warp_size];
};

struct Count {
  long long requests = 0;
  long long parts = 0;  // passes through the banks, or sectors
  long long least = 0;  // ... that the same bytes would need at best
  void operator+=(const Count& other) {
    requests += other.requests;
    parts += other.parts;
    least += other.least;
  }
};

struct Site {  // an access in the program
  std::string place;
  bool shared, write;
  std::vector<unsigned> turns;                 // of each thread, since the last barrier
  std::vector<std::vector<Request>> requests;  // of each warp, likewise
  Count count;
};

struct Access {
  unsigned thread = ~0u, interval = 0, warp_interval = 0;
  const Site* site = nullptr;
};
struct Byte {  // of shared memory: who was there
  Access write, read, other_read;
};

struct Phase {  // of the first block: from one barrier to the next
  std::string end;
  std::map<std::string, Count> counts;
};

struct Range {
  uintptr_t begin, end;
  uintptr_t shift = 0;  // to where a GPU's array would begin, at a multiple of 32 bytes
  bool has(uintptr_t p) const { return begin <= p && p < end; }
};

struct Watch {
  std::vector<Range> arrays;  // that the kernel was given
  Range library, statics, dynamic, stacks, threads;
  std::unordered_map<uintptr_t, Site> sites;          // by the return address ...
  std::map<std::pair<const char*, int>, Site> named;  // ... or by line, for what has no address
  std::vector<Byte> bytes;                            // shared: static, then dynamic
  std::unordered_map<uintptr_t, Access> written;      // global
  std::vector<unsigned> warp_intervals;
  unsigned interval = 0, block = 0;
  std::vector<Phase> phases;
  std::string report;
};
inline Watch watch;

inline Range range(const void* begin, const void* end) {
  return {reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(end)};
}

// Passes or sectors.
inline Count cost(const Request& request, bool shared) {
  Count count;
  count.requests = 1;
  std::vector<uintptr_t> units;
  auto distinct = [&] {
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
    return (long long)units.size();
  };
  if (!shared) {
    long long bytes = 0;
    for (int lane = 0; lane < warp_size; ++lane)
      if (request.lanes >> lane & 1) {
        uintptr_t first = request.address[lane], last = first + request.bytes[lane] - 1;
        for (uintptr_t sector = first / 32; sector <= last / 32; ++sector) units.push_back(sector);
      }
    count.parts = distinct();
    units.clear();
    for (int lane = 0; lane < warp_size; ++lane)
      if (request.lanes >> lane & 1) units.push_back(request.address[lane]);
    for (int lane = 0; lane < warp_size; ++lane)
      if (request.lanes >> lane & 1) bytes = request.bytes[lane];
    count.least = (distinct() * bytes + 31) / 32;
    return count;
  }
  // A pass moves 128 bytes: lanes that ask for 8 or 16 bytes each are served in 2 or 4 groups.
  int widest = 4;
  for (int lane = 0; lane < warp_size; ++lane)
    if (request.lanes >> lane & 1) widest = max(widest, request.bytes[lane]);
  int group = 128 / widest;
  for (int first = 0; first < warp_size; first += group) {
    units.clear();
    for (int lane = first; lane < first + group; ++lane)
      if (request.lanes >> lane & 1)
        for (int i = 0; i < max(4, request.bytes[lane]); i += 4)
          units.push_back((request.address[lane] + i) / 4);
    if (units.empty()) continue;
    distinct();
    long long of_bank[32] = {}, most = 0;
    for (uintptr_t word : units) most = max(most, ++of_bank[word % 32]);
    count.parts += most;
    count.least += 1;
  }
  return count;
}

inline std::string kind(const Site& site) {
  return std::string(site.shared ? "shared" : "global") + (site.write ? " write" : " read");
}

// Count what was accessed since the last barrier.
inline void flush(const std::string& end) {
  bool first_block = blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0;
  Phase phase{end, {}};
  auto flush_site = [&](Site& site) {
    Count count;
    for (auto& warp : site.requests) {
      for (const Request& request : warp) count += cost(request, site.shared);
      warp.clear();
    }
    site.turns.assign(site.turns.size(), 0);
    site.count += count;
    if (count.requests) phase.counts[kind(site) + "\t" + site.place] += count;
  };
  for (auto& [address, site] : watch.sites) flush_site(site);
  for (auto& [line, site] : watch.named) flush_site(site);
  if (first_block) watch.phases.push_back(std::move(phase));
}

inline unsigned thread_number() { return unsigned(self().rank); }

// Whether the two are by different threads, and no barrier lies between them.
inline bool unordered(const Access& before, const Access& now) {
  if (!before.site || before.thread == now.thread || before.interval != now.interval) return false;
  bool same_warp = before.thread / warp_size == now.thread / warp_size;
  return !(same_warp && before.warp_interval != now.warp_interval);
}

inline void race(const Access& before, const Access& now, const char* memory) {
  fail(std::string("race in ") + memory + " memory: " + (now.site->write ? "write" : "read") +
       " at " + now.site->place + ", after a " + (before.site->write ? "write" : "read") + " at " +
       before.site->place + " by another thread, with no barrier in between");
}

inline void check_races(const Site& site, uintptr_t address, int bytes) {
  Access now{thread_number(), watch.interval, watch.warp_intervals[self().rank / warp_size], &site};
  if (!site.shared) {
    // No barrier orders threads of different blocks.
    now.thread += 1024 * watch.block;
    for (int i = 0; i < bytes; ++i) {
      auto found = watch.written.find(address + i);
      if (found != watch.written.end()) {
        const Access& before = found->second;
        bool other_block = before.thread / 1024 != now.thread / 1024;
        if (other_block || unordered(before, now)) return race(before, now, "global");
      }
      if (site.write) watch.written[address + i] = now;
    }
    return;
  }
  size_t first = watch.statics.has(address)
                     ? address - watch.statics.begin
                     : watch.statics.end - watch.statics.begin + address - watch.dynamic.begin;
  for (size_t i = first; i < first + bytes && i < watch.bytes.size(); ++i) {
    Byte& byte = watch.bytes[i];
    if (unordered(byte.write, now)) return race(byte.write, now, "shared");
    if (site.write) {
      if (unordered(byte.read, now)) return race(byte.read, now, "shared");
      if (unordered(byte.other_read, now)) return race(byte.other_read, now, "shared");
      byte.write = now;
    } else {
      if (byte.read.thread != now.thread) byte.other_read = byte.read;
      byte.read = now;
    }
  }
}

inline void note(Site& site, uintptr_t address, int bytes, uintptr_t shift = 0) {
  size_t warp = size_t(self().rank / warp_size);
  site.turns.resize(machine.threads.size());
  site.requests.resize(machine.warps.size());
  unsigned turn = site.turns[size_t(self().rank)]++;
  std::vector<Request>& requests = site.requests[warp];
  if (requests.size() <= turn) requests.resize(turn + 1);
  requests[turn].lanes |= 1u << lane();
  requests[turn].address[lane()] = address - shift;
  requests[turn].bytes[lane()] = bytes;
  check_races(site, address, bytes);
}

inline bool in_shared(uintptr_t address) {
  return watch.statics.has(address) || watch.dynamic.has(address);
}

inline void out_of_bounds(const std::string& place, bool write) {
  fail(std::string(write ? "write" : "read") + " out of bounds at " + place +
       ": outside of shared memory and of every array that the kernel was given");
}

inline const Range* find_array(uintptr_t address, int bytes) {
  for (const Range& array : watch.arrays)
    if (array.has(address) && array.has(address + bytes - 1)) return &array;
  return nullptr;
}

inline void look_at(uintptr_t address, int bytes, bool write, uintptr_t pc) {
  bool shared = in_shared(address);
  if (!shared && (watch.stacks.has(address) || watch.threads.has(address))) return;
  const Range* array = shared ? nullptr : find_array(address, bytes);
  if (shared || array) {
    Site& site = watch.sites[pc];
    if (site.place.empty()) {
      site.place = "{" + std::to_string(pc - watch.library.begin) + "}";  // Python finds the line
      site.shared = shared;
      site.write = write;
    }
    note(site, address, bytes, array ? array->shift : 0);
  } else if (!watch.library.has(address)) {
    out_of_bounds("{" + std::to_string(pc - watch.library.begin) + "}", write);
  }
}

// What the compiler calls. Its own accesses are not watched, or it would call itself.
UNWATCHED inline void watch_access(void* address, int bytes, bool write, void* return_address) {
  if (!machine.inside || machine.running->quiet) return;
  ++machine.running->quiet;
  look_at(reinterpret_cast<uintptr_t>(address), bytes, write,
          reinterpret_cast<uintptr_t>(return_address) - 1);
  --machine.running->quiet;
}

inline Site& named_site(Here here, bool shared, bool write) {
  Site& site = watch.named[{here.file, here.line * 4 + shared * 2 + write}];
  site.place = here.text();
  site.shared = shared;
  site.write = write;
  return site;
}

// It may write as soon as it is issued ...
inline void watch_issue(const Copy& copy) {
  auto to = reinterpret_cast<uintptr_t>(copy.to);
  if (!in_shared(to) || !in_shared(to + copy.bytes - 1)) out_of_bounds(copy.here.text(), true);
  check_races(named_site(copy.here, true, true), to, copy.bytes);
}

// ... and as late as it is waited for.
inline void watch_copy(const Copy& copy) {
  auto from = reinterpret_cast<uintptr_t>(copy.from), to = reinterpret_cast<uintptr_t>(copy.to);
  if (copy.valid) {
    const Range* array = find_array(from, copy.valid);
    if (!array) out_of_bounds(copy.here.text(), false);
    note(named_site(copy.here, false, false), from, copy.valid, array->shift);
  }
  note(named_site(copy.here, true, true), to, copy.bytes);
}

inline void watch_matrix_row(const void* row, Here here) {
  auto address = reinterpret_cast<uintptr_t>(row);
  if (!in_shared(address) || !in_shared(address + 15)) out_of_bounds(here.text(), false);
  note(named_site(here, true, false), address, 16);
}

inline void watch_barrier(const char* what, Here here) {
  flush(std::string(what) + "\t" + here.text());
  ++watch.interval;
}
inline void watch_warp_barrier(int warp) { ++watch.warp_intervals[size_t(warp)]; }

inline void watch_block() {
  watch.statics = range(__start_shared_memory, __stop_shared_memory);
  watch.dynamic = range(machine.dynamic, machine.dynamic + machine.dynamic_bytes);
  watch.stacks = range(machine.stacks, machine.stacks + machine.threads.size() * stack_bytes);
  watch.threads = range(machine.threads.data(), machine.threads.data() + machine.threads.size());
  watch.bytes.assign(watch.statics.end - watch.statics.begin + machine.dynamic_bytes, Byte());
  watch.warp_intervals.assign(machine.warps.size(), 0);
  ++watch.interval;
  ++watch.block;
}

CUDA_ON_CPU_EXPORT inline __attribute__((used)) void cuda_on_cpu_watch_arrays(
    int count, const uint64_t* begins, const uint64_t* ends, const uint64_t* origins) {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&cuda_on_cpu_watch_arrays), &info);
  watch = Watch();
  watch.library = range(info.dli_fbase, _end);
  for (int i = 0; i < count; ++i) watch.arrays.push_back({begins[i], ends[i], origins[i] % 32});
}

// What was counted, as lines: "phase" end, and under it (and at last, under "all") kind place
// requests parts least; columns are separated by tabs.
CUDA_ON_CPU_EXPORT inline __attribute__((used)) const char* cuda_on_cpu_report() {
  std::string& text = watch.report;
  text.clear();
  auto add = [&](const std::string& what, const Count& count) {
    text += what + "\t" + std::to_string(count.requests) + "\t" + std::to_string(count.parts) +
            "\t" + std::to_string(count.least) + "\n";
  };
  for (const Phase& phase : watch.phases) {
    text += "phase\t" + phase.end + "\n";
    for (auto& [what, count] : phase.counts) add(what, count);
  }
  text += "all\n";
  for (auto& [address, site] : watch.sites) add(kind(site) + "\t" + site.place, site.count);
  for (auto& [line, site] : watch.named) add(kind(site) + "\t" + site.place, site.count);
  return text.c_str();
}

}  // namespace cuda_on_cpu

#define WATCHED(kind, size, write)                                                \
  UNWATCHED void __tsan_##kind##size(void* address) {                             \
    cuda_on_cpu::watch_access(address, size, write, __builtin_return_address(0)); \
  }
#define WATCHED_SIZES(kind, write) \
  WATCHED(kind, 1, write)          \
  WATCHED(kind, 2, write)          \
  WATCHED(kind, 4, write)          \
  WATCHED(kind, 8, write)          \
  WATCHED(kind, 16, write)
extern "C" {
WATCHED_SIZES(read, false)
WATCHED_SIZES(write, true)
WATCHED_SIZES(unaligned_read, false)
WATCHED_SIZES(unaligned_write, true)
UNWATCHED void __tsan_read_range(void* address, long bytes) {
  cuda_on_cpu::watch_access(address, int(bytes), false, __builtin_return_address(0));
}
UNWATCHED void __tsan_write_range(void* address, long bytes) {
  cuda_on_cpu::watch_access(address, int(bytes), true, __builtin_return_address(0));
}
UNWATCHED void __tsan_vptr_update(void*, void*) {}
UNWATCHED void __tsan_func_entry(void*) {}
UNWATCHED void __tsan_func_exit(void*) {}
UNWATCHED void __tsan_init() {}
}
