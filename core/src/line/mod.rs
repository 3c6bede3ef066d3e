//! Standing in line: what lock and election share.
//!
//! Promise: however an attempt ends (granted, refused, failed, dropped at any await), either a [`Held`] owns the ticket
//! or the session owes its removal. Nobody is granted anything by a ticket that is gone. Joining an empty line is one
//! round trip, leaving is one, a hand-off is one notification and one look.

mod fence;
mod held;
mod join;
mod turn;

use std::time::{SystemTime, UNIX_EPOCH};

pub use fence::Fence;
pub(crate) use held::{Held, Traces, run_while};
pub(crate) use join::{Claim, Wish, join};
pub(crate) use turn::wait_turn;

use crate::error::ErrorKind;

/// Whether an error of a look or a wait is worth waiting out for as long as the session lives.
fn passing(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Unavailable | ErrorKind::Ambiguous | ErrorKind::Backend)
}

/// The wall clock in milliseconds since 1970: for people who look at a ticket, never for decisions.
pub(crate) fn wall_clock_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
