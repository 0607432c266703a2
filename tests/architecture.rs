//! The shape of the source tree, held against a table: imports go down the layers only, `unsafe`
//! and exported symbols live where they may, files are short and say what they are.
//!
//! The checks work on text. Comments and literals are blanked first, so that prose cannot trip them;
//! the second half of this file plants each violation and expects it to be found.

use std::fs;
use std::path::{Path, PathBuf};

/// Every module of the crate's root with its layer. A module that is not listed is an error.
const LAYERS: &[(&str, u32)] = &[
    ("error", 0),
    ("ids", 0),
    ("dtype", 0),
    ("layout", 0),
    ("plan", 0),
    ("pool", 1),
    ("prefix", 1),
    ("quant", 1),
    ("attention", 1),
    ("cpu", 2),
    ("kernels", 2),
    ("device", 3),
    ("cuda", 3),
    ("emu", 3),
    ("cache", 4),
    ("tier", 4),
    ("events", 4),
    ("metrics", 4),
    ("capi", 5),
];

/// The imports allowed within a layer, from the first to the second. Read in this order a module
/// comes after what it imports, which is why there can be no cycle.
const SIDEWAYS: &[(&str, &str)] = &[
    ("dtype", "error"),
    ("layout", "dtype"),
    ("layout", "error"),
    ("plan", "layout"),
    ("plan", "dtype"),
    ("plan", "error"),
    ("attention", "quant"),
    ("device", "cuda"),
    ("device", "emu"),
    ("cache", "tier"),
    ("cache", "events"),
    ("cache", "metrics"),
];

/// What the crate's root re-exports, and where it comes from.
const ROOT_ITEMS: &[(&str, &str)] = &[("Error", "error"), ("Result", "error"), ("Status", "error")];

/// The modules in which `unsafe` may be written.
const UNSAFE: &[&str] = &["cpu", "device", "cuda", "emu", "capi"];
/// Single files in which it may: calls of the system that the standard library has not, and of a library
/// that is loaded at run time.
const UNSAFE_FILES: &[&str] =
    &["tier/disk/sys.rs", "tier/disk/uring.rs", "tier/remote/nixl/agent.rs"];
/// The module that exports symbols.
const EXPORTS: &str = "capi";
/// The longest a source file may be, its tests included.
const MAX_LINES: usize = 500;

#[test]
fn the_tree_keeps_its_shape() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    rust_files(&root.join("src"), &mut files);
    assert!(files.len() > 10, "the sources are under src");
    let found: Vec<String> = files
        .iter()
        .flat_map(|file| {
            let path = file.strip_prefix(root.join("src")).unwrap().to_str().unwrap();
            violations(path, &fs::read_to_string(file).unwrap())
        })
        .collect();
    assert!(found.is_empty(), "{} violations:\n{}", found.len(), found.join("\n"));
}

#[test]
fn the_table_of_pairs_stays_within_layers_and_has_no_cycle() {
    // Every path along the pairs ends: no module is reached from itself.
    fn reaches(from: &str, to: &str, steps: usize) -> bool {
        assert!(steps < LAYERS.len(), "a cycle through {from}");
        SIDEWAYS
            .iter()
            .filter(|(a, _)| *a == from)
            .any(|&(_, next)| next == to || reaches(next, to, steps + 1))
    }
    for (from, to) in SIDEWAYS {
        assert_eq!(layer(from), layer(to), "{from} -> {to}");
        assert!(!reaches(to, from, 0), "{from} -> {to} closes a cycle");
    }
}

fn layer(module: &str) -> Option<u32> {
    LAYERS.iter().find(|(name, _)| *name == module).map(|&(_, layer)| layer)
}

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            files.push(path);
        }
    }
}

/// Everything wrong with the file at `path` below `src`.
fn violations(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    if !text.starts_with("//! ") {
        found.push(format!("{path}: does not open with a `//!` paragraph"));
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        found.push(format!("{path}: {lines} lines, at most {MAX_LINES}"));
    }
    let code = blank(text);
    let module = path.split('/').next().unwrap().trim_end_matches(".rs");
    let is_root = module == "lib";
    let may_be_unsafe = UNSAFE.contains(&module) || UNSAFE_FILES.contains(&path);
    if !may_be_unsafe && !words(&code, "unsafe").is_empty() {
        found.push(format!("{path}: `unsafe` outside {UNSAFE:?}"));
    }
    for word in ["no_mangle", "export_name"] {
        if module != EXPORTS && !words(&code, word).is_empty() {
            found.push(format!("{path}: `{word}` outside {EXPORTS}"));
        }
    }
    if is_root {
        return found;
    }
    let Some(own) = layer(module) else {
        found.push(format!("{path}: module {module} has no layer"));
        return found;
    };
    for name in imports(path, &code) {
        let target = ROOT_ITEMS.iter().find(|(item, _)| *item == name).map_or(&*name, |(_, m)| m);
        match layer(target) {
            _ if target == module => {}
            None => found.push(format!("{path}: crate::{name} has no layer")),
            Some(other) if other < own => {}
            Some(other) if other == own && SIDEWAYS.contains(&(module, target)) => {}
            Some(other) => {
                let way = if other > own { "up" } else { "sideways" };
                found.push(format!("{path}: imports {way}: {module} -> {target}"));
            }
        }
    }
    found
}

/// The names right below the crate's root that `code` mentions, by `crate::` or by enough `super::`.
fn imports(path: &str, code: &str) -> Vec<String> {
    let mut names = Vec::new();
    for at in words(code, "crate") {
        first_names(&code[at + "crate".len()..], &mut names);
    }
    let parts = path.trim_end_matches(".rs").split('/');
    let depth = parts.filter(|part| *part != "mod").count();
    let climb = "super::".repeat(depth);
    for (at, _) in code.match_indices(&climb) {
        let continued = code[..at].ends_with("super::");
        let mut after = Vec::new();
        first_names(&code[at + climb.len() - 2..], &mut after);
        // Deeper inline modules climb further to the same place; only modules count.
        names.extend(after.into_iter().filter(|name| !continued && layer(name).is_some()));
    }
    names.sort();
    names.dedup();
    names
}

/// The names that follow a path's start: one after `::`, several after `::{`.
fn first_names(rest: &str, names: &mut Vec<String>) {
    let Some(rest) = rest.strip_prefix("::") else { return };
    let ident = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    if !rest.starts_with('{') {
        names.push(ident(rest));
        return;
    }
    let mut depth = 0;
    let mut expect = false;
    for (at, c) in rest.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return;
        }
        if expect && !c.is_whitespace() && c != '}' {
            names.push(ident(&rest[at..]));
            expect = false;
        }
        if depth == 1 && (c == ',' || c == '{') {
            expect = true;
        }
    }
}

/// Where `word` stands as a whole word.
fn words(code: &str, word: &str) -> Vec<usize> {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .map(|(at, _)| at)
        .filter(|&at| !code[..at].ends_with(part) && !code[at + word.len()..].starts_with(part))
        .collect()
}

/// The code with comments and string literals left out, each string as `""`.
fn blank(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let raw_hashes = rest.strip_prefix('r').map(|r| r.len() - r.trim_start_matches('#').len());
        let starts_word = !code.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let skip = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if c == '"' {
            code.push_str("\"\"");
            string(rest)
        } else if let Some(hashes) = raw_hashes
            && (starts_word || code.ends_with('b'))
            && rest[1 + hashes..].starts_with('"')
        {
            code.push_str("\"\"");
            let end = format!("\"{}", "#".repeat(hashes));
            let body = 2 + hashes;
            rest[body..].find(&end).map_or(rest.len(), |at| body + at + end.len())
        } else if c == '\'' {
            // A character, unless it is a lifetime: '"' and '\'' must not open a string.
            let mut chars = rest.char_indices().skip(1);
            match (chars.next(), chars.next()) {
                (Some((_, '\\')), Some((at, escaped))) => {
                    let after = at + escaped.len_utf8();
                    rest[after..].find('\'').map_or(rest.len(), |close| after + close + 1)
                }
                (Some(_), Some((at, '\''))) => at + 1,
                _ => 1,
            }
        } else {
            code.push(c);
            c.len_utf8()
        };
        rest = &rest[skip..];
    }
    code
}

fn string(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        let here = &rest.as_bytes()[at..];
        if here.starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if here.starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// What `violations` finds in a file that is right but for `body`.
fn planted(path: &str, body: &str) -> Vec<String> {
    violations(path, &format!("//! A file.\n\n{body}\n"))
}

#[test]
fn allowed_imports_pass() {
    for (path, body) in [
        ("capi/pool.rs", "use crate::pool::BlockPool;\nuse crate::Error;"),
        ("cache/mod.rs", "use crate::{cpu::attend, pool::{BlockPool, Table}, error};"),
        ("layout.rs", "use crate::dtype::KvFormat; use crate::error::{Error, Result};"),
        ("pool/table.rs", "use super::blocks::BlockPool;\nuse crate::pool::Fork;"),
        ("pool/mod.rs", "// use crate::cache::KvCache;\nconst A: &str = \"crate::cpu\";"),
        ("plan.rs", "#[cfg(test)]\nmod tests { use super::super::layout::X; use super::*; }"),
        ("cache/mod.rs", "/* unsafe /* nested */ unsafe */ const B: &str = r#\"\" unsafe \"#;"),
        ("pool/mod.rs", "const C: [char; 2] = ['\"', '\\'']; // unsafe"),
        ("pool/mod.rs", "fn unsafe_op_in_unsafe_fn<'a>(_: &'a str) {}"),
        ("cpu/mod.rs", "unsafe fn f() {}"),
        ("capi/pool.rs", "#[unsafe(no_mangle)] pub unsafe extern \"C\" fn kvc_f() {}"),
    ] {
        assert_eq!(planted(path, body), Vec::<String>::new(), "{path}: {body}");
    }
}

#[test]
fn planted_violations_are_found() {
    for (path, body, expected) in [
        ("pool/mod.rs", "use crate::cpu::attend;", "imports up: pool -> cpu"),
        ("plan.rs", "fn f() { crate::pool::new(); }", "imports up: plan -> pool"),
        ("plan.rs", "use super::pool::BlockPool;", "imports up: plan -> pool"),
        ("pool/table.rs", "use super::super::cache::X;", "imports up: pool -> cache"),
        ("pool/mod.rs", "use crate::prefix::Index;", "imports sideways: pool -> prefix"),
        ("quant/mod.rs", "use crate::attention::X;", "imports sideways: quant -> attention"),
        ("dtype/mod.rs", "use crate::{error::E, layout::L};", "imports sideways: dtype -> layout"),
        (
            "cpu/mod.rs",
            "use crate::{\n    dtype,\n    cache::{A, B},\n};",
            "imports up: cpu -> cache",
        ),
        ("error.rs", "pub use crate :: x;\nuse crate::capi::Y;", "imports up: error -> capi"),
        ("pool/mod.rs", "use crate::Cache;", "crate::Cache has no layer"),
        ("novel/mod.rs", "", "module novel has no layer"),
        ("pool/mod.rs", "fn f() { unsafe { g() } }", "`unsafe` outside"),
        ("lib.rs", "unsafe impl Send for X {}", "`unsafe` outside"),
        ("tier/disk/mod.rs", "unsafe fn f() {}", "`unsafe` outside"),
        ("cache/mod.rs", "const Q: char = '\"'; unsafe fn f() {}", "`unsafe` outside"),
        ("cpu/mod.rs", "#[unsafe(no_mangle)] fn f() {}", "`no_mangle` outside"),
        ("cpu/mod.rs", "#[unsafe(export_name = \"x\")] fn f() {}", "`export_name` outside"),
    ] {
        let found = planted(path, body);
        assert!(found.iter().any(|f| f.contains(expected)), "{path}: {body}: {found:?}");
    }
    let lines = |count: usize| vec!["fn f() {}"; count - 2].join("\n");
    assert_eq!(planted("pool/mod.rs", &lines(MAX_LINES)), Vec::<String>::new());
    assert!(planted("pool/mod.rs", &lines(MAX_LINES + 1))[0].contains("501 lines"));
    for text in ["", "use core::fmt;\n//! Late.\n", "// A plain comment.\n", "//!\n"] {
        assert!(violations("pool/mod.rs", text)[0].contains("does not open"), "{text:?}");
    }
}
