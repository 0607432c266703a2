//! A stream of the library's own beside the caller's: copies run there while kernels run here.

use alloc::sync::Arc;

use super::{Backend, Stream, StreamMark};
use crate::error::Result;

/// The stream; ended when it is dropped.
#[derive(Debug)]
pub struct SideStream {
    backend: Arc<dyn Backend>,
    stream: Stream,
}

impl SideStream {
    /// A new stream of a device.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn new(backend: &Arc<dyn Backend>) -> Result<Self> {
        let stream = backend.open_stream()?;
        Ok(Self { backend: backend.clone(), stream })
    }

    /// What to enqueue on.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// What is enqueued here from now on waits for what is enqueued on `stream`.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn follow(&self, stream: Stream) -> Result<()> {
        self.backend.fence(stream, self.stream)
    }

    /// What is enqueued here from now on waits for a point of another stream.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn follow_mark(&self, mark: &StreamMark) -> Result<()> {
        mark.hold(self.stream)
    }

    /// What is enqueued on `stream` from now on waits for what is enqueued here.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn lead(&self, stream: Stream) -> Result<()> {
        self.backend.fence(self.stream, stream)
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // SAFETY: opened by `new`, closed once.
        unsafe { self.backend.close_stream(self.stream) }
    }
}
