//go:build !cgo

package kvcache

// Without cgo there is no library to call: programs that use the package compile as far as these, and
// are told why.

// Available says why the library cannot be used in this build, or nil.
func Available() error { return ErrNoCgo }

// Cache cannot be made without cgo.
type Cache struct{}

// CacheOptions are the sizes and policies of a cache.
type CacheOptions struct{}

// NewCache answers ErrNoCgo.
func NewCache([]GroupSpec, *CacheOptions) (*Cache, error) { return nil, ErrNoCgo }
