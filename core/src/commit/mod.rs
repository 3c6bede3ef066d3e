//! Atomic commit: several participants end on the same side, whatever crashes.
//!
//! Promise: what a [`Participant`] promises and may rely on stands with it.

mod participant;

pub use participant::{Branch, Finish, Participant, TxId, Vote};
