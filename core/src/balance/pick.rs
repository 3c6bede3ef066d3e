//! The ticket of one request.

use std::{fmt, ops::Deref, sync::Arc};

use tokio::time::Instant;

use super::member::{Member, State};
use crate::discovery::Instance;

/// One request on its way to an instance: in flight from the pick until this is reported or dropped.
///
/// Report how it ended with [`success`](Self::success) or [`failure`](Self::failure); the latency is the time between
/// the pick and the report. Dropped, it counts as neither: as a request that was never sent, or that the caller gave up
/// for reasons of its own. So a request that ran into a limit must be reported as a failure, or an instance that hangs
/// is never ejected; [`Balancer::call`](super::Balancer::call) sees to that.
#[must_use = "dropping it ends the request without a report"]
pub struct Pick {
    member: Arc<Member>,
    started: Instant,
}

impl Pick {
    pub(super) fn new(member: Arc<Member>, started: Instant) -> Self {
        member.state.begin();
        Self { member, started }
    }

    pub(super) fn state(&self) -> &Arc<State> {
        &self.member.state
    }

    /// Where to send the request.
    pub fn instance(&self) -> &Arc<Instance> {
        &self.member.instance
    }

    /// The instance has answered: whatever the answer says, it is one that a working instance gives.
    pub fn success(self) {
        self.member.state.succeeded(self.started, Instant::now());
    }

    /// The instance has not answered, or as a broken one does. Counts towards its
    /// [`Ejection`](super::Ejection), and for [`PeakEwma`](super::PeakEwma) as a long latency.
    pub fn failure(self) {
        self.member.state.failed(self.started, Instant::now());
    }
}

impl Deref for Pick {
    type Target = Instance;

    fn deref(&self) -> &Instance {
        &self.member.instance
    }
}

impl Drop for Pick {
    fn drop(&mut self) {
        self.member.state.end();
    }
}

impl fmt::Debug for Pick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pick").field(&format_args!("{}", self.member.instance)).finish()
    }
}
