//go:build !cgo

package kvcache

import (
	"errors"
	"testing"
)

func TestTheStubSaysSo(t *testing.T) {
	_, err := NewCache([]GroupSpec{{Layers: 1, KVHeads: 1, KDim: 64}}, nil)
	if !errors.Is(err, ErrNoCgo) || !errors.Is(Available(), ErrNoCgo) || err.Error() == "" {
		t.Fatal(err)
	}
}
