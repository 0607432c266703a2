//! Cascade attention in a store: a prefix that neighbours in a batch share is read once for all of
//! them, where a model of the device says that this is faster.
//!
//! What they share is found by the block ids of their tables, on the host, at the first attention of
//! a batch; the layers after it reuse what was chosen. Only where the result may depend on the rest
//! of the batch, where every query sees the whole prefix by its content alone (no window, no ALiBi),
//! and for few query rows a sequence: many of them make attention a matter of arithmetic, which a
//! cascade does not save. Not where launches are captured, since a replay follows other tables.

use alloc::vec::Vec;

use super::backend::{launch, launch_attend};
use super::batch::BatchView;
use super::store::DeviceStore;
use crate::error::{Error, Result};
use crate::kernels::params::CascadeSegment;
use crate::kernels::{
    AttendArgs, AttendBounds, CascadeAttendPlan, CascadeShape, DeviceRates, HostBatch,
    SharedPrefixes, cascade_within,
};

/// Query tokens of a sequence up to which a step is bound by what it reads: those that are decoded.
const MOST_QUERY_TOKENS: u32 = 8;
/// How fast chunked prefill over rows of codes is beside that over floats: 95 and 226 TFLOP/s for 512
/// rows over 16,384 tokens, as benches/results/gpu-h200.txt has them.
const CODES_RATE: f64 = 0.42;
/// Launches that a cascade makes once a step rather than once a layer, and the upload before them.
const LAUNCHES_A_STEP: f64 = 3.0;

/// What cascades keep between calls: buffers, and a count.
#[derive(Debug, Default)]
pub(super) struct Cascade {
    shared: SharedPrefixes,
    segments: Vec<CascadeSegment>,
    views: Vec<u8>,
    /// In place of what the device says.
    rates: Option<DeviceRates>,
    /// Calls that were cascades.
    pub calls: u64,
}

impl DeviceStore {
    /// Attention calls that read a shared prefix once for several sequences.
    pub fn cascades(&self) -> u64 {
        self.attend.cascade.calls
    }

    /// Has cascades chosen by these rates instead of what the device says of itself.
    ///
    /// # Errors
    /// `InvalidArgument` where one is not positive and finite.
    pub fn set_rates(&mut self, rates: DeviceRates) -> Result<()> {
        rates.check()?;
        self.attend.planned = None;
        self.attend.cascade.rates = Some(rates);
        Ok(())
    }

    /// Whether a call may be a cascade, whatever its sequences share.
    pub(super) fn may_share(&self, args: &AttendArgs, at: &BatchView) -> Result<bool> {
        let options = &self.options;
        let may = options.cascade
            && !options.deterministic
            && !self.layout().spec().v_in_k
            && args.window.is_none()
            && args.slopes == 0
            && at.seqs > 1
            && at.max_q <= MOST_QUERY_TOKENS;
        Ok(may && !self.backend.is_capturing(options.stream)?)
    }

    /// A cascade of this batch, its halves on the device; `None` where plain attention is as good.
    pub(super) fn plan_cascade(
        &mut self,
        bounds: &AttendBounds,
        args: &AttendArgs,
        batch: &HostBatch,
    ) -> Result<Option<CascadeAttendPlan>> {
        let kept = &mut self.attend.cascade;
        let rates = kept.rates.or_else(|| self.backend.rates());
        let Some(mut rates) = rates else { return Ok(None) };
        if !kept.shared.find(batch)? {
            return Ok(None);
        }
        let spec = self.layout().spec();
        let layers = spec.layers.max(1);
        rates.launch *= 1.0 + LAUNCHES_A_STEP / f64::from(layers);
        if !bounds.format.is_float() {
            rates.operations *= CODES_RATE;
        }
        let token_bytes = self.layout().block_bytes() / u64::from(layers * args.block_tokens);
        let shape = CascadeShape {
            q_heads: bounds.shape.q_heads,
            kv_heads: bounds.shape.kv_heads,
            head_dim: bounds.shape.v_dim,
            block_tokens: args.block_tokens,
            token_bytes: token_bytes as u32,
            q_len: bounds.q_tokens.div_ceil(bounds.seqs),
            batch: bounds.seqs,
            tokens: batch.tokens(),
        };
        let kept = &mut self.attend.cascade;
        let chosen = cascade_within(&shape, &rates, &mut kept.shared, &mut kept.segments)?;
        let Some(chosen) = chosen else { return Ok(None) };
        let segments = kept.segments.len() as u32;
        let plan = match CascadeAttendPlan::new(bounds, args.block_tokens, segments, chosen.chunks)
        {
            // A half that no kernel computes.
            Err(Error::Unsupported { .. }) => return Ok(None),
            plan => plan?,
        };
        plan.views(batch, &kept.segments, &mut kept.views)?;
        let workspace = self.attend.room(plan.workspace_bytes())?;
        let launches = plan.launches(workspace, args)?;
        let (backend, stream) = (&*self.backend, self.options.stream);
        // SAFETY: the workspace has the bytes that the plan asks for, and the views are its beginning;
        // they are not page-locked. The lengths are those of the batch.
        unsafe {
            backend.upload(workspace, &self.attend.cascade.views, stream)?;
            for (first, params) in launches.plans.iter().flatten() {
                launch(backend, first, params, stream)?;
            }
        }
        Ok(Some(plan))
    }

    pub(super) fn run_cascade(
        &mut self,
        plan: &CascadeAttendPlan,
        args: &AttendArgs,
    ) -> Result<()> {
        let workspace = self.attend.room(plan.workspace_bytes())?;
        let launches = plan.launches(workspace, args)?;
        let (backend, stream) = (&*self.backend, self.options.stream);
        // SAFETY: as above; rows were vouched for and have the elements that the sizes say.
        unsafe {
            if let Some((copies, params)) = &launches.queries {
                launch(backend, copies, params, stream)?;
            }
            for (half, params) in &launches.halves {
                launch_attend(backend, half, params, stream)?;
            }
            if let Some((merge, params)) = &launches.merge {
                launch(backend, merge, params, stream)?;
            }
        }
        self.attend.cascade.calls += 1;
        Ok(())
    }
}
