// Threads that share phases of numbered chunks, spin briefly and then sleep.
//
// A phase ends when its chunks are done, not when every thread has come by: a thread that the
// system runs late joins wherever the others are, so two processes on one machine slow each other
// down no more than they must.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace opsin {

// A number that threads wait on.
struct Word {
  std::atomic<uint32_t> value{0};
  std::atomic<int> sleepers{0};
  void bump();                // add one and wake whoever sleeps
  void wait(uint32_t seen);   // until it is no longer `seen`: spin, then sleep (may wake early)
};

struct alignas(64) Phase {
  std::atomic<int> next{0};
  std::atomic<int> done{0};
};

class Pool;

// One thread's view of a running region. Every thread passes the same phases in the same order.
class Team {
 public:
  Team(Pool* pool, int thread) : pool_(pool), thread_(thread) {}
  int thread() const { return thread_; }
  int size() const;

  // Runs work(chunk) for chunks not yet taken, then idle(), and waits until all of them are done.
  template <class Work, class Idle>
  void phase(int chunks, Work&& work, Idle&& idle) {
    Phase& p = take();
    if (chunks <= 0) return;
    for (;;) {
      const int chunk = p.next.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks) break;
      work(chunk);
      if (p.done.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) finished();
    }
    idle();
    if (p.done.load(std::memory_order_acquire) < chunks) await(p, chunks);
  }
  template <class Work>
  void phase(int chunks, Work&& work) {
    phase(chunks, work, [] {});
  }

 private:
  Phase& take();
  void finished();
  void await(const Phase& p, int chunks);
  Pool* pool_;
  int thread_;
  int index_ = 0;
};

class Pool {
 public:
  static Pool& main();
  static Pool& instance();  // the calling thread's: the main one, or the one aside
  void resize(int threads);
  // Threads of a region that is launched now: all that are not lent.
  int size() const { return std::max(1, size_ - lent_.load()); }

  // Lends `threads` of the main pool's to the calling thread: its regions run in a pool of their
  // own, beside those that the main one launches from now on with the rest. 0 gives them back, to
  // the region that runs too. False if the main pool has no more than that, or has lent some.
  static bool lend(int threads);

  // Runs work(team) on up to size() threads; at most `phases` phases. One region at a time.
  template <class Work>
  void run(int phases, Work&& work) {
    using Plain = std::remove_reference_t<Work>;
    launch(phases, [](void* w, Team& team) { (*static_cast<Plain*>(w))(team); },
           const_cast<void*>(static_cast<const void*>(&work)));
  }

  // Scratch memory of one thread or shared (thread -1), at least `bytes`, aligned to 64.
  uint8_t* scratch(int thread, int64_t bytes);
  std::mutex& region() { return region_; }

 private:
  friend class Team;
  using Entry = void (*)(void*, Team&);
  void launch(int phases, Entry entry, void* work);
  void serve(int thread, uint32_t seen);
  void stop();
  void after_fork();

  std::mutex region_;
  int size_ = 1;
  int team_ = 1;  // threads that the running region cuts its work for
  std::atomic<int> lent_{0};
  int64_t pid_ = 0;
  std::vector<std::thread> threads_;
  std::unique_ptr<Phase[]> phases_;
  int capacity_ = 0, used_ = 0;
  Word epoch_, progress_, left_;
  std::atomic<uint32_t> gate_{0};  // top bit: open; below: threads inside
  std::atomic<bool> quit_{false};
  Entry entry_ = nullptr;
  void* work_ = nullptr;
  struct Buffer {
    uint8_t* data = nullptr;
    int64_t bytes = 0;
  };
  std::vector<Buffer> buffers_;
};

// Chunk count for `items` equal pieces: a few for each thread, so that a slow thread costs little.
inline int chunks_for(int items, int threads, int least) {
  const int wanted = threads == 1 ? 1 : threads * 6;
  const int most = (items + least - 1) / least;
  return most < wanted ? most : wanted;
}

// Where chunk c begins of items that stay together by `unit`; it ends where chunk c + 1 begins.
inline int chunk_start(int items, int unit, int c, int chunks) {
  const int64_t units = (items + unit - 1) / unit;
  const int64_t at = units * c / chunks * unit;
  return at < items ? static_cast<int>(at) : items;
}

}  // namespace opsin
