//! A service that rests after a failure.

use std::{
    fmt,
    future::Future as _,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::{TryFutureExt as _, future::InspectErr};
use tokio::time::{Instant, Sleep, sleep_until};
use tower::Service;

/// A service that is not ready for a while after a request has failed, so that a balancer sends requests to others.
///
/// tower's balancers know loads, not failures: an instance that refuses every request at once looks fast and draws all
/// of them to itself. Put this around each instance's service, below the load and above a `tower::timeout::Timeout`, so
/// that an instance that hangs rests as well. If all instances rest, the balancer waits for the first that is ready
/// again; nothing is sent meanwhile, so give the whole call a limit.
///
/// Clones rest together.
///
/// # Cancel safety
/// A response future that is dropped says nothing about the service.
pub struct Resting<S, E> {
    inner: S,
    pause: Duration,
    failed: fn(&E) -> bool,
    rest: Arc<Rest>,
    /// Of this clone; is there while it waits for the end of the rest.
    sleep: Option<Pin<Box<Sleep>>>,
}

/// The response of a [`Resting`] service.
pub type ResponseFuture<F, E> = InspectErr<F, Box<dyn FnOnce(&E) + Send>>;

/// Until when; it only rises.
#[derive(Debug, Default)]
struct Rest(Mutex<Option<Instant>>);

impl Rest {
    fn begin(&self, pause: Duration) {
        // A pause beyond the clock's end is no pause that anybody meant; a month is as good.
        let until = Instant::now() + pause.min(Duration::from_secs(30 * 86_400));
        let mut rest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *rest = (*rest).max(Some(until));
    }

    /// When it ends, if it has not.
    fn until(&self) -> Option<Instant> {
        let rest = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rest.filter(|until| Instant::now() < *until)
    }
}

impl<S, E> Resting<S, E> {
    /// Rests for `pause` after each error of which `failed` says that the instance has failed, as opposed to an answer
    /// that is an error. Of several failures the last counts. After the rest it is ready again at once, and the next
    /// failure makes it rest again.
    pub fn new(inner: S, pause: Duration, failed: fn(&E) -> bool) -> Self {
        Self { inner, pause, failed, rest: Arc::default(), sleep: None }
    }
}

impl<S, E, Request> Service<Request> for Resting<S, E>
where
    S: Service<Request, Error = E>,
    E: 'static,
{
    type Response = S::Response;
    type Error = E;
    type Future = ResponseFuture<S::Future, E>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), E>> {
        while let Some(until) = self.rest.until() {
            // It may have become longer since the sleep began.
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(until)));
            ready!(sleep.as_mut().poll(cx));
            self.sleep = None;
        }
        self.sleep = None;
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let (rest, pause, failed) = (Arc::clone(&self.rest), self.pause, self.failed);
        let note = move |error: &E| {
            if failed(error) {
                rest.begin(pause);
            }
        };
        self.inner.call(request).inspect_err(Box::new(note))
    }
}

impl<S: Clone, E> Clone for Resting<S, E> {
    fn clone(&self) -> Self {
        let (inner, rest) = (self.inner.clone(), Arc::clone(&self.rest));
        Self { inner, pause: self.pause, failed: self.failed, rest, sleep: None }
    }
}

impl<S: fmt::Debug, E> fmt::Debug for Resting<S, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rests = self.rest.until().is_some();
        f.debug_struct("Resting")
            .field("inner", &self.inner)
            .field("pause", &self.pause)
            .field("rests", &rests)
            .finish()
    }
}
