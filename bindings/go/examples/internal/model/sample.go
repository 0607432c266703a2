package model

import "math"

// Sampler chooses the next token: the most likely one at temperature 0, or a draw.
type Sampler struct {
	Temperature float32
	State       uint64
}

// Pick chooses by a row of logits.
func (s *Sampler) Pick(logits []float32) uint32 {
	best := 0
	for token, logit := range logits {
		if logit > logits[best] {
			best = token
		}
	}
	if s.Temperature == 0 {
		return uint32(best)
	}
	weight := func(logit float32) float64 { return math.Exp(float64((logit - logits[best]) / s.Temperature)) }
	total := 0.0
	for _, logit := range logits {
		total += weight(logit)
	}
	left := total * s.uniform()
	for token, logit := range logits {
		if left -= weight(logit); left < 0 {
			return uint32(token)
		}
	}
	return uint32(best)
}

// uniform is SplitMix64, in [0, 1).
func (s *Sampler) uniform() float64 {
	s.State += 0x9e3779b97f4a7c15
	z := s.State
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return float64((z^z>>31)>>11) / (1 << 53)
}
