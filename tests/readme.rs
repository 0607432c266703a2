//! What README.md claims and a machine can check: paths and links exist, commands name targets that
//! exist, every code block says its language. Its Rust program is a doctest (src/lib.rs), its C
//! program is compiled and run by ffi-tests.

use std::fs;
use std::path::Path;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).expect("README.md")
}

/// The paths in the first column of the tables: `| `path` | job |`, several parted by commas.
fn table_paths(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix('|'))
        .filter_map(|row| row.split('|').next())
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .map(str::to_string)
        .collect()
}

/// The relative targets of links, without their fragments.
fn links(text: &str) -> Vec<String> {
    text.match_indices("](")
        .filter_map(|(at, _)| text[at + 2..].split(')').next())
        .filter(|target| !target.contains("://") && !target.starts_with('#'))
        .map(|target| target.split('#').next().unwrap().to_string())
        .collect()
}

/// Code blocks as (language, text). A block that is never closed ends the file.
fn code_blocks(text: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(language) = line.strip_prefix("```") {
            let body: Vec<_> = lines.by_ref().take_while(|line| !line.starts_with("```")).collect();
            blocks.push((language.trim().to_string(), body.join("\n")));
        }
    }
    blocks
}

/// The names after `flag` anywhere in the text.
fn named(text: &str, flag: &str) -> Vec<String> {
    let word = |rest: &str| {
        let rest = rest.trim_start().trim_start_matches('=');
        rest.chars().take_while(|c| c.is_alphanumeric() || "_-".contains(*c)).collect::<String>()
    };
    text.match_indices(flag).map(|(at, _)| word(&text[at + flag.len()..])).collect()
}

fn exists(path: &str) -> bool {
    root().join(path.trim_end_matches("/*")).exists()
}

#[test]
fn the_table_of_files_names_what_exists() {
    let paths = table_paths(&readme());
    assert!(paths.len() >= 10, "the README has a table of files and their jobs: {paths:?}");
    for path in &paths {
        assert!(exists(path), "README.md names {path}, which does not exist");
    }
    for dir in ["src", "include", "ffi-tests", "bindings", "benches", "examples"] {
        let named = paths.iter().any(|path| path.split('/').next() == Some(dir));
        assert!(named, "README.md does not say what {dir} is for");
    }
}

#[test]
fn links_lead_somewhere() {
    for link in links(&readme()) {
        assert!(exists(&link), "README.md links to {link}, which does not exist");
    }
}

#[test]
fn the_two_commands_and_all_others_name_real_targets() {
    let readme = readme();
    let shell: Vec<_> =
        code_blocks(&readme).into_iter().filter(|(language, _)| language == "sh").collect();
    for command in ["cargo run --release --example generate", "cargo test"] {
        let found = shell.iter().any(|(_, text)| {
            text.lines().any(|line| line.split('#').next().unwrap().trim() == command)
        });
        assert!(found, "README.md gives `{command}`");
    }
    let target = |dir: &str, name: &str| {
        exists(&format!("{dir}/{name}.rs")) || exists(&format!("{dir}/{name}/main.rs"))
    };
    for (flag, dir) in [("--example ", "examples"), ("--bench ", "benches"), ("--test ", "tests")] {
        for name in named(&readme, flag) {
            assert!(target(dir, &name), "README.md runs {flag}{name}: not in {dir}");
        }
    }
}

#[test]
fn programs_in_both_languages_and_no_block_without_a_language() {
    let blocks = code_blocks(&readme());
    for language in ["c", "rust"] {
        let count = blocks.iter().filter(|(name, _)| name == language).count();
        assert_eq!(count, 1, "README.md has one program in {language}");
    }
    for (language, text) in &blocks {
        assert!(!language.is_empty(), "rustdoc would run this as Rust:\n{text}");
    }
}

#[test]
fn the_checks_see_what_they_look_for() {
    let text = "| file | job |\n|---|---|\n| `src/lib.rs`, `nowhere.rs` | a |\n\n\
                [x](nowhere.md#part) [y](https://example.org)\n\n```sh\ncargo run --example none\n```\n\
                ```\nplain\n```\n";
    assert_eq!(table_paths(text), ["src/lib.rs", "nowhere.rs"]);
    assert!(exists("src/lib.rs") && exists("src") && !exists("nowhere.rs"));
    assert_eq!(links(text), ["nowhere.md"]);
    assert_eq!(named(text, "--example "), ["none"]);
    let blocks = code_blocks(text);
    assert_eq!(blocks[0], ("sh".to_string(), "cargo run --example none".to_string()));
    assert_eq!(blocks[1].0, "");
}
