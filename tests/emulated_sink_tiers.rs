//! Raw sinks between an emulated device, tiers and streams: copied by the device, in whatever order its
//! streams and their events allow, and the same bytes as those of a cache on the CPU.
#![cfg(all(unix, feature = "emulate"))]

mod late_device;
mod sink_case;

use std::sync::Arc;

use kvcache::device::{Backend, Device, open};
use kvcache::dtype::KvFormat;
use kvcache::tier::TierKind;
use late_device::{CACHE, DOWN, Late, Pace, UP};
use sink_case::remote::Remote;
use sink_case::{LONG, Setup, a_life, a_stream, attach, below, known_prompts, prefetch};

fn emu() -> Arc<dyn Backend> {
    open(Device::Emu).unwrap()
}

/// Sinks of different length, so that a block is raw in one group and sealed in the other.
const GROUPS: [(KvFormat, usize); 2] = [(KvFormat::Kt2v2, 2), (KvFormat::Kt4v4, 1)];

#[test]
fn sinks_go_down_and_come_back_in_every_order_of_events() {
    let prompts = known_prompts(&Setup::new(Some(emu()), &GROUPS), 3);
    for (n, pace) in (1..).zip(Pace::ALL) {
        let late = Late::new(emu(), pace);
        let backend: Arc<dyn Backend> = late.clone();
        let setup = Setup::new(Some(backend), &GROUPS);
        a_life(&setup, &prompts, 60, &Vec::new, 8, n);
        let shelf = Arc::new(Remote::default());
        let lower = || vec![below(shelf.clone(), TierKind::Remote, n % 2 == 0)];
        a_life(&setup, &prompts, 12, &lower, 8, n);
        drop(setup);
        assert_eq!(late.left()[..3], [0; 3], "{pace:?}: all is given back");
    }
}

/// The test above can fail.
#[test]
fn an_order_that_is_not_kept_is_found_out() {
    for order in [(DOWN, CACHE), (UP, CACHE)] {
        let late = Late::new(emu(), Pace::Lazy);
        let backend: Arc<dyn Backend> = late.clone();
        let setup = Setup::new(Some(backend), &[(KvFormat::Kt4v4, 3)]);
        let prompts = [1, 2, 3].map(|n| setup.prompt(n, 2));
        let known = prompts.clone().map(|prompt| setup.expected(&prompt));
        *late.forgets.lock().unwrap() = Some(order);
        let small = Setup { blocks: 5, staging_blocks: 5, ..setup };
        let mut cache = small.cache();
        attach(&mut cache, 60, Vec::new());
        let mut wrong = 0;
        for turn in 0..7 {
            let (_, out) = small.serve(&mut cache, &prompts[turn % 3], turn % 2 == 0);
            wrong += u32::from(out != known[turn % 3]);
        }
        assert!(wrong > 0, "{order:?} is not needed");
    }
}

#[test]
fn a_device_and_the_cpu_have_the_same_streams_and_objects() {
    let device = Setup::new(Some(emu()), &GROUPS);
    let cpu = Setup { backend: None, ..device.clone() };
    for (from, to) in [(&device, &device), (&cpu, &device), (&device, &cpu)] {
        a_stream(from, to);
    }
    let prompt = device.prompt(3, 3);
    let objects = [&device, &cpu].map(|setup| {
        let (shelf, mut cache) = (Arc::new(Remote::default()), setup.cache());
        attach(&mut cache, 0, vec![below(shelf.clone(), TierKind::Remote, true)]);
        setup.serve(&mut cache, &prompt, false);
        assert!(cache.flush_tiers(LONG));
        shelf.0.lock().unwrap().clone()
    });
    assert_eq!(objects[0].len(), device.objects(3));
    assert!(objects[0] == objects[1]);
    // A cache on the device takes those of the CPU.
    let shelf = Arc::new(Remote(std::sync::Mutex::new(objects[1].clone())));
    let mut cache = device.cache();
    attach(&mut cache, 60, vec![below(shelf, TierKind::Remote, false)]);
    prefetch(&mut cache, &prompt);
    let (cached, out) = device.serve(&mut cache, &prompt, true);
    assert_eq!(cached, 3 * device.tokens);
    assert!(out == device.expected(&prompt));
}
