//! Ejecting instances whose requests fail.

use std::{sync::Arc, time::Duration};

use super::{Inner, member::State};

/// When an instance is ejected, and for how long.
///
/// An instance whose requests fail several times in a row, by [`Pick::failure`](super::Pick::failure), is not picked
/// for a while. Then it is, at once with its full share, and a further row of failures ejects it for twice as long.
/// Requests that were picked before it came back do not count against it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ejection {
    /// After this many failures in a row; at least one. Five by default.
    pub after: u32,
    /// How long the first ejection lasts; each further one twice as long as the one before. 30 seconds by default.
    pub base: Duration,
    /// How long an ejection lasts at most; also, how long an instance must have stayed since it came back for the next
    /// ejection to last `base` again. 5 minutes by default.
    pub cap: Duration,
    /// How many of the passing instances may be ejected at a time, in percent, rounded down; so that a general outage,
    /// or a fault of this client's own, does not empty the set. With 50, the default, a single instance never is. With
    /// 100, all may be, and then nothing is picked.
    pub max_percent: u32,
}

impl Default for Ejection {
    fn default() -> Self {
        Self { after: 5, base: Duration::from_secs(30), cap: Duration::from_secs(300), max_percent: 50 }
    }
}

impl Ejection {
    pub(super) fn length(&self, ejections_before: u32) -> Duration {
        self.base.saturating_mul(1_u32.checked_shl(ejections_before).unwrap_or(u32::MAX)).min(self.cap)
    }

    /// How many of so many may be ejected.
    pub(super) fn allowed(&self, members: usize) -> usize {
        let allowed = members as u64 * u64::from(self.max_percent.min(100)) / 100;
        usize::try_from(allowed).unwrap_or(members)
    }
}

impl Inner {
    /// Ejects the instance of this state, unless it has left, is out already, or too many are.
    pub(super) fn eject(&self, state: &Arc<State>, ejection: &Ejection, now: u64) {
        let mut roster = self.roster();
        let passing = roster.passing();
        let out = passing.iter().filter(|member| member.state.is_ejected(now)).count();
        let Some(member) = passing.iter().find(|member| Arc::ptr_eq(&member.state, state)) else { return };
        if state.is_ejected(now) || out >= ejection.allowed(passing.len()) {
            return;
        }
        let length = state.eject(ejection, now);
        tracing::warn!(instance = %member.instance, ?length, "instance ejected: its requests fail");
        let view = roster.view(&self.settings, now);
        self.view.store(Arc::new(view));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ejections_double_up_to_the_cap() {
        let ejection = Ejection::default();
        let lengths = [0, 1, 2, 3, 4, 31, 32, u32::MAX].map(|before| ejection.length(before).as_secs());
        assert_eq!(lengths, [30, 60, 120, 240, 300, 300, 300, 300]);
    }

    #[test]
    fn shares_are_rounded_down() {
        let allowed = |percent, members| Ejection { max_percent: percent, ..Ejection::default() }.allowed(members);
        assert_eq!([0, 1, 2, 3, 10].map(|members| allowed(50, members)), [0, 0, 1, 1, 5]);
        assert_eq!((allowed(0, 10), allowed(100, 10), allowed(u32::MAX, 10)), (0, 10, 10));
    }
}
