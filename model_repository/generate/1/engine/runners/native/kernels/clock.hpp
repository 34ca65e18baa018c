// Seconds of a step by kind of stage: seconds[kind] += time since the last stage's end. Without an array it measures nothing.
// ISA variants: none. Read by NativeRunner.time_stages and printed by `scripts/bench engine --profile`.
#pragma once

#include <chrono>

// In the order of STAGES in runner.py.
enum Stage { kMatmul, kAttention, kLogits, kOther };

class Clock {
  public:
    explicit Clock(double* seconds = nullptr) : seconds_(seconds), last_(seconds ? Time::now() : Time::time_point()) {}

    void lap(Stage stage) {
        if (!seconds_) return;
        const auto now = Time::now();
        seconds_[stage] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

  private:
    typedef std::chrono::steady_clock Time;
    double* seconds_;
    Time::time_point last_;
};
