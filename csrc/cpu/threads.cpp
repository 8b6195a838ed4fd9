// The thread pool: workers that spin for a moment and then sleep.
//
// Why not OpenMP: its team took 10 ms to wake for a product of 1.7 ms, it does not survive fork(),
// and ThreadSanitizer reports false races in it. Why spin at all: a training step calls a kernel
// every few hundred microseconds, and waking a sleeping thread costs tens of them. Why not longer:
// a spinning worker takes a core from whoever else computes (NumPy's BLAS, another rank).
//
// A loop is published as one atomic word, `state_` = epoch | open | joined:
//   the caller opens a new epoch; a worker joins it by counting itself in, and leaves by counting
//   itself out; the caller, having run out of indices, closes the epoch and waits for those who
//   joined. A worker that was not awake in time is never waited for.
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace minidl {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kSpins = 4000;  // about 50 microseconds of `pause`

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The core that this thread runs on; -1 where the system does not tell.
int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Where other programs keep all cores busy, the system wakes a worker on the core of its caller,
// and may leave both there, at half speed, for seconds: they sleep too often to be moved. So the
// worker moves itself, and is free to be moved again at once. (Measured on two cores beside a busy
// process of low priority: a product of 512 x 512 matrices at 172 GFLOP/s instead of 101.)
void leave_core([[maybe_unused]] int core) {
#if defined(__linux__)
  cpu_set_t all, others;
  if (core < 0 || sched_getcpu() != core || sched_getaffinity(0, sizeof all, &all)) return;
  others = all;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others)) {
    sched_setaffinity(0, sizeof all, &all);
  }
#endif
}

thread_local bool inside_loop = false;  // a loop inside a loop runs on the thread that meets it

struct Loop {
  Index n;
  void (*call)(void*, Index);
  void* object;
  int core = current_core();  // of the caller
  std::atomic<Index> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // written by the one thread that sets `failed`

  void work() noexcept {
    inside_loop = true;
    try {
      for (Index i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) call(object, i);
    } catch (...) {
      next.store(n, std::memory_order_relaxed);  // no further index is handed out
      if (!failed.exchange(true)) error = std::current_exception();
    }
    inside_loop = false;
  }
};

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) {
      try {
        workers_.emplace_back([this] { worker(); });
      } catch (const std::system_error&) {
        break;  // the system grants no more threads: work with those we have
      }
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stop_ = true;
      state_.fetch_add(kEpoch);  // so that spinning workers look up
    }
    wake_.notify_all();
    for (std::thread& t : workers_) t.join();
  }

  void run(Loop& loop) {
    loop_ = &loop;
    std::uint64_t epoch;
    {
      std::lock_guard<std::mutex> lock(sleep_);
      epoch = (state_.load(std::memory_order_relaxed) & ~(kEpoch - 1)) + kEpoch;
      state_.store(epoch | kOpen, std::memory_order_release);
    }
    wake_.notify_all();
    loop.work();
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int spins = 0; state_.load(std::memory_order_acquire) != epoch; ++spins) {
      spins < kSpins ? pause() : std::this_thread::yield();
    }
  }

 private:
  static constexpr std::uint64_t kOpen = 1 << 15;   // below: how many workers have joined
  static constexpr std::uint64_t kEpoch = 1 << 16;  // from here on: the epoch's number

  bool news(std::uint64_t state, std::uint64_t seen) const {
    return stop_ || ((state & kOpen) && (state & ~(kEpoch - 1)) != seen);
  }

  void worker() {
    std::uint64_t seen = 0;
    for (;;) {
      std::uint64_t state = state_.load(std::memory_order_acquire);
      for (int spins = 0; spins < kSpins && !news(state, seen); ++spins) {
        pause();
        state = state_.load(std::memory_order_acquire);
      }
      if (!news(state, seen)) {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock,
                   [&] { return news(state = state_.load(std::memory_order_acquire), seen); });
      }
      if (stop_) return;
      while ((state & kOpen) && !state_.compare_exchange_weak(state, state + 1)) {
      }
      if (!(state & kOpen)) continue;  // too late, the loop is over
      seen = state & ~(kEpoch - 1);
      leave_core(loop_->core);
      loop_->work();
      state_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  std::atomic<std::uint64_t> state_{0};
  Loop* loop_ = nullptr;  // belongs to the open epoch
  std::atomic<bool> stop_{false};
  std::mutex sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

// The pool and its lock live on the heap, and are never freed by a static destructor: at exit a
// daemon thread may still be inside a kernel.
struct Shared {
  std::mutex busy;              // held by the thread whose loop the pool is running
  std::atomic<int> threads{1};  // until minidl/backend/threads.py has counted the cores
  Pool* pool = nullptr;         // guarded by `busy`
};

std::atomic<Shared*> shared_state{nullptr};

Shared& shared() {
  Shared* s = shared_state.load(std::memory_order_acquire);
  if (s) return *s;
  auto* fresh = new Shared;
  if (shared_state.compare_exchange_strong(s, fresh)) return *fresh;
  delete fresh;  // another thread was first
  return *s;
}

#if defined(__unix__) || defined(__APPLE__)
// After fork() only the forking thread lives on in the child: its workers are gone, its locks may
// be held by nobody. Leave all of it behind and start afresh.
void forget_after_fork() {
  Shared* old = shared_state.load(std::memory_order_relaxed);
  if (!old) return;
  auto* fresh = new Shared;
  fresh->threads = old->threads.load();
  shared_state.store(fresh, std::memory_order_relaxed);
  inside_loop = false;
}
const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);
#endif

}  // namespace

int get_num_threads() { return shared().threads.load(); }

void set_num_threads(int n) {
  Shared& s = shared();
  std::lock_guard<std::mutex> lock(s.busy);
  n = n < kMaxThreads ? n : kMaxThreads;
  if (n == s.threads) return;
  delete s.pool;
  s.pool = nullptr;
  s.threads = n;
}

void stop_threads() {
  Shared& s = shared();
  std::lock_guard<std::mutex> lock(s.busy);
  delete s.pool;
  s.pool = nullptr;
}

void run_parallel(Index n, void (*call)(void*, Index), void* object) {
  Loop loop;
  loop.n = n;
  loop.call = call;
  loop.object = object;
  Shared& s = shared();
  // If the pool is running another thread's loop, this thread works alone: it has a core already,
  // and the results are the same.
  std::unique_lock<std::mutex> lock(s.busy, std::defer_lock);
  if (n > 1 && !inside_loop && s.threads > 1 && lock.try_lock()) {
    if (!s.pool) s.pool = new Pool(s.threads);
    s.pool->run(loop);
  } else {
    const bool outer = inside_loop;
    loop.work();
    inside_loop = outer;
  }
  if (loop.failed) std::rethrow_exception(loop.error);
}

}  // namespace minidl
