//! The core of quorate: the waist that coordinators implement, and everything that stands on it.
//!
//! Promise: nothing here knows a client library or names a backend; what is written over the waist means the
//! same on all of them. Applications use the facade crate `quorate`; this crate is for those who write a
//! backend or a recipe.

pub mod backend;
pub mod balance;
pub mod clock;
pub mod commit;
pub mod config;
pub mod coordinator;
pub mod detect;
pub mod discovery;
pub mod election;
pub mod endpoints;
pub mod error;
pub mod group;
pub mod hash;
pub mod heartbeat;
pub mod key;
pub mod kv;
pub mod layer;
pub mod lock;
pub mod partition;
pub mod presence;
pub mod session;
pub mod watch;

mod line;

pub use backend::{
    Backend, Check, Commit, Enqueue, Entry, Fencing, Front, Lease, LeaseId, Line, Nonce, Place, Profile, Revision,
    ServerClock, Snapshot, Ticket, TicketKind, Txn, Write,
};
pub use clock::{ClockOffset, CoordinatorClock, RoundTrip};
pub use config::{Config, Secret, Tls};
pub use coordinator::Coordinator;
pub use discovery::{Instance, Registration, Service};
pub use election::{Candidate, Election, Leader, Leadership};
pub use error::{Error, ErrorKind, Result};
pub use key::{Dir, Key, KeyRange, MAX_NAME};
pub use kv::{Kv, KvEvent, Swap, TxnOutcome};
pub use lock::{Fence, FencingToken, Lock, LockGuard, LockStatus};
pub use session::{Session, SessionOptions, SessionState};
pub use watch::{Watch, WatchEvent, WatchSender};
