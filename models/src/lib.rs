//! The protocols of atomic commit as models.
//!
//! Promise: every state that the rules allow is visited, up to the names of participants and recoverers; so a property
//! that holds here holds for each interleaving, each crash and each late or repeated message of so many participants.
//! What is checked are the rules, not the code that follows them: the code is tested against real servers. Each model
//! takes flaws on request, and the tests show that the checker finds each of them.
//!
//! - [`decision_record`]: what quorate does, two-phase commit whose decision is created at most once in the store; on
//!   request with a third phase.
//! - [`remote`]: the same with participants that are reached, and vote, through records of the store.
//! - [`three_phase`]: three-phase commit, by timeouts alone and with a decision record.
//! - [`classic`]: textbook two-phase commit, whose number of states is known: it checks the checker.
//!
//! Names of properties are those of the list that the tests of the library go by: P26 stability, P27 consistency, P28
//! validity, P29 recovery, P30 the in-doubt rule, P31 blocking without recovery, P32 the limits of three-phase commit, P33
//! one decision.

pub mod classic;
pub mod decision_record;
pub mod graph;
pub mod remote;
pub mod three_phase;

/// A decision about a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Decision {
    /// It takes effect everywhere.
    Commit,
    /// It takes effect nowhere.
    Abort,
}
