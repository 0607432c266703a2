//go:build cgo

package kvcache

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// Functions that nothing here calls, and who does their work.
var elsewhere = map[string]string{
	// A store of the engine's own is C: see tier.go.
	"kvc_tier_store_init": "C",
	"kvc_prefix_create":   "NewPrefix goes by kvc_prefix_create_with",
}

// header is include/kvcache.h without its comments.
func header(t *testing.T) string {
	text, err := os.ReadFile("../../include/kvcache.h")
	if err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`(?m)^\s*//.*$`).ReplaceAllString(string(text), "")
}

func sources(t *testing.T) string {
	var all strings.Builder
	for _, pattern := range []string{"*.go", "*.c"} {
		names, _ := filepath.Glob(pattern)
		for _, name := range names {
			if text, err := os.ReadFile(name); err == nil && !strings.HasSuffix(name, "_test.go") {
				// The lists of #cgo lines are no calls.
				all.WriteString(regexp.MustCompile(`(?m)^// #cgo no.*$`).ReplaceAllString(string(text), ""))
			}
		}
	}
	return all.String()
}

func TestEveryFunctionOfTheHeaderIsCalled(t *testing.T) {
	code := sources(t)
	declared := regexp.MustCompile(`(?m)^[a-z][\w ]*[ *](kvc_\w+)\(`).FindAllStringSubmatch(header(t), -1)
	if len(declared) < 90 {
		t.Fatalf("only %d functions", len(declared))
	}
	for _, name := range declared {
		called := regexp.MustCompile(`(C\.|return )` + name[1] + `\(`).MatchString(code)
		if _, known := elsewhere[name[1]]; called == known {
			t.Errorf("%s: called %v", name[1], called)
		}
	}
}

func TestEveryConstantHasAName(t *testing.T) {
	constants := regexp.MustCompile(`(?m)^#define KVC_(\w+) (-?\d+)`).FindAllStringSubmatch(header(t), -1)
	kinds, err := os.ReadFile("kinds.go")
	if err != nil {
		t.Fatal(err)
	}
	here := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^\s+(\w+) +(?:\w+ +)?= (?:&Error\{Code: )?(-?\d+)`).FindAllStringSubmatch(string(kinds), -1) {
		here[strings.ToLower(m[1])] = m[2]
	}
	for _, c := range constants {
		if c[1] == "OK" || c[1] == "ABI_VERSION" {
			continue
		}
		name := strings.ReplaceAll(strings.ToLower(c[1]), "_", "")
		name = strings.TrimPrefix(name, "dtype")
		if here[name] != c[2] {
			t.Errorf("KVC_%s is %s, here %q", c[1], c[2], here[name])
		}
	}
}

// Each field of an options struct is set somewhere.
func TestEveryFieldCanBeSet(t *testing.T) {
	code := sources(t)
	structs := regexp.MustCompile(`(?s)typedef struct \{(.*?)\} (kvc_\w+);`).FindAllStringSubmatch(header(t), -1)
	skipped := map[string]bool{"struct_size": true, "reserved": true, "parts": true, "table_indptr": true, "store": true}
	// Rows are whole slices here; blocks have strides.
	rowStride := regexp.MustCompile(`^(q|q_out|out|k_rows|v_rows)_(token|head)_stride$`)
	count := 0
	for _, s := range structs {
		for _, f := range regexp.MustCompile(`(\w+)(?:\[\d+\])?;`).FindAllStringSubmatch(s[1], -1) {
			if skipped[f[1]] || rowStride.MatchString(f[1]) || s[2] == "kvc_histogram" || elsewhere[s[2]+"_init"] != "" || s[2] == "kvc_tier_object" {
				continue
			}
			count++
			if !regexp.MustCompile(`\b` + f[1] + `\b`).MatchString(code) {
				t.Errorf("%s.%s", s[2], f[1])
			}
		}
	}
	if count < 200 {
		t.Errorf("only %d fields", count)
	}
}

func TestTheLibraryIsThatOfTheHeader(t *testing.T) {
	if err := Available(); err != nil {
		t.Fatal(err)
	}
	major := strings.Split(Version(), ".")
	if _, err := strconv.Atoi(major[0]); err != nil || !strings.Contains(BuildInfo(), Version()) {
		t.Errorf("%q, %q", Version(), BuildInfo())
	}
}
