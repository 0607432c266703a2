//go:build cgo && !kvcache_static

package kvcache

// #cgo pkg-config: kvcache
import "C"
