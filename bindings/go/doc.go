// Package kvcache is the KV cache of a language model as a library: paging, exact prefix reuse and
// paged attention, over libkvcache's C ABI.
//
// Its nouns are those of the header kvcache.h: [Cache] with its sequences ([Seq]) and [Step]s, [Pool],
// [Prefix], the kernels alone ([Attend], [Append]), [Plan], [Device], [Events] and [Metrics]. A step of
// an engine crosses into C once for each of its calls, whatever the batch: see [Batch].
//
// The library is found by pkg-config (the module kvcache; scripts/install.sh of libkvcache installs
// it). The build tag kvcache_static links libkvcache.a into the program. Without cgo the package
// compiles, and everything that would make an object answers [ErrNoCgo].
//
// Errors are [*Error]; errors.Is tells their kinds apart:
//
//	if errors.Is(err, kvcache.ErrOutOfBlocks) { ... }
//
// Objects end with Close; one that is dropped without is closed by the garbage collector some time
// later. Memory that is passed is used during the call only: no Go pointer stays in C.
package kvcache
