// The thread pool of pool.h.
#include "pool.h"

#include <cstdlib>
#include <new>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

namespace opsin {

namespace {

constexpr int kSpins = 3000;  // 50-150 microseconds, by the machine's pause
constexpr uint32_t kOpen = 0x80000000u;

constexpr int64_t kPage = 4096, kHuge = 2 << 20;

thread_local Pool* aside = nullptr;  // what the thread was lent

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void sleep_on(std::atomic<uint32_t>* word, uint32_t seen) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr,
          0);
#else
  (void)word;
  (void)seen;
  usleep(50);
#endif
}

void wake(std::atomic<uint32_t>* word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr,
          nullptr, 0);
#else
  (void)word;
#endif
}

}  // namespace

void Word::bump() {
  value.fetch_add(1);
  if (sleepers.load() > 0) wake(&value);
}

void Word::wait(uint32_t seen) {
  for (int i = 0; i < kSpins; i++) {
    if (value.load(std::memory_order_acquire) != seen) return;
    relax();
  }
  sleepers.fetch_add(1);
  if (value.load() == seen) sleep_on(&value, seen);
  sleepers.fetch_sub(1);
}

int Team::size() const { return pool_->team_; }

Phase& Team::take() {
  if (index_ >= pool_->used_) std::abort();  // more phases than the region announced
  return pool_->phases_[index_++];
}

void Team::finished() { pool_->progress_.bump(); }

void Team::await(const Phase& p, int chunks) {
  for (;;) {
    const uint32_t seen = pool_->progress_.value.load();
    if (p.done.load(std::memory_order_acquire) >= chunks) return;
    pool_->progress_.wait(seen);
  }
}

Pool& Pool::main() {
  static Pool* pool = new Pool();  // never destroyed: threads may outlive static destructors
  return *pool;
}

Pool& Pool::instance() { return aside ? *aside : main(); }

bool Pool::lend(int threads) {
  Pool& all = main();
  if (threads == 0) {
    if (aside) {
      aside = nullptr;
      all.lent_.store(0);
      all.epoch_.bump();  // or they would sleep until the next region
    }
    return true;
  }
  {
    std::lock_guard<std::mutex> lock(all.region_);
    all.after_fork();
    int none = 0;
    if (threads >= all.size_ || !all.lent_.compare_exchange_strong(none, threads)) return false;
  }
  static Pool* second = new Pool();
  second->resize(threads);
  aside = second;
  return true;
}

void Pool::resize(int threads) {
  std::lock_guard<std::mutex> lock(region_);
  after_fork();
  if (threads < 1) threads = 1;
  if (threads == size_ && static_cast<int>(threads_.size()) == threads - 1) return;
  stop();
  size_ = threads;
  if (static_cast<int>(buffers_.size()) < threads + 1) buffers_.resize(threads + 1);
  quit_.store(false);
  pid_ = getpid();
  const uint32_t seen = epoch_.value.load();
  for (int i = 1; i < threads; i++) threads_.emplace_back([this, i, seen] { serve(i, seen); });
}

void Pool::stop() {
  quit_.store(true);
  epoch_.bump();
  for (auto& t : threads_) t.join();
  threads_.clear();
}

// A child process inherits the pool without its threads: forget them and start anew.
void Pool::after_fork() {
  if (pid_ == 0 || pid_ == getpid()) return;
  for (auto& t : threads_) new (&t) std::thread();
  threads_.clear();
  gate_.store(0);
  epoch_.sleepers.store(0);
  progress_.sleepers.store(0);
  left_.sleepers.store(0);
  lent_.store(0);
  pid_ = getpid();
  const uint32_t seen = epoch_.value.load();
  for (int i = 1; i < size_; i++) threads_.emplace_back([this, i, seen] { serve(i, seen); });
}

void Pool::serve(int thread, uint32_t seen) {
  for (;;) {
    epoch_.wait(seen);
    if (quit_.load()) return;
    const uint32_t now = epoch_.value.load();
    if (now == seen) continue;
    seen = now;
    if (thread >= size()) continue;  // it is lent
    uint32_t gate = gate_.load();
    bool inside = false;
    while ((gate & kOpen) && !inside) inside = gate_.compare_exchange_weak(gate, gate + 1);
    if (!inside) continue;  // the region was over before this thread woke
    Team team(this, thread);
    entry_(work_, team);
    gate_.fetch_sub(1);
    left_.bump();
  }
}

void Pool::launch(int phases, Entry entry, void* work) {
  after_fork();
  if (phases > capacity_) {
    capacity_ = phases + 64;
    phases_.reset(new Phase[capacity_]);
  } else {
    const int stale = used_ < capacity_ ? used_ : capacity_;
    for (int i = 0; i < stale; i++) {
      phases_[i].next.store(0, std::memory_order_relaxed);
      phases_[i].done.store(0, std::memory_order_relaxed);
    }
  }
  used_ = phases;
  team_ = size();
  entry_ = entry;
  work_ = work;
  Team team(this, 0);
  if (threads_.empty()) {
    entry(work, team);
    return;
  }
  gate_.store(kOpen);
  epoch_.bump();
  entry(work, team);
  gate_.fetch_and(~kOpen);
  for (;;) {
    const uint32_t seen = left_.value.load();
    if (gate_.load() == 0) break;
    left_.wait(seen);
  }
}

uint8_t* Pool::scratch(int thread, int64_t bytes) {
  if (buffers_.empty()) buffers_.resize(static_cast<size_t>(size_) + 1);
  Buffer& b = buffers_[static_cast<size_t>(thread + 1)];
  if (b.bytes < bytes) {
    std::free(b.data);
    // Many rows that all threads read would take more pages than the machine remembers.
    const int64_t page = thread >= 0 || bytes < kHuge ? kPage : kHuge;
#if defined(__SANITIZE_ADDRESS__)
    const int64_t rounded = bytes;  // room to spare would hide what is written past the end
#else
    const int64_t spare = page == kHuge ? 0 : bytes / 4;
    const int64_t rounded = (bytes + spare + page - 1) / page * page;
#endif
    void* data = nullptr;
    const bool failed = posix_memalign(&data, static_cast<size_t>(page),
                                       static_cast<size_t>(rounded)) != 0;
    b.data = failed ? nullptr : static_cast<uint8_t*>(data);
#if defined(MADV_HUGEPAGE)
    if (page == kHuge && !failed) madvise(b.data, static_cast<size_t>(rounded), MADV_HUGEPAGE);
#endif
    b.bytes = b.data ? rounded : 0;
    if (!b.data) std::abort();
  }
  return b.data;
}

}  // namespace opsin
