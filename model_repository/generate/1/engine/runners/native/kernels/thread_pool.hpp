// A thread pool for one step of a model: run(task) calls task(thread) on every thread. Within it, a WorkQueue hands out the
// items [0, count) of a stage, and acts as the barrier at the stage's end.
//
// Threads wait for a stage's end by spinning: stages take microseconds, and waking a thread takes longer. Between steps they
// sleep. The state of item i is states_[i / items_per_state], with at most 2048 states.
// ISA variants: none. Tests: tests/inference/test_native.py (one thread, several, and more threads than cores give the same
// bits). It knows no models.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <sched.h>
#include <thread>
#include <type_traits>
#include <vector>

// Spins, and then yields the core: the thread that is waited for may need it.
class SpinWait {
  public:
    void wait() {
        if (spins_++ < kSpins) __builtin_ia32_pause();
        else sched_yield();
    }

  private:
    // Ten to twenty microseconds of `pause`: about a short stage.
    static constexpr int kSpins = 400;
    int spins_ = 0;
};

// An item's result: not published (kFirst: the first one of a batch), being published by one thread, or published.
typedef std::atomic<uint8_t> ItemState;
enum : uint8_t { kPending, kFirst, kPublishing, kDone };

// The right to publish an item's result. Several threads may compute the same item; the first to acquire it publishes.
class Claim {
  public:
    explicit Claim(ItemState& state) : state_(state) {}

    // Whether this thread publishes. Call it before the first write that other threads see.
    bool acquire() {
        uint8_t state = state_.load(std::memory_order_relaxed);
        while (!attempted_ && !acquired_ && state <= kFirst)
            acquired_ = state_.compare_exchange_weak(state, kPublishing, std::memory_order_acq_rel);
        attempted_ = true;
        return acquired_;
    }

    bool lost() const { return attempted_ && !acquired_; }

    void finish() {
        if (acquire()) state_.store(kDone, std::memory_order_release);
    }

  private:
    ItemState& state_;
    bool attempted_ = false, acquired_ = false;
};

// A reference to a callable, which outlives it. What takes one is compiled once, not for each callable.
template <typename... Arguments>
class TaskRef {
  public:
    template <typename Task, typename = std::enable_if_t<!std::is_same_v<Task, TaskRef>>>
    TaskRef(const Task& task)
        : task_(&task), call_([](const void* from, Arguments... arguments) { (*static_cast<const Task*>(from))(arguments...); }) {}

    void operator()(Arguments... arguments) const { call_(task_, arguments...); }

  private:
    const void* task_;
    void (*call_)(const void*, Arguments...);
};

// The work items of a stage. A thread takes a batch of neighbouring items at a time: what a matmul prefetches at an item's end
// is what the thread needs next. Batches become smaller towards the end, so that the load is balanced, and that a thread which
// loses its core to another process leaves the rest to the others. An item's result does not depend on the thread that
// computes it.
class WorkQueue {
  public:
    // Calls `task(item)` for each item. Returns when all items are done, by any thread.
    template <typename Task>
    void for_each(int count, Task task) {
        process(count, false, [&](int first, int end, Claim&) {
            for (int item = first; item < end; item++) task(item);
        });
    }

    // The same with `task(item, claim)`, and a thread without work repeats the items of a slow one: those that it has taken
    // and not begun, and after a while those that it has begun. A task reads only what no other task of the stage writes,
    // and writes to shared memory only after claim.acquire(). A task that is overtaken may read memory that a later stage
    // has overwritten; its result is discarded.
    template <typename Task>
    void for_each_redundant(int count, Task task) {
        process(count, true, [&](int first, int end, Claim& claim) {
            for (int item = first; item < end && !claim.lost(); item++) task(item, claim);
        });
    }

    // Between steps, when no thread is inside; for this many threads.
    void reset(int threads) {
        batches_ = kBatchesPerThread * threads;
        next_.store(0, std::memory_order_relaxed);
        complete_.store(false, std::memory_order_relaxed);
        for (int n = 0; n < used_.load(std::memory_order_relaxed); n++) states_[n].store(kPending, std::memory_order_relaxed);
    }

  private:
    typedef std::chrono::steady_clock Time;
    typedef Time::time_point Moment;
    // A batch is half of a thread's part of the items that are left. Where no other thread repeats a slow one's items, batches
    // are small.
    static constexpr int kBatchesPerThread = 2, kBatches = 32, kStates = 2048;
    // Added to the time after which a begun item is repeated, so that very short items are not.
    static constexpr std::chrono::microseconds kGrace{20};

    // Calls `task(first item, last item + 1, claim)` for the items of each state.
    void process(int count, bool redundant, TaskRef<int, int, Claim&> task) {
        if (complete_.load(std::memory_order_acquire)) return;
        // With more items than states, neighbouring items share a state.
        const int items_per_state = count / kStates + 1, states = (count + items_per_state - 1) / items_per_state;
        const auto execute = [&](int n) {
            Claim claim(states_[n]);
            task(n * items_per_state, std::min((n + 1) * items_per_state, count), claim);
            claim.finish();
        };
        used_.store(states, std::memory_order_relaxed);
        const auto is_pending = [&](int n) { return states_[n].load(std::memory_order_relaxed) <= kFirst; };
        const Moment start = Time::now();
        int executed = 0;
        for (int first, size; (size = take(states, redundant ? batches_ : kBatches, first)) > 0;)
            for (int n = first; n < first + size; n++)
                if (!redundant || is_pending(n)) execute(n), executed++;
        // What is pending now belongs to other threads, which take their batches from the front: it is taken from the back.
        // An item whose predecessor in the batch is pending is not begun. Repeating a begun one would slow its thread down
        // where both share a core, so that waits until it has taken more than twice this thread's mean time.
        const Moment end = Time::now(), deadline = end + 2 * (end - start) / std::max(1, executed) + kGrace;
        SpinWait spin;
        for (int n = states - 1; n >= 0;) {
            if (states_[n].load(std::memory_order_acquire) == kDone) n--;
            else if (redundant && is_pending(n) && (!is_begun(n) || Time::now() > deadline)) execute(n);
            else spin.wait();
        }
        complete_.store(true, std::memory_order_release);
    }

    // Whether the thread that has taken a pending item may have begun it: its batch's item before it is done.
    bool is_begun(int n) const {
        const auto state = [&](int i) { return states_[i].load(std::memory_order_relaxed); };
        return n == 0 || state(n) == kFirst || state(n - 1) > kFirst;
    }

    // Takes a batch of the `states` items: one of `batches` equal parts of those that are left. Returns its size, 0 if none is.
    int take(int states, int batches, int& first) {
        int size;
        first = next_.load(std::memory_order_relaxed);
        do {
            if (first >= states) return 0;
            size = std::max(1, (states - first) / batches);
        } while (!next_.compare_exchange_weak(first, first + size, std::memory_order_relaxed));
        uint8_t pending = kPending;
        states_[first].compare_exchange_strong(pending, kFirst, std::memory_order_relaxed);
        return size;
    }

    std::atomic<int> next_{0}, used_{0};
    std::atomic<bool> complete_{false};
    int batches_ = kBatches;
    ItemState states_[kStates] = {};
};

class ThreadPool {
  public:
    explicit ThreadPool(int size) : size_(size) {
        for (int thread = 1; thread < size; thread++) threads_.emplace_back([this, thread] { work(thread); });
    }

    ~ThreadPool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closed_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return size_; }

    // Calls `task(thread)` on each thread; the caller is thread 0. Returns when all have returned.
    void run(TaskRef<int> task) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            generation_++;
        }
        wake_.notify_all();
        task(0);
        barrier();
    }

  private:
    void barrier() {
        if (size_ == 1) return;
        unsigned round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (SpinWait spin; round_.load(std::memory_order_acquire) == round;) spin.wait();
    }

    void work(int thread) {
        unsigned done = 0;
        while (true) {
            const TaskRef<int>* task;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return closed_ || generation_ != done; });
                if (closed_) return;
                done = generation_;
                task = task_;
            }
            (*task)(thread);
            barrier();
        }
    }

    const int size_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const TaskRef<int>* task_ = nullptr;
    unsigned generation_ = 0;
    bool closed_ = false;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> round_{0};
};
