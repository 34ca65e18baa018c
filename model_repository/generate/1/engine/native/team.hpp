// A few threads that go through one step side by side, and wait for each other between its parts by spinning: the parts
// take microseconds, and waking a thread takes longer. Between steps they sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <sched.h>
#include <thread>
#include <vector>

// Work that members take from piece by piece: whoever loses his core for a while, to the processes around, leaves the
// rest to the others. Which of them does a piece changes nothing in it.
class Share {
  public:
    template <typename Task>
    void each(int count, Task task) {
        const int piece = std::max(1, count / kPieces);
        for (int first; (first = next_.fetch_add(piece, std::memory_order_relaxed)) < count;)
            for (int i = first; i < std::min(first + piece, count); i++) task(i);
    }

    void reset() { next_.store(0, std::memory_order_relaxed); }

  private:
    static constexpr int kPieces = 32;
    std::atomic<int> next_{0};
};

class Team {
  public:
    explicit Team(int size) : size_(size) {
        for (int member = 1; member < size; member++) threads_.emplace_back([this, member] { work(member); });
    }

    ~Team() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ended_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return size_; }

    // Every member does `task`, the caller among them; it returns when all are done.
    void run(const std::function<void(int)>& task) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            number_++;
        }
        wake_.notify_all();
        task(0);
        meet();
    }

    // Nobody goes on before all are here.
    void meet() {
        if (size_ == 1) return;
        unsigned round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
            // Whoever is waited for may have no core: where others compute too, spinning would keep it from one.
            if (spins < kSpins) __builtin_ia32_pause();
            else sched_yield();
        }
    }

  private:
    static constexpr int kSpins = 400;

    void work(int member) {
        unsigned done = 0;
        while (true) {
            const std::function<void(int)>* task;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return ended_ || number_ != done; });
                if (ended_) return;
                done = number_;
                task = task_;
            }
            (*task)(member);
            meet();
        }
    }

    const int size_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* task_ = nullptr;
    unsigned number_ = 0;
    bool ended_ = false;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> round_{0};
};
