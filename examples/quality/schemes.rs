//! The schemes that are measured: what a stored key or value reads as, by the library's own encode
//! and decode.

use std::error::Error;

use kvcache::dtype::{DType, FormatClass, KvFormat, bf16, f16};
use kvcache::layout::tile::{TileLayout, TileShape};
use kvcache::layout::{GroupLayout, GroupSpec};
use kvcache::quant::{RowCodec, Stored, Tile, seal};

use crate::decode::Cached;
use crate::published;

/// Tokens of a block where a format does not say.
pub const BLOCK: usize = 64;

/// Writes what the stored rows of one side and head read as: `[tokens][dim]` in place.
pub type Rows = dyn Fn(&mut [f32]) -> Result<(), Box<dyn Error>> + Sync;
/// The same for keys and values of a full tile.
pub type Tiles = dyn Fn(&mut [f32], &mut [f32]) -> Result<(), Box<dyn Error>> + Sync;

pub enum Store {
    /// Every token is read as stored, a query's own too.
    Tokens { k: Box<Rows>, v: Box<Rows> },
    /// A tile is read as stored once it ended before the query's own tile; raw rows, which are what
    /// is sealed too, have `staging`. The first `sinks` tiles stay raw.
    Tiles { tokens: usize, staging: DType, tile: Box<Tiles>, sinks: usize },
}

pub struct Scheme {
    pub name: String,
    /// One of the library's formats.
    pub own: bool,
    /// Bits of an element of K and V, scales included.
    pub bits: f64,
    /// What the rows read as.
    pub store: Store,
    /// The cache that they go through instead, where there is one.
    pub cached: Option<Cached>,
}

impl Scheme {
    pub fn tail_policy(&self) -> String {
        match &self.store {
            Store::Tokens { .. } => "none: all tokens as stored".to_string(),
            Store::Tiles { tokens, staging, sinks, .. } => {
                let first = if *sinks == 0 { "" } else { "first and " };
                format!("{first}own tile of {tokens} raw in {}", staging.name())
            }
        }
    }
}

/// The schemes that `names` ask for, all without a name.
pub fn chosen(names: &[String], dim: usize, staging: DType) -> Result<Vec<Scheme>, Box<dyn Error>> {
    let mut all = Vec::new();
    for &format in KvFormat::ALL.iter().filter(|&&format| format != KvFormat::F32) {
        match format.class() {
            FormatClass::Tile => {
                let sizes: &[usize] = match format {
                    KvFormat::Kt4v4 => &[64, 32, 128],
                    KvFormat::Kt2v2 => &[64, 128],
                    _ => &[64],
                };
                for &tokens in sizes {
                    all.push(tiles(format, dim, tokens, staging)?);
                }
                // With the first tile of each sequence raw, whose bits are counted by none of these.
                let mut sunk = tiles(format, dim, 64, staging)?;
                if let Store::Tiles { sinks, .. } = &mut sunk.store {
                    *sinks = 1;
                }
                sunk.cached = sunk.cached.map(|cached| Cached { sink_tokens: 64, ..cached });
                sunk.name += "+sink";
                all.push(sunk);
            }
            _ => all.push(tokens(format, dim)?),
        }
    }
    all.extend(published::all(dim, staging)?);
    for name in names {
        if !all.iter().any(|scheme| scheme.name == *name) {
            let known: Vec<_> = all.iter().map(|scheme| scheme.name.as_str()).collect();
            return Err(format!("no format is called {name}; there are {known:?}").into());
        }
    }
    all.retain(|scheme| names.is_empty() || names.contains(&scheme.name));
    Ok(all)
}

fn bits(format: KvFormat, dim: usize, tokens: usize) -> Result<f64, Box<dyn Error>> {
    let spec = GroupSpec::uniform(1, 1, dim as u32, format);
    let layout = GroupLayout::new(spec, tokens as u32)?;
    Ok(layout.block_bytes() as f64 * 8.0 / (2 * dim * tokens) as f64)
}

fn tokens(format: KvFormat, dim: usize) -> Result<Scheme, Box<dyn Error>> {
    let store = match format {
        KvFormat::F16 => Store::Tokens { k: rounding(DType::F16), v: rounding(DType::F16) },
        KvFormat::Bf16 => Store::Tokens { k: rounding(DType::Bf16), v: rounding(DType::Bf16) },
        _ => {
            let (k, v) = (RowCodec::key(format, dim as u32)?, RowCodec::value(format, dim as u32)?);
            Store::Tokens { k: codec(k, dim), v: codec(v, dim) }
        }
    };
    let cached = Some(Cached { format, block_tokens: BLOCK, sink_tokens: 0 });
    let bits = bits(format, dim, BLOCK)?;
    Ok(Scheme { name: format.name().into(), own: true, bits, store, cached })
}

/// Rows as a codec of the library stores them.
pub fn codec(codec: RowCodec, dim: usize) -> Box<Rows> {
    Box::new(move |rows| {
        let (mut codes, mut scales) = (vec![0; codec.code_bytes()], vec![0; codec.scale_bytes()]);
        for row in rows.chunks_exact_mut(dim) {
            if codec.encode(row, &mut codes, &mut scales)? != Stored::Encoded {
                return Err("a row stayed raw".into());
            }
            codec.decode(&codes, &scales, row)?;
        }
        Ok(())
    })
}

/// Rows rounded to floats.
fn rounding(dtype: DType) -> Box<Rows> {
    Box::new(move |rows| {
        round(rows, dtype);
        Ok(())
    })
}

pub fn round(rows: &mut [f32], dtype: DType) {
    match dtype {
        DType::F16 => rows.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
        DType::Bf16 => rows.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        _ => {}
    }
}

fn tiles(
    format: KvFormat,
    dim: usize,
    tokens: usize,
    staging: DType,
) -> Result<Scheme, Box<dyn Error>> {
    let (k_dim, v_dim) = (dim as u32, dim as u32);
    let shape = TileShape { k_dim, v_dim, v_in_k: false, tokens: tokens as u32 };
    let layout = TileLayout::new(format, shape)?;
    let suffix = if tokens == 64 { String::new() } else { format!("/{tokens}") };
    let tile: Box<Tiles> = Box::new(move |k, v| {
        let mut record = vec![0; layout.bytes()];
        if seal(&layout, k, v, &mut record)? != Stored::Encoded {
            return Err("a tile stayed raw".into());
        }
        let tile = Tile::open(&layout, &record)?;
        tile.keys(k)?;
        tile.values(v)?;
        Ok(())
    });
    Ok(Scheme {
        name: format!("{}{suffix}", format.name()),
        own: true,
        bits: bits(format, dim, tokens)?,
        store: Store::Tiles { tokens, staging, tile, sinks: 0 },
        cached: Some(Cached { format, block_tokens: tokens, sink_tokens: 0 }),
    })
}
