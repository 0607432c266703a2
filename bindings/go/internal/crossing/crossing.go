//go:build cgo

// Package crossing runs calls in a C loop, for benches to compare with the same calls from Go.
package crossing

// #cgo pkg-config: kvcache
// #include <kvcache.h>
// static uint32_t refs_loop(kvc_pool *pool, int32_t block, uint32_t turns) {
//     uint32_t sum = 0, refs;
//     for (uint32_t i = 0; i < turns; i++)
//         if (kvc_pool_refs(pool, block, &refs) == KVC_OK) sum += refs;
//     return sum;
// }
import "C"

import "errors"

// Refs asks for a block's holders, turns times, on a pool of its own.
func Refs(turns int) error {
	var pool *C.kvc_pool
	var block C.int32_t
	if C.kvc_pool_create(64, &pool) != C.KVC_OK || C.kvc_pool_allocate_n(pool, 1, &block) != C.KVC_OK {
		return errors.New("no pool")
	}
	defer C.kvc_pool_destroy(pool)
	if int(C.refs_loop(pool, block, C.uint32_t(turns))) != turns {
		return errors.New("wrong counts")
	}
	return nil
}
