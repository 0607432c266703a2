//! CUDA graphs: a sequence of launches captured once and replayed as one.
//!
//! What the library enqueues can be captured: it allocates nothing, waits for nothing and reads
//! lengths on the device. A replay therefore follows lengths and tables that changed in place.

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Current, check};
use super::{Cuda, Queue};
use crate::error::Result;

/// A captured and instantiated graph.
#[derive(Debug)]
pub struct Graph {
    cuda: Arc<Cuda>,
    exec: sys::CUgraphExec,
}

// SAFETY: a handle of the driver, which this object alone uses.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `enqueue` puts on the queue; nothing of it runs.
    ///
    /// # Errors
    /// The error of `enqueue`; `DeviceFailed` where something cannot be captured.
    pub fn capture(queue: &Queue, enqueue: impl FnOnce() -> Result<()>) -> Result<Self> {
        let cuda = queue.cuda.clone();
        let current = Current::enter(&cuda.context)?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: live handles of the current context; the capture is ended whatever happens in
        // between, and the graph destroyed once the executable one is made from it.
        unsafe {
            check("cuStreamBeginCapture", sys::cuStreamBeginCapture_v2(queue.stream, mode))?;
            let enqueued = enqueue();
            let ended =
                check("cuStreamEndCapture", sys::cuStreamEndCapture(queue.stream, &mut graph));
            let made = enqueued.and(ended).and_then(|()| {
                check("cuGraphInstantiate", sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0))
            });
            if !graph.is_null() {
                let _ = sys::cuGraphDestroy(graph);
            }
            made?;
        }
        drop(current);
        Ok(Self { cuda, exec })
    }

    /// Enqueues all that was captured.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn launch(&self, queue: &Queue) -> Result<()> {
        let _current = Current::enter(&self.cuda.context)?;
        // SAFETY: live handles of one context.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.exec, queue.stream) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(_current) = Current::enter(&self.cuda.context) {
            // SAFETY: instantiated by `capture`, destroyed once.
            let _ = unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
    }
}
