//! Writes `cuda/kvc_params.h` from the parameter structs and the list of kernels.
//!
//! Only tests use it: one compares the committed header, and rewrites it where the environment has
//! `KVCACHE_BLESS=1`.

use alloc::string::String;
use core::fmt::Write;

use super::kernels;
use super::params::*;

fn comment(out: &mut String, indent: &str, lines: &[&str]) {
    for line in lines {
        writeln!(out, "{indent}//{line}").unwrap();
    }
}

fn structure<T: DeviceStruct>(out: &mut String) {
    comment(out, "", T::DOC);
    writeln!(out, "struct {} {{", T::C_NAME).unwrap();
    for (doc, declaration) in T::fields() {
        comment(out, "    ", doc);
        writeln!(out, "    {declaration};").unwrap();
    }
    writeln!(out, "}};").unwrap();
    let (name, bytes) = (T::C_NAME, size_of::<T>());
    writeln!(out, "static_assert(sizeof({name}) == {bytes}, \"layout of {name}\");\n").unwrap();
}

fn kvc_params_h() -> String {
    let mut out = String::from(
        "// Written from src/kernels/params by the test `the_committed_header_is_current`.\n\
         // Do not edit: run it with KVCACHE_BLESS=1.\n\
         #pragma once\n#include <stdint.h>\n\n",
    );
    structure::<AppendParams>(&mut out);
    structure::<AppendTokenParams>(&mut out);
    structure::<CascadeSegment>(&mut out);
    structure::<CascadeSplitParams>(&mut out);
    structure::<CopyParams>(&mut out);
    structure::<DecodeRange>(&mut out);
    structure::<DecodeSpan>(&mut out);
    structure::<DecodeHead>(&mut out);
    structure::<DecodePlanParams>(&mut out);
    structure::<DecodeParams>(&mut out);
    structure::<DecodeTileParams>(&mut out);
    structure::<DecodeTokenParams>(&mut out);
    structure::<LookupPatch>(&mut out);
    structure::<LookupPatchParams>(&mut out);
    structure::<LookupParams>(&mut out);
    structure::<MergeParams>(&mut out);
    structure::<PrefillParams>(&mut out);
    structure::<PrefillSealedParams>(&mut out);
    structure::<PrefillTokenParams>(&mut out);
    structure::<MlaParams>(&mut out);
    structure::<MlaTokenParams>(&mut out);
    structure::<SealParams>(&mut out);
    out.push_str("// Every kernel of the library with its parameter struct.\n");
    out.push_str("#define KVC_KERNELS(X)");
    for kernel in kernels() {
        write!(out, " \\\n    X({}, {})", kernel.name, kernel.params).unwrap();
    }
    out.push('\n');
    out
}

#[test]
fn the_committed_header_is_current() {
    let wanted = kvc_params_h();
    if std::env::var_os("KVCACHE_BLESS").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/kvc_params.h");
        std::fs::write(path, &wanted).unwrap();
        return;
    }
    // By this file's place: other manifests compile these sources too (scripts/lean).
    let committed = include_str!("../../cuda/kvc_params.h");
    assert!(committed == wanted, "cuda/kvc_params.h is stale: rerun with KVCACHE_BLESS=1");
}
