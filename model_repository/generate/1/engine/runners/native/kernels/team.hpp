// A few threads that go through one step side by side. A part of it begins when all pieces of the part before are done,
// whoever did them; until then they wait by spinning: parts take microseconds, and waking a thread takes longer. Between
// steps they sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <sched.h>
#include <thread>
#include <vector>

// Waiting in a loop for somebody who may have no core: where others compute too, spinning would keep it from one.
class Patience {
  public:
    void wait() {
        if (turns_++ < kSpins) __builtin_ia32_pause();
        else sched_yield();
    }

  private:
    static constexpr int kSpins = 400;
    int turns_ = 0;
};

// Of a few pieces: whether nobody has handed them over yet, somebody does it now, or it is done.
typedef std::atomic<uint8_t> State;
enum : uint8_t { kOpen, kTaken, kDone };

// The right to hand over what has been computed, which one of those who may have computed the same gets.
class Claim {
  public:
    explicit Claim(State& state) : state_(state) {}

    // Before the first number is written where others see it.
    bool mine() {
        uint8_t open = kOpen;
        if (!asked_) mine_ = state_.compare_exchange_strong(open, kTaken, std::memory_order_acq_rel);
        asked_ = true;
        return mine_;
    }

    bool lost() const { return asked_ && !mine_; }

    void end() {
        if (mine()) state_.store(kDone, std::memory_order_release);
    }

  private:
    State& state_;
    bool asked_ = false, mine_ = false;
};

// A part's work, which members take from piece by piece: whoever loses his core for a while, to the processes around,
// leaves the rest to the others. Which of them does a piece changes nothing in it.
class Share {
  public:
    // Returns when all is done, by whomever: `task(piece)`.
    template <typename Task>
    void each(int count, Task task) {
        finish<false>(count, [&](int piece, Claim&) { task(piece); });
    }

    // The same with `task(piece, claim)`. Whoever finds nothing left helps another one with what he took, and does once more what that one has begun and takes
    // too long for, as he is kept from it: `task` computes from what nobody changes during a part, for itself alone, and
    // writes only where its claim lets it. One that comes too late computes from whatever is there by then, and nobody gets
    // to see it.
    template <typename Task>
    void race(int count, Task task) { finish<true>(count, task); }

    // Between steps: nobody is within.
    void reset() {
        next_.store(0, std::memory_order_relaxed);
        complete_.store(false, std::memory_order_relaxed);
        for (int n = 0; n < used_.load(std::memory_order_relaxed); n++) states_[n].store(kOpen, std::memory_order_relaxed);
    }

  private:
    typedef std::chrono::steady_clock Time;
    typedef Time::time_point Moment;
    static constexpr int kTakes = 32, kStates = 2048;
    static constexpr std::chrono::microseconds kPause{20};

    template <bool kRace, typename Task>
    void finish(int count, Task task) {
        if (complete_.load(std::memory_order_acquire)) return;
        // So many pieces share a state where they are very many.
        const int together = count / kStates + 1, states = (count + together - 1) / together;
        const auto go = [&](int n) {
            Claim claim(states_[n]);
            for (int i = n * together; i < std::min((n + 1) * together, count) && !claim.lost(); i++) task(i, claim);
            claim.end();
        };
        used_.store(states, std::memory_order_relaxed);
        const int take = std::max(1, states / kTakes);
        const auto is_open = [&](int n) { return states_[n].load(std::memory_order_relaxed) == kOpen; };
        const Moment begun = Time::now();
        int did = 0;
        for (int first; (first = next_.fetch_add(take, std::memory_order_relaxed)) < states;)
            for (int n = first; n < std::min(first + take, states); n++)
                if (!kRace || is_open(n)) go(n), did++;
        // What is open now another one has begun, or will: he comes from the beginning of what he took. To do what he is
        // busy with would slow him down, where both share a core's means; who is kept from it takes longer than we did.
        const Moment ended = Time::now(), late = ended + 2 * (ended - begun) / std::max(1, did) + kPause;
        Patience patience;
        for (int n = states - 1; n >= 0;) {
            if (states_[n].load(std::memory_order_acquire) == kDone) n--;
            else if (kRace && is_open(n) && ((n % take && is_open(n - 1)) || Time::now() > late)) go(n);
            else patience.wait();
        }
        complete_.store(true, std::memory_order_release);
    }

    std::atomic<int> next_{0}, used_{0};
    std::atomic<bool> complete_{false};
    State states_[kStates] = {};
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

  private:
    // Nobody goes on before all are here.
    void meet() {
        if (size_ == 1) return;
        unsigned round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (Patience patience; round_.load(std::memory_order_acquire) == round;) patience.wait();
    }

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
