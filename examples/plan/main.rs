//! The memory planner on the command line: how much context, and how many sequences, a model's
//! cache affords on a device.
//!
//! ```text
//! cargo run --release --example plan -- llama-3-8b --memory 80GiB --weights 16GB --context 8192
//! ```
//!
//! All arithmetic is [`kvcache::plan`]'s; this program reads arguments and prints. The first table
//! is the chosen KV format, the last one every format that the geometry can have.

mod args;
mod units;

use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::process::ExitCode;

use args::{Args, Request, TILE_TOKENS};
use kvcache::dtype::{FormatClass, KvFormat};
use kvcache::layout::{CacheSpec, tile};
use kvcache::plan::{Plan, Workload, plan, presets, with_format};
use serde_json::{Value, json};
use units::{binary, grouped};

fn main() -> ExitCode {
    let request = match args::parse(std::env::args().skip(1)) {
        Ok(request) => request,
        Err(message) => {
            eprintln!("error: {message}\n\n{}", args::USAGE);
            return ExitCode::from(2);
        }
    };
    let text = match request {
        Request::Help => Ok(format!("{}\n", args::USAGE)),
        Request::List => {
            Ok(presets::ALL.iter().map(|preset| format!("{}\n", preset.name)).collect())
        }
        Request::Plan(args) => formats(&args).map(|plans| match args.json {
            true => format!("{:#}\n", to_json(&args, &plans)),
            false => tables(&args, &plans),
        }),
    };
    let written = match text {
        Ok(text) => std::io::stdout().write_all(text.as_bytes()),
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    match written {
        // A reader that has seen enough is no failure.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// A format with the spec it was planned in, which may need other blocks than the chosen one.
struct Planned {
    format: KvFormat,
    spec: CacheSpec,
    plan: Plan,
}

/// The plan of every format; without those that the geometry cannot have, the chosen one excepted,
/// whose error is the answer.
fn formats(args: &Args) -> kvcache::Result<Vec<Planned>> {
    let workload = Workload { context_tokens: args.context_tokens, batch: args.batch };
    let mut plans = Vec::new();
    for &format in KvFormat::ALL {
        let mut spec = with_format(&args.spec, format);
        let tiles = format.class() == FormatClass::Tile;
        if format != args.format && tiles && !tile::TILE_TOKENS.contains(&spec.block_tokens) {
            spec.block_tokens = TILE_TOKENS;
        }
        if format != args.format && spec.layouts().is_err() {
            continue;
        }
        let plan = plan(&spec, &args.budget, &workload)?;
        plans.push(Planned { format, spec, plan });
    }
    Ok(plans)
}

/// The plan of the format that was asked for.
fn chosen<'a>(args: &Args, plans: &'a [Planned]) -> &'a Planned {
    plans.iter().find(|plan| plan.format == args.format).expect("the chosen format is planned")
}

fn context_text(plan: &Plan) -> String {
    plan.max_context_tokens.map_or_else(|| "any length".to_string(), grouped)
}

fn tables(args: &Args, plans: &[Planned]) -> String {
    let mut text = String::new();
    let plan = &chosen(args, plans).plan;
    let mut row = |name: &str, value: String| {
        writeln!(text, "{name:<28}{value:>20}").expect("a string grows");
    };
    row("model", args.model.clone());
    row("KV format", args.format.name().to_string());
    row("memory", binary(args.budget.memory_bytes));
    row("weights", binary(args.budget.weight_bytes));
    row("for KV, reserve taken off", binary(plan.kv_bytes));
    row("context, tokens", grouped(args.context_tokens));
    row("batch", grouped(args.batch));
    row("bytes a token", grouped(plan.token_bytes));
    row("a sequence of the context", binary(plan.sequence_bytes));
    let staged: u64 =
        plan.groups.iter().map(|group| group.staging_blocks * group.staging_block_bytes).sum();
    if staged != 0 {
        row("of the KV, raw blocks staged", binary(staged));
    }
    row("the batch at the context", binary(plan.batch_bytes));
    row("fits", if plan.fits { "yes" } else { "no" }.to_string());
    row("largest batch at the context", grouped(plan.max_batch));
    row("largest context at the batch", context_text(plan));

    writeln!(
        text,
        "\n{:<6}{:>7}{:>9}{:>8}{:>8}{:>8}{:>14}{:>12}{:>12}{:>12}",
        "group",
        "layers",
        "KV heads",
        "K dim",
        "V dim",
        "window",
        "bytes/token",
        "block",
        "blocks/seq",
        "blocks"
    )
    .expect("a string grows");
    for (at, (group, spec)) in plan.groups.iter().zip(&args.spec.groups).enumerate() {
        writeln!(
            text,
            "{:<6}{:>7}{:>9}{:>8}{:>8}{:>8}{:>14}{:>12}{:>12}{:>12}",
            at,
            spec.layers,
            spec.kv_heads,
            spec.k_dim,
            if spec.v_in_k { "in K".to_string() } else { spec.v_dim.to_string() },
            spec.window.map_or_else(|| "-".to_string(), |window| window.to_string()),
            grouped(group.token_bytes),
            binary(group.block_bytes),
            grouped(group.sequence_blocks),
            grouped(group.blocks),
        )
        .expect("a string grows");
    }

    writeln!(
        text,
        "\n{:<10}{:>7}{:>14}{:>14}{:>14}{:>15}{:>17}",
        "format",
        "block",
        "bytes/token",
        "a sequence",
        "blocks",
        "largest batch",
        "largest context"
    )
    .expect("a string grows");
    for Planned { format, spec, plan } in plans {
        let blocks: u64 = plan.groups.iter().map(|group| group.blocks).sum();
        writeln!(
            text,
            "{:<10}{:>7}{:>14}{:>14}{:>14}{:>15}{:>17}",
            format.name(),
            spec.block_tokens,
            grouped(plan.token_bytes),
            binary(plan.sequence_bytes),
            grouped(blocks),
            grouped(plan.max_batch),
            context_text(plan),
        )
        .expect("a string grows");
    }
    text
}

fn to_json(args: &Args, plans: &[Planned]) -> Value {
    json!({
        "model": args.model,
        "format": args.format.name(),
        "block_tokens": args.spec.block_tokens,
        "memory_bytes": args.budget.memory_bytes,
        "weight_bytes": args.budget.weight_bytes,
        "reserve_ppm": args.budget.reserve_ppm,
        "context_tokens": args.context_tokens,
        "batch": args.batch,
        "plan": plan_json(chosen(args, plans)),
        "formats": plans
            .iter()
            .map(|planned| (planned.format.name().to_string(), plan_json(planned)))
            .collect::<serde_json::Map<_, _>>(),
    })
}

fn plan_json(planned: &Planned) -> Value {
    let Planned { spec, plan, .. } = planned;
    let groups = plan.groups.iter().zip(&spec.groups).map(|(group, spec)| {
        json!({
            "layers": spec.layers,
            "kv_heads": spec.kv_heads,
            "k_dim": spec.k_dim,
            "v_dim": spec.v_dim,
            "v_in_k": spec.v_in_k,
            "window": spec.window,
            "token_bytes": group.token_bytes,
            "block_bytes": group.block_bytes,
            "sequence_blocks": group.sequence_blocks,
            "blocks": group.blocks,
            "staging_block_bytes": group.staging_block_bytes,
            "staging_blocks": group.staging_blocks,
        })
    });
    json!({
        "block_tokens": spec.block_tokens,
        "kv_bytes": plan.kv_bytes,
        "token_bytes": plan.token_bytes,
        "sequence_bytes": plan.sequence_bytes,
        "batch_bytes": plan.batch_bytes,
        "fits": plan.fits,
        "max_batch": plan.max_batch,
        "max_context_tokens": plan.max_context_tokens,
        "groups": groups.collect::<Vec<_>>(),
    })
}
