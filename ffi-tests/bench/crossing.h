// Time for the crossing programs: nanoseconds a call, the median and the fastest of many rounds.
#ifndef CROSSING_H
#define CROSSING_H

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { CROSSING_ROUNDS = 301 };

static inline double crossing_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static inline int crossing_order(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Prints `name`, the median and the fastest of `rounds`, each the time of `calls` calls.
static inline void crossing_print(const char *name, double *rounds, unsigned calls) {
    qsort(rounds, CROSSING_ROUNDS, sizeof *rounds, crossing_order);
    printf("%s %.3f %.3f\n", name, rounds[CROSSING_ROUNDS / 2] / calls, rounds[0] / calls);
}

// Times `calls` evaluations of `call` in each round.
#define CROSSING(name, calls, call)                                  \
    do {                                                             \
        double rounds[CROSSING_ROUNDS];                              \
        for (int round = 0; round < CROSSING_ROUNDS; round++) {      \
            const double start = crossing_now();                     \
            for (unsigned i = 0; i < (calls); i++) {                 \
                if (!(call)) exit(3);                                \
            }                                                        \
            rounds[round] = crossing_now() - start;                  \
        }                                                            \
        crossing_print(name, rounds, calls);                         \
    } while (0)

#endif  // CROSSING_H
