// libkvcache: the KV cache of a language model as a library. C ABI 0.1.
//
// Generated from src/capi by `cargo check --features generate-header`; do not edit.
//
// Conventions
//   Names    kvc_<noun>_<verb>. Types of the library end where their noun ends: kvc_pool.
//   Status   Every call that can fail returns kvc_status: KVC_OK (0) or a negative code.
//            kvc_last_error() gives the text. Bad input changes nothing.
//   Outputs  come last and are written only on success, unless a function says otherwise.
//   Handles  kvc_pool*, kvc_prefix*, kvc_cache*, kvc_step* are checked numbers: a NULL, stale or
//            foreign handle is answered with a code. A process has 4096. Each _create has its
//            _destroy, which accepts NULL.
//   Structs  that begin with struct_size only ever grow: call the _init function with the sizeof
//            of the struct, then set fields. Fields past an older caller's size have their
//            defaults; bytes past those the library knows must be 0.
//   Threads  thread-safe: any thread at any time. per-handle: one call at a time on a handle (two
//            at once: KVC_ERR_INVALID_STATE). init-only: before other threads use the library.
//   Memory   Pointers are used during the call only. The caller owns what it passes, the library
//            what a handle names. Nothing is allocated for the caller to free.
//   Units    are in the names: bytes, tokens, blocks, elements. Strides are in elements.
#ifndef KVCACHE_H
#define KVCACHE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// ----------------------------------------------------------------------------------------------
// Status codes and the text of the last error
// ----------------------------------------------------------------------------------------------
// What a call answers: KVC_OK, or a negative code. Numbers are never reused.
typedef int32_t kvc_status;

// The call did what it says.
#define KVC_OK 0

// An argument has a value that the function does not accept.
#define KVC_ERR_INVALID_ARGUMENT -1

// A required pointer is NULL.
#define KVC_ERR_NULL_POINTER -2

// A pointer is not aligned for its element type.
#define KVC_ERR_MISALIGNED -3

// struct_size is too small, or bytes past the known fields are not zero.
#define KVC_ERR_STRUCT_SIZE -4

// A size or an address does not fit.
#define KVC_ERR_OVERFLOW -5

// Valid, but this build cannot do it.
#define KVC_ERR_UNSUPPORTED -6

// A handle or sequence id is not live, or belongs to another object.
#define KVC_ERR_STALE_HANDLE -7

// A buffer that the caller gave is smaller than the call needs.
#define KVC_ERR_BUFFER_TOO_SMALL -8

// A block id is outside the pool, or the block is not allocated.
#define KVC_ERR_BAD_BLOCK -9

// Not enough free or evictable blocks; nothing was taken. An ordinary answer.
#define KVC_ERR_OUT_OF_BLOCKS -100

// Every sequence slot is in use.
#define KVC_ERR_OUT_OF_SEQUENCES -101

// The system refused memory.
#define KVC_ERR_OUT_OF_MEMORY -102

// Every handle slot of the process is in use.
#define KVC_ERR_TOO_MANY_HANDLES -103

// The library was built without kernels for this device.
#define KVC_ERR_NO_KERNELS -200

// The device is not present.
#define KVC_ERR_NO_DEVICE -201

// The object is not in a state in which the call is allowed, or another call is using it.
#define KVC_ERR_INVALID_STATE -300

// The library panicked; the object involved is poisoned.
#define KVC_ERR_PANIC -900

// An earlier panic left the object unusable; only destroying it is allowed.
#define KVC_ERR_POISONED -901

// Copies a short English text of `status` as snprintf would, and returns the length of the whole
// text in bytes, the NUL not counted. `buf` may be NULL with a `len` of 0.
//
// Threads: thread-safe.
uint64_t kvc_status_text(kvc_status status, char *buf, uint64_t len);

// Copies the text of the last error of a call on this thread, as snprintf would, and returns the
// length of the whole text in bytes, the NUL not counted: it names the argument or the limit that
// was hit. `buf` may be NULL with a `len` of 0. A call that succeeds leaves the text as it was;
// before the first error it is empty.
//
// Threads: thread-safe; each thread has its own text.
uint64_t kvc_last_error(char *buf, uint64_t len);

// ----------------------------------------------------------------------------------------------
// Which library this is
// ----------------------------------------------------------------------------------------------
// The ABI that this header describes: 0x00MAJOR_00MINOR as 16 + 16 bits.
#define KVC_ABI_VERSION 1

// Element type of rows: 32-bit floats.
#define KVC_DTYPE_F32 1

// Element type of rows: IEEE half precision.
#define KVC_DTYPE_F16 2

// Element type of rows: bfloat16.
#define KVC_DTYPE_BF16 3

// Storage format of K and V: 32-bit floats.
#define KVC_FORMAT_F32 1

// Storage format of K and V: IEEE half precision.
#define KVC_FORMAT_F16 2

// Storage format of K and V: bfloat16.
#define KVC_FORMAT_BF16 3

// Exists in libraries of ABI 0.1 and no others: a program that refers to it does not link with a
// library of another ABI. Does nothing.
//
// Threads: thread-safe.
void kvc_abi_0_1(void);

// The KVC_ABI_VERSION that the library was built with, to compare at run time.
//
// Threads: thread-safe.
uint32_t kvc_abi_version(void);

// The library's version, "MAJOR.MINOR.PATCH". The text lives for ever.
//
// Threads: thread-safe.
const char *kvc_version(void);

// Copies one line about the build as snprintf would, and returns the length of the whole line,
// the NUL not counted: version, features, storage formats, the CPU level that kernels use (or
// why there is none), and whether GPU kernels are inside. `buf` may be NULL with a `len` of 0.
//
// Threads: thread-safe.
uint64_t kvc_build_info(char *buf, uint64_t len);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // KVCACHE_H
