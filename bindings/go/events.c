//go:build cgo

// The callback that C knows, and the number that finds the Go function again: a Go function has no
// address for C, and a struct of Go's must not hold a number as a pointer.

#include <kvcache.h>

extern void kvcacheGoEvent(uintptr_t user, kvc_event *event);

static void on_event(void *user, const kvc_event *event) {
    kvcacheGoEvent((uintptr_t)user, (kvc_event *)event);
}

kvc_status kvcache_go_events_create(kvc_cache *cache, const kvc_events_options *options,
                                    uintptr_t user, kvc_events **out) {
    kvc_events_options own = *options;
    if (user != 0) {
        own.callback = on_event;
        own.user = (void *)user;
    }
    return kvc_events_create(cache, &own, out);
}
