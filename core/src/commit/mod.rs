//! Atomic commit: several participants end on the same side, whatever crashes.
//!
//! Promise: no participant of a transaction commits while another aborts. A transaction commits only if every participant
//! has voted for it; once the decision stands in the coordinator's store, it is carried out to the end, by whoever is
//! left to do it. What each side owes to the other stands with [`Participant`].
//!
//! ```
//! # use std::sync::Arc;
//! # use quorate_core::{Coordinator, commit::{Outcome, Participant}};
//! # async fn show(coord: Coordinator, ledger: Arc<dyn Participant>, stock: Arc<dyn Participant>) -> quorate_core::Result<()> {
//! let payments = coord.transactions("payments")?;
//! payments.enlist("ledger", ledger)?; // this process can drive it, and recover it
//! payments.enlist("stock", stock)?;
//! let recoverer = payments.recover(); // in every process: it finishes what others left
//!
//! let outcome = payments.begin().branch("ledger", "-30").branch("stock", "+1").remote("mailer", "sold").commit().await?;
//! println!("{}: {}", outcome.id, outcome.decision);
//! # drop(recoverer); Ok(()) }
//! ```
//!
//! # The protocol
//! Two-phase commit with presumed abort, whose decision is a record in a store with consensus, created at most once: so
//! the coordinator that took it may die, and several that recover cannot decide differently. This is what removes the
//! blocking of classic two-phase commit, by the idea of Gray and Lamport, "Consensus on Transaction Commit" (2006).
//!
//! ```text
//! driver                         store                              participants
//!   begin ─────────────────────► tx (and the work of remote ones)                    1 round trip
//!   prepare, all at once ──────────────────────────────────────────► votes
//!   decide ────────────────────► decision, only if there is none                     1 round trip
//!                                and the tx is not forgotten
//!   commit or abort ───────────────────────────────────────────────► confirmed
//!   forget ────────────────────► all records deleted                                 1 round trip
//! ```
//!
//! The number of round trips to the store does not depend on the number of participants, as long as they fit into one
//! transaction of the backend ([`Profile::max_txn`](crate::Profile::max_txn)).
//!
//! # Who is in doubt, and for how long
//! A participant that has voted yes keeps what it locked until the decision reaches it. If the driver dies, a
//! [`Recoverer`] takes over once the driver's session has ended; undecided transactions are aborted, decided ones are
//! carried out. Without any recoverer alive, or with the store unreachable, participants stay in doubt: nobody decides
//! alone.
//!
//! # As durable as the store
//! On etcd, ZooKeeper and Consul the decision survives the loss of a minority of servers. On Redis it is as durable as its
//! persistence and replication: a failover that forgets a decision can split a transaction that was being carried out. On
//! the memory backend it lives as long as the process.
//!
//! # On the wire
//! JSON with a version, on no lease except the driver's key; `<id>` is 32 hexadecimal digits:
//!
//! | key | holds |
//! |---|---|
//! | `tx/<group>/<id>` | `{"v":1,"driver":…,"within_ms":…,"since_ms":…,"branches":[{"name":…,"body":…,"remote":…}]}` |
//! | `txdecision/<group>/<id>` | `{"v":1,"decision":"commit" or "abort","why":…}` |
//! | `txready/<group>/<id>` | `{"v":1}`: all are in favour; only with [three phases](Protocol::ThreePhase) |
//! | `txdriver/<group>/<driver>` | stands while the driver lives |
//! | `txwork/<group>/<participant>/<id>` | for a remote participant: `{"v":1,"driver":…,"state":"prepare", "commit" or "abort","body":…}`; it deletes the key to confirm |
//! | `txvote/<group>/<driver>/<id>/<participant>` | its answers: `{"v":1,"says":"yes", "no", "read_only", "failed" or "done","why":…}` |
//! | `txparked/<group>/<id>/<participant>` | a heuristic outcome: `{"v":1,"decision":…,"what":…}` |
//!
//! Bodies are base64. A record of a later version, or of somebody else, is left alone and listed by
//! [`Transactions::in_doubt`].

mod ballot;
mod deliver;
mod desk;
mod doubt;
mod drive;
mod keys;
mod keys_record;
mod log;
mod participant;
mod record;
mod recover;
mod serve;
mod steps;
mod transaction;

pub use doubt::{Doubt, DoubtState};
pub use keys::{KeyWork, Keys, consistent_read};
pub use participant::{Branch, Finish, Participant, TxId, Vote};
pub use record::Decision;
pub use recover::{RecoverOptions, Recoverer};
pub use serve::Serving;
pub use steps::Step;
pub use transaction::{Outcome, Protocol, Refusal, Transaction, Transactions, TransactionsOptions, TxStatus};
