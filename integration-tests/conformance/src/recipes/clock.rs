//! The coordinator's clock against this machine's.
//!
//! Promise: the suite's servers run on this machine, or on one whose clock agrees with ours to within [`AGREED`].

use std::{sync::Arc, time::Duration};

use quorate_core::{
    CoordinatorClock,
    layer::{Stack, Verb},
};
use tokio::time::sleep;

use super::{coord, coord_over, counting::Counted, standard};
use crate::{
    Clients,
    support::{cases, client},
};

cases!("clock":
    the_servers_clock_is_told_in_steps_and_does_not_run_back,
    a_sample_is_one_call_and_the_bound_of_the_offset_holds,
    an_offset_is_shared_by_all_handles_and_asks_nobody,
);

/// By how much clocks that are kept by NTP may differ.
const AGREED: f64 = 0.05;

async fn the_servers_clock_is_told_in_steps_and_does_not_run_back(clients: Arc<dyn Clients>) {
    let backend = client(&clients).await;
    let Some(step) = backend.profile().clock else {
        let refused = backend.clock().await.expect_err("the profile says that there is no clock");
        assert_eq!(refused.kind(), quorate_core::ErrorKind::Unsupported, "{refused}");
        return;
    };
    let mut last = backend.clock().await.expect("told");
    for _ in 0..5 {
        sleep(Duration::from_millis(20)).await;
        let next = backend.clock().await.expect("told");
        assert_eq!(next.latest - next.earliest, step, "{next:?}");
        assert!(next.earliest >= last.earliest, "{last:?} {next:?}");
        last = next;
    }
}

/// Eight samples, an eighth of a second apart: one of them is near a tick of a clock that is told in seconds.
async fn sampled(clock: &CoordinatorClock) {
    for _ in 0..8 {
        let offset = clock.sample().await.expect("sampled");
        let off = offset.ahead_seconds.abs();
        assert!(off <= offset.error.as_secs_f64() + AGREED, "it is the same machine: {offset:?}");
        sleep(Duration::from_millis(125)).await;
    }
}

async fn a_sample_is_one_call_and_the_bound_of_the_offset_holds(clients: Arc<dyn Clients>) {
    let (counted, backend) = (Counted::default(), client(&clients).await);
    let step = backend.profile().clock;
    let counting = Stack::new(standard(backend)).with(counted.clone()).build();
    let clock = coord_over(counting, clients.ttl()).clock();
    if step.is_none() {
        clock.sample().await.expect_err("there is no clock");
        return;
    }
    sampled(&clock).await;
    assert_eq!(counted.work().into_iter().collect::<Vec<_>>(), [(Verb::Clock, 8)]);
    let offset = clock.offset().expect("sampled");
    let coarse = step.unwrap_or_default().as_secs_f64() / 4.0 + offset.round_trip.shortest.as_secs_f64() / 2.0;
    // What two clocks may drift apart in a second is a millisecond to either side.
    assert!(offset.error.as_secs_f64() <= coarse + 0.01, "{offset:?}");
}

async fn an_offset_is_shared_by_all_handles_and_asks_nobody(clients: Arc<dyn Clients>) {
    let coord = coord(&clients).await;
    assert_eq!(coord.clock().offset(), None, "nobody has asked");
    if coord.profile().clock.is_none() {
        return;
    }
    let sampled = coord.clock().sample().await.expect("sampled");
    let shown = coord.clone().clock().offset().expect("it was sampled by another handle");
    assert_eq!(shown.round_trip, sampled.round_trip);
    assert!(shown.error >= sampled.error, "it is older by now");
}
