//! A service's instances as a stream of changes.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use futures_util::{
    Stream, StreamExt as _,
    stream::{self, BoxStream},
};
use quorate_core::{
    Instance,
    discovery::{Instances, Service},
};
use tokio::time::{Sleep, sleep};
use tower::discover::Change;

/// Any error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What a balancer knows an instance by: its id.
pub type Key = Arc<str>;

/// How long a factory that failed is left alone, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// The instances of a service as tower's [`Discover`](tower::discover::Discover), each made into a service by a factory.
///
/// It goes by the difference between what the service shows now and what it has handed out, so a set that comes again
/// yields nothing and sets in between may be skipped. An instance that is new, passes again, or says something else of
/// itself is inserted, in the last case in the place of the old one; one that has gone, drains or fails is removed. The
/// weight is not looked at, because tower's balancers know none; see [`remake_for_weight`](Self::remake_for_weight).
///
/// While the coordinator cannot be reached there are no changes. The stream never ends and yields no error.
///
/// An instance that the factory fails for is left out, and tried again with pauses from a tenth of a second to ten, and
/// when its record changes; if it had a service for an older record, that is removed. Others are not concerned.
///
/// A balancer drops a service whose `poll_ready` fails, and is not told of the instance again while nothing about it
/// changes. Services must connect anew by themselves, as those of `Endpoint::connect_lazy` in tonic do, or
/// `tower::reconnect`.
///
/// # Cancel safety
/// A change is taken only when `poll_next` returns it.
pub struct Discover<S> {
    sets: BoxStream<'static, Instances>,
    make: Factory<S>,
    skipped: Skipped,
    by_weight: bool,
    now: Instances,
    /// What each service that was handed out, and not removed since, was made from. By id.
    made: BTreeMap<String, Arc<Instance>>,
    /// What the factory failed for. None of them is in `made`.
    failed: BTreeMap<String, Arc<Instance>>,
    /// Ids that are to be looked at. Never more than `now` and `made` have together.
    due: VecDeque<String>,
    /// When those that failed are due again. Is there while any is.
    again: Option<Pin<Box<Sleep>>>,
    pauses: ExponentialBackoff,
}

type Factory<S> = Box<dyn FnMut(&Instance) -> Result<S, BoxError> + Send>;
type Skipped = Box<dyn FnMut(&Instance, &BoxError) + Send>;

impl<S> Discover<S> {
    /// Follows the service from the set that it shows now. `make` must not block: it is called while the balancer is
    /// polled.
    pub fn new<E: Into<BoxError>>(
        service: &Service,
        mut make: impl FnMut(&Instance) -> Result<S, E> + Send + 'static,
    ) -> Self {
        let now = service.now();
        // A clone hears of what its original has not been given yet, and of the current set only once.
        let sets = stream::unfold(service.clone(), |mut service| async {
            let set = service.changed().await;
            Some((set, service))
        });
        let mut this = Self {
            sets: sets.boxed(),
            make: Box::new(move |instance| make(instance).map_err(Into::into)),
            skipped: Box::new(|_, _| {}),
            by_weight: false,
            now,
            made: BTreeMap::new(),
            failed: BTreeMap::new(),
            due: VecDeque::new(),
            again: None,
            pauses: pauses(),
        };
        this.compare();
        this
    }

    /// Makes a service anew also where nothing but the weight of its instance has changed.
    #[must_use]
    pub fn remake_for_weight(mut self) -> Self {
        self.by_weight = true;
        self
    }

    /// Is told of each failure of the factory, beside the log.
    #[must_use]
    pub fn on_skipped(mut self, skipped: impl FnMut(&Instance, &BoxError) + Send + 'static) -> Self {
        self.skipped = Box::new(skipped);
        self
    }

    /// Notes whose service differs from what it should be: first those that must go.
    fn compare(&mut self) {
        let now = &self.now;
        self.failed.retain(|id, _| wanted(now, id).is_some());
        self.due.clear();
        self.due.extend(self.made.keys().filter(|id| wanted(now, id).is_none()).cloned());
        for instance in now.passing() {
            let known = self.made.get(&instance.id).or_else(|| self.failed.get(&instance.id));
            if known.is_none_or(|known| self.differs(known, instance)) {
                self.due.push_back(instance.id.clone());
            }
        }
    }

    fn differs(&self, old: &Arc<Instance>, new: &Arc<Instance>) -> bool {
        if Arc::ptr_eq(old, new) || old == new {
            return false;
        }
        self.by_weight || old.weight == new.weight || Instance::clone(old).weight(new.weight) != **new
    }

    /// Makes one instance's service what it should be, if it is not.
    fn settle(&mut self, id: String) -> Option<Change<Key, S>> {
        let key = Key::from(id.as_str());
        let Some(instance) = wanted(&self.now, &id).cloned() else {
            return self.made.remove(&id).map(|_| Change::Remove(key));
        };
        match (self.make)(&instance) {
            Ok(service) => {
                self.failed.remove(&id);
                self.made.insert(id, instance);
                Some(Change::Insert(key, service))
            }
            Err(error) => {
                tracing::warn!(%instance, %error, "an instance is left out: no service could be made for it");
                (self.skipped)(&instance, &error);
                self.failed.insert(id.clone(), instance);
                self.made.remove(&id).map(|_| Change::Remove(key))
            }
        }
    }

    /// Whether those that failed are due again.
    fn poll_again(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.failed.is_empty() {
            (self.again, self.pauses) = (None, pauses());
            return Poll::Pending;
        }
        let pauses = &mut self.pauses;
        let again = self.again.get_or_insert_with(|| Box::pin(sleep(pauses.next().unwrap_or(RETRY.1))));
        std::task::ready!(again.as_mut().poll(cx));
        self.again = None;
        Poll::Ready(())
    }
}

/// The instance, if it takes requests.
fn wanted<'a>(now: &'a Instances, id: &str) -> Option<&'a Arc<Instance>> {
    now.get(id).filter(|instance| instance.is_passing())
}

fn pauses() -> ExponentialBackoff {
    let pauses = ExponentialBuilder::default().with_min_delay(RETRY.0).with_max_delay(RETRY.1);
    pauses.with_jitter().without_max_times().build()
}

impl<S> Stream for Discover<S> {
    type Item = Result<Change<Key, S>, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            // The newest set first, so that nobody is handed out who is known to have gone.
            while let Poll::Ready(Some(set)) = this.sets.poll_next_unpin(cx) {
                this.now = set;
                this.compare();
            }
            while let Some(id) = this.due.pop_front() {
                if let Some(change) = this.settle(id) {
                    return Poll::Ready(Some(Ok(change)));
                }
            }
            std::task::ready!(this.poll_again(cx));
            this.due.extend(this.failed.keys().cloned());
        }
    }
}

impl<S> fmt::Debug for Discover<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { made, failed, due, .. } = self;
        let (made, failed) = (made.keys().collect::<Vec<_>>(), failed.keys().collect::<Vec<_>>());
        f.debug_struct("Discover").field("made", &made).field("failed", &failed).field("due", due).finish()
    }
}
