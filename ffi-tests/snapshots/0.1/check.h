// What the test programs share: checks that say where they failed, and a source of numbers.
//
// CHECK(condition), OK(call), FAILS(code, "part of the text", call). A program ends with
// `return check_result();`: 0 when every check held.
#ifndef CHECK_H
#define CHECK_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "kvcache.h"

static int check_failures = 0;

static inline void check_fail(const char *file, int line, const char *what, const char *more) {
    fprintf(stderr, "%s:%d: %s %s\n", file, line, what, more);
    check_failures += 1;
}

static inline void check_status(const char *file, int line, const char *call, kvc_status got,
                                kvc_status expected, const char *part) {
    char text[256];
    char more[600];
    kvc_last_error(text, sizeof text);
    if (got != expected) {
        snprintf(more, sizeof more, "gave %d, not %d (%s)", (int)got, (int)expected, text);
        check_fail(file, line, call, more);
    } else if (got != KVC_OK && strstr(text, part) == NULL) {
        snprintf(more, sizeof more, "said \"%s\", which lacks \"%s\"", text, part);
        check_fail(file, line, call, more);
    }
}

static inline int check_result(void) {
    if (check_failures != 0) {
        fprintf(stderr, "%d checks failed\n", check_failures);
    }
    return check_failures != 0;
}

#define CHECK(condition) ((condition) ? (void)0 : check_fail(__FILE__, __LINE__, #condition, "is false"))
#define OK(call) check_status(__FILE__, __LINE__, #call, (call), KVC_OK, "")
#define FAILS(code, part, call) check_status(__FILE__, __LINE__, #call, (call), (code), (part))

// A number in -1 to 1 that depends on nothing but `i`, and is the same everywhere.
static inline float check_noise(uint32_t i) {
    uint32_t x = i * 2654435761u + 12345u;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    return (float)(x >> 8) / 8388608.0f - 1.0f;
}

// NaN fails too.
static inline int check_close(float got, float expected, float tolerance) {
    return fabsf(got - expected) <= tolerance;
}

#endif  // CHECK_H
