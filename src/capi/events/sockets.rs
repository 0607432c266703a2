//! The sockets of a kvc_events, in builds that have them and in builds that have none.

pub(super) use imp::Sockets;

#[cfg(feature = "zmq")]
mod imp {
    use alloc::boxed::Box;
    use alloc::string::String;
    use alloc::vec::Vec;

    use crate::capi::events::{KVC_ENCODING_ARRAY, kvc_events_options};
    use crate::capi::pointer;
    use crate::error::{Error, Result};
    use crate::events::{Encoding, Sink, Subscribers, ZmqOptions, ZmqSink};

    /// The longest text of the options.
    const MOST_BYTES: usize = 255;

    #[derive(Default)]
    pub struct Sockets {
        subscribers: Option<Subscribers>,
        endpoints: [String; 2],
    }

    impl Sockets {
        /// # Safety
        /// The texts of `given` are readable.
        pub unsafe fn bind(
            given: &kvc_events_options,
            sinks: &mut Vec<Box<dyn Sink>>,
        ) -> Result<Self> {
            // SAFETY: the caller's promise.
            let text = |text, what| unsafe { pointer::text(text, MOST_BYTES, what) };
            let Some(endpoint) = text(given.endpoint, "endpoint")? else {
                return Ok(Self::default());
            };
            let limit = |n: u64, what| usize::try_from(n).map_err(|_| Error::Overflow { what });
            let sink = ZmqSink::bind(&ZmqOptions {
                endpoint: endpoint.into(),
                replay_endpoint: text(given.replay_endpoint, "replay_endpoint")?.map(String::from),
                topic: text(given.topic, "topic")?.unwrap_or_default().into(),
                encoding: match given.encoding {
                    KVC_ENCODING_ARRAY => Encoding::Array,
                    _ => Encoding::Map,
                },
                rank: given.rank,
                keep_messages: limit(given.keep_messages, "keep_messages")?,
                keep_bytes: limit(given.keep_bytes, "keep_bytes")?,
                remote: given.remote == 1,
            })?;
            let subscribers = Some(sink.subscribers());
            let replay = sink.replay_endpoint().unwrap_or_default();
            let endpoints = [sink.endpoint().into(), replay.into()];
            sinks.push(Box::new(sink));
            Ok(Sockets { subscribers, endpoints })
        }

        pub fn subscribers(&self) -> u32 {
            self.subscribers.as_ref().map_or(0, |subscribers| subscribers.count())
        }

        pub fn endpoint(&self, replay: bool) -> &str {
            &self.endpoints[usize::from(replay)]
        }
    }
}

#[cfg(not(feature = "zmq"))]
mod imp {
    use alloc::boxed::Box;
    use alloc::vec::Vec;

    use crate::capi::events::kvc_events_options;
    use crate::error::{Error, Result};
    use crate::events::Sink;

    pub struct Sockets;

    impl Sockets {
        /// # Safety
        /// The texts of `given` are readable; here they are not read.
        pub unsafe fn bind(given: &kvc_events_options, _: &mut Vec<Box<dyn Sink>>) -> Result<Self> {
            if given.endpoint.is_null() {
                Ok(Sockets)
            } else {
                Err(Error::Unsupported { what: "an endpoint, which needs the feature zmq," })
            }
        }

        pub fn subscribers(&self) -> u32 {
            0
        }

        pub fn endpoint(&self, _: bool) -> &str {
            ""
        }
    }
}
