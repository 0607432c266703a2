//! The planner's command line, end to end: the figures of its JSON, its table, its errors.

use std::process::{Command, Output};

use serde_json::Value;

fn plan(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--example", "plan", "--"])
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs")
}

fn json(arguments: &[&str]) -> Value {
    let output = plan(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("stdout is one JSON value")
}

#[test]
fn published_figures_come_out_of_the_command_line() {
    let llama = json(&["llama-2-7b", "--dtype", "f16", "--context", "4096"]);
    assert_eq!(llama["plan"]["sequence_bytes"], 2u64 << 30);
    let latent = json(&["--layers", "61", "--latent", "512", "--rope", "64"]);
    assert_eq!(latent["plan"]["token_bytes"], 70_272);
    assert_eq!(latent["formats"]["f32"]["token_bytes"], 2 * 70_272);
    // 64 rows of 288 bytes, two bytes a channel and a header, over 64 tokens.
    assert_eq!(latent["formats"]["kt4v4"]["token_bytes"], 61u64 * (64 * 288 + 1168) / 64 + 1);
    assert_eq!(latent["formats"]["kt4v4"]["block_tokens"], 64);
    let dims = ["--layers", "80", "--kv-heads", "64", "--head-dim", "128", "--context", "4096"];
    assert_eq!(json(&dims)["plan"]["sequence_bytes"], 10u64 << 30);
}

#[test]
fn explicit_windows_equal_the_preset() {
    let preset = json(&["gpt-oss-20b", "--memory", "24GB", "--weights", "13GB"]);
    let explicit = json(&[
        "--layers",
        "24",
        "--kv-heads",
        "8",
        "--head-dim",
        "64",
        "--window",
        "128",
        "--window-layers",
        "12",
        "--memory",
        "24GB",
        "--weights",
        "13GB",
    ]);
    assert_eq!(preset["plan"], explicit["plan"]);
    assert_eq!(preset["plan"]["groups"].as_array().map(Vec::len), Some(2));
    assert_eq!(preset["memory_bytes"], 24_000_000_000u64);
}

#[test]
fn the_table_names_every_format() {
    let output = plan(&["kimi-k2", "--batch", "4"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for format in kvcache::dtype::KvFormat::ALL {
        let row = text.lines().find(|line| line.split_whitespace().next() == Some(format.name()));
        assert!(row.is_some(), "{}", format.name());
    }
    assert!(text.contains("70,272"));
}

#[test]
fn bad_input_is_an_error_on_stderr_only() {
    let bad: &[(&[&str], &str)] = &[
        (&["no-such-model"], "no preset"),
        (&["--bogus"], "unknown option"),
        (&["llama-3-8b", "extra"], "unexpected argument"),
        (&["llama-3-8b", "--layers", "2"], "not both"),
        (&["--layers", "2"], "--kv-heads is missing"),
        (&["--layers", "0", "--kv-heads", "1", "--head-dim", "64"], "at least 1"),
        (&["--layers", "1", "--kv-heads", "1", "--head-dim", "65"], "multiples of 8"),
        (&["--layers", "4294967295", "--kv-heads", "4294967295", "--head-dim", "256"], "not fit"),
        (&["--layers", "1", "--latent", "4294967295", "--rope", "8"], "too large"),
        (&["--memory", "16GiB", "--weights", "16GiB"], "no memory"),
        (&["--memory", "16 gallons"], "unit"),
        (&["--context", "18446744073709551615"], "not fit"),
        (&["--batch", "0"], "--batch"),
        (&["--reserve", "1.0"], "fraction"),
        (&["--dtype", "kt4v4", "--block-tokens", "16"], "32, 64 or 128"),
        (&["--dtype", "f17"], "f32, f16, bf16"),
    ];
    for (arguments, expected) in bad {
        let output = plan(arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        assert!(text.contains(expected), "{arguments:?}: {text}");
        assert!(!text.contains("panicked"), "{arguments:?}: {text}");
    }
}
