//! What resting promises, on tokio's clock.

use std::{
    future::{pending, ready},
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use quorate_tower::{BoxError, Resting};
use tokio::time::{Instant, advance, sleep, timeout};
use tower::{
    Service, ServiceExt as _,
    balance::p2c::Balance,
    discover::ServiceList,
    load::{CompleteOnResponse, PeakEwma},
    service_fn,
    timeout::Timeout,
};

const SECOND: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_secs(2);

/// Does as it is told: `Ok` answers, `Err` fails.
fn obedient() -> impl Service<Result<u8, io::ErrorKind>, Response = u8, Error = io::Error> + Clone {
    service_fn(|told: Result<u8, io::ErrorKind>| ready(told.map_err(io::Error::from)))
}

async fn wait(service: &mut impl Service<Result<u8, io::ErrorKind>, Error = io::Error>) -> Duration {
    let started = Instant::now();
    service.ready().await.expect("it is never broken");
    started.elapsed()
}

#[tokio::test(start_paused = true)]
async fn after_a_failure_it_is_not_ready_for_the_pause_and_then_it_is() {
    let busy = |error: &io::Error| error.kind() != io::ErrorKind::NotFound;
    let mut service = Resting::new(obedient(), PAUSE, busy);
    for told in [Ok(1), Err(io::ErrorKind::NotFound), Ok(1)] {
        let _ = service.ready().await.expect("ready").call(told).await;
        assert_eq!(wait(&mut service).await, Duration::ZERO, "{told:?} is an answer");
    }
    for _ in 0..3 {
        let _ = service.ready().await.expect("ready").call(Err(io::ErrorKind::ConnectionRefused)).await;
        let mut clone = service.clone();
        advance(SECOND / 2).await;
        let (own, other) = tokio::join!(wait(&mut service), wait(&mut clone));
        for took in [own, other] {
            assert!(took >= SECOND * 3 / 2 && took < SECOND * 3 / 2 + SECOND / 50, "{took:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_last_failure_counts_also_for_whoever_sleeps_already() {
    let mut service = Resting::new(obedient(), PAUSE, |_| true);
    let late = service.ready().await.expect("ready").call(Err(io::ErrorKind::ConnectionReset));
    let _ = service.ready().await.expect("ready").call(Err(io::ErrorKind::ConnectionReset)).await;
    let mut waiting = service.clone();
    let waiting = tokio::spawn(async move { wait(&mut waiting).await });
    sleep(SECOND).await;
    let _ = late.await;
    let took = waiting.await.expect("no panic");
    assert!(took >= SECOND * 3 && took < SECOND * 3 + SECOND / 50, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_dropped_request_says_nothing_and_the_longest_pause_does_not_panic() {
    let hangs = service_fn(|(): ()| pending::<io::Result<()>>());
    let mut service = Resting::new(hangs, PAUSE, |_| true);
    assert!(timeout(SECOND, service.ready().await.expect("ready").call(())).await.is_err());
    assert!(service.ready().now_or_never().is_some());
    let mut service = Resting::new(obedient(), Duration::MAX, |_| true);
    let _ = service.ready().await.expect("ready").call(Err(io::ErrorKind::ConnectionReset)).await;
    assert!(timeout(SECOND * 86_400, service.ready()).await.is_err());
}

/// Of `others` fast ones and one that is broken, how many of 1,000 requests fail, and in what time.
async fn share_of_the_broken(resting: bool, hangs: bool) -> (u32, Duration) {
    let sent = Arc::new(Mutex::new([0_u32; 4]));
    let one = |place: usize| {
        let sent = Arc::clone(&sent);
        let service = service_fn(move |(): ()| -> BoxFuture<'static, io::Result<()>> {
            sent.lock().expect("no panic")[place] += 1;
            Box::pin(async move {
                match (place, hangs) {
                    (0, false) => Err(io::ErrorKind::ConnectionRefused.into()),
                    (0, true) => pending().await,
                    _ => {
                        sleep(Duration::from_millis(10)).await;
                        Ok(())
                    }
                }
            })
        });
        let pause = if resting { 5 * SECOND } else { Duration::ZERO };
        let service = Resting::<_, BoxError>::new(Timeout::new(service, SECOND / 10), pause, |_| true);
        PeakEwma::new(service, Duration::from_millis(10), 1e9, CompleteOnResponse::default())
    };
    let mut balance = Balance::new(ServiceList::new((0..4).map(one).collect::<Vec<_>>()));
    let failed = AtomicU32::new(0);
    let started = Instant::now();
    for _ in 0..1_000 {
        if balance.ready().await.expect("ready").call(()).await.is_err() {
            failed.fetch_add(1, Ordering::Relaxed);
        }
    }
    (failed.into_inner(), started.elapsed())
}

#[tokio::test(start_paused = true)]
async fn one_that_fails_at_once_or_hangs_gets_one_request_in_each_pause() {
    let (without, _) = share_of_the_broken(false, false).await;
    assert!(without > 300, "the fault bites: failing at once looks fast, and {without} of 1,000 go there");
    for hangs in [false, true] {
        let (failed, took) = share_of_the_broken(true, hangs).await;
        let pauses = took.as_secs() / 5 + 1;
        assert!((1..=pauses).contains(&u64::from(failed)), "hangs: {hangs}, {failed} in {took:?}");
    }
}
