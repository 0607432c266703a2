package kvcache

// The header's numbers by name; a test holds each table against the header. Nothing here needs cgo.

import "fmt"

// DType is the element type of rows.
type DType uint32

// Element types.
const (
	F32  DType = 1
	F16  DType = 2
	BF16 DType = 3
)

// Size is the bytes of an element.
func (d DType) Size() int {
	if d == F32 {
		return 4
	}
	return 2
}

// Format is how K and V are stored.
type Format uint32

// Storage formats. The planner knows all; kernels that lack one answer ErrUnsupported.
const (
	FormatF32     Format = 1
	FormatF16     Format = 2
	FormatBF16    Format = 3
	FormatFP8E4M3 Format = 4
	FormatFP8E5M2 Format = 5
	FormatInt8T   Format = 6
	FormatInt4T   Format = 7
	FormatNVFP4   Format = 8
	FormatKT8V8   Format = 16
	FormatKT4V4   Format = 17
	FormatKT3V3   Format = 18
	FormatKT4V2   Format = 19
	FormatKT2V2   Format = 20
)

// RopeStyle says which channels are a pair.
type RopeStyle uint32

// Pairs: channel i with i + rotary_dim / 2, or 2 i with 2 i + 1.
const (
	RopeHalves      RopeStyle = 1
	RopeInterleaved RopeStyle = 2
)

// DeviceKind is where blocks live and kernels run.
type DeviceKind uint32

// Devices.
const (
	DeviceCPU  DeviceKind = 0
	DeviceCUDA DeviceKind = 1
	DeviceEmu  DeviceKind = 2
)

// Eviction is which cached blocks go first.
type Eviction uint32

// Orders of eviction.
const (
	EvictionLRU    Eviction = 0
	EvictionLFU    Eviction = 1
	EvictionFIFO   Eviction = 2
	EvictionSLRU   Eviction = 3
	EvictionS3FIFO Eviction = 4
)

// Hint is what is known of the next use of a prefix.
type Hint uint32

// Hints.
const (
	HintNone     Hint = 0
	HintEnded    Hint = 1
	HintExpected Hint = 2
	HintWaited   Hint = 3
)

// EventKind is what happened to blocks.
type EventKind uint32

// Kinds of events.
const (
	EventStored  EventKind = 1
	EventRemoved EventKind = 2
	EventCleared EventKind = 3
)

// Medium is where blocks are.
type Medium uint32

// Media.
const (
	MediumGPU      Medium = 1
	MediumCPU      Medium = 2
	MediumStorage  Medium = 3
	MediumExternal Medium = 4
)

// Encoding is how events are written for ZeroMQ.
type Encoding uint32

// Encodings: maps, what current routers read, and arrays, what older ones read.
const (
	EncodingMap   Encoding = 0
	EncodingArray Encoding = 1
)

// Tier is where blocks go that the device has no room for.
type Tier uint32

// Tiers.
const (
	TierHost  Tier = 1
	TierDisk  Tier = 2
	TierStore Tier = 3
)

// Why says why so much of a prompt is loaded from lower tiers.
type Why uint32

// Reasons: no tier has the next block; what computing costs is not known, or how fast the tier is, so all
// is loaded; loading is faster, or faster up to a point, or slower.
const (
	WhyNothingFound        Why = 1
	WhyCostUnknown         Why = 2
	WhyRateUnknown         Why = 3
	WhyLoadIsFaster        Why = 4
	WhyLoadIsFasterAtFirst Why = 5
	WhyComputeIsFaster     Why = 6
)

// LoadStatus says how a load by layers stands.
type LoadStatus uint32

// A load is complete (or there is none), on its way, or has failed.
const (
	OnboardComplete LoadStatus = 1
	OnboardLoading  LoadStatus = 2
	OnboardFailed   LoadStatus = 3
)

// Missed is why a load failed.
type Missed uint32

// Reasons: the tier does not have a block any more; it was damaged; tier or device failed; it was
// cancelled.
const (
	MissedAbsent    Missed = 1
	MissedBad       Missed = 2
	MissedDown      Missed = 3
	MissedCancelled Missed = 4
)

// Errors that calls answer, to compare with errors.Is.
var (
	ErrInvalidArgument = &Error{Code: -1}
	ErrNullPointer     = &Error{Code: -2}
	ErrMisaligned      = &Error{Code: -3}
	ErrStructSize      = &Error{Code: -4}
	ErrOverflow        = &Error{Code: -5}
	ErrUnsupported     = &Error{Code: -6}
	ErrStaleHandle     = &Error{Code: -7}
	ErrBufferTooSmall  = &Error{Code: -8}
	ErrBadBlock        = &Error{Code: -9}
	ErrOutOfBlocks     = &Error{Code: -100}
	ErrOutOfSequences  = &Error{Code: -101}
	ErrOutOfMemory     = &Error{Code: -102}
	ErrTooManyHandles  = &Error{Code: -103}
	ErrNoKernels       = &Error{Code: -200}
	ErrNoDevice        = &Error{Code: -201}
	ErrDeviceFailed    = &Error{Code: -202}
	ErrTierFailed      = &Error{Code: -203}
	ErrInvalidState    = &Error{Code: -300}
	ErrLayerMissing    = &Error{Code: -301}
	ErrPanic           = &Error{Code: -900}
	ErrPoisoned        = &Error{Code: -901}
	// ErrNoCgo is what a build without cgo answers: it has no library.
	ErrNoCgo = &Error{Code: -1 << 31, Detail: "built without cgo, which libkvcache needs"}
)

// Error is a code of the header and what the library said of it.
type Error struct {
	Code int32
	// Detail names the argument or the limit that was hit.
	Detail string
	// Missing is, with ErrOutOfBlocks, how many blocks must be freed before the call can succeed.
	Missing uint32
}

func (e *Error) Error() string {
	return fmt.Sprintf("kvcache: %s (%d)", e.Detail, e.Code)
}

// Is makes errors of one code equal to errors.Is.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

func invalid(format string, args ...any) error {
	return &Error{Code: ErrInvalidArgument.Code, Detail: fmt.Sprintf(format, args...)}
}

// GroupSpec is layers of a model that share a geometry, a format and a window. A uniform model has one.
type GroupSpec struct {
	Layers, KVHeads uint32
	// KDim and VDim are channels of key and value rows; VDim 0 is KDim.
	KDim, VDim uint32
	// VInK: values are the first VDim channels of the keys (latent attention).
	VInK bool
	// Format 0 is bf16.
	Format Format
	// Window in tokens, the query's own included; 0 for full attention.
	Window uint32
	// SinkTokens: of sealed tiles, the first tokens of every sequence that stay raw, whole blocks.
	SinkTokens uint32
}

func (g *GroupSpec) vDim() uint32 {
	if g.VDim == 0 {
		return g.KDim
	}
	return g.VDim
}
