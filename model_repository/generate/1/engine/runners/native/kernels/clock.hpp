// Where a step's seconds go, from part to part; nothing where nobody asks.
#pragma once

#include <chrono>

// In the order of PARTS in runner.py.
enum Kind { kProducts, kAttention, kLogits, kOther };

class Clock {
  public:
    explicit Clock(double* spent = nullptr) : spent_(spent), last_(spent ? Time::now() : Time::time_point()) {}

    void lap(Kind kind) {
        if (!spent_) return;
        const auto now = Time::now();
        spent_[kind] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

  private:
    typedef std::chrono::steady_clock Time;
    double* spent_;
    Time::time_point last_;
};
