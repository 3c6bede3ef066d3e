//! What was taken away, and may come back with a primary that has not heard of it.
//!
//! Promise: a ticket or a record that this client has taken away stays away, also if the server that confirmed it dies
//! before its replica knew, or restarts from an older state. Otherwise a lock that was released would stay taken for as long as
//! the session lives, and nobody would know of it.
//!
//! So what was taken away lately is taken away once more on every new connection. That is the same as once: each transaction
//! is remembered with its conditions, the names of tickets are never used twice, and revisions are not either.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use quorate_core::{Check, ErrorKind, Txn, Write};
use tokio::time::Instant;

use crate::{link::Server, txn};

/// Longer than replicas lag and failovers take; a primary that was cut off for longer takes its own writes along.
const REMEMBERED_FOR: Duration = Duration::from_secs(60);
/// At most so many transactions, of some hundred bytes each.
const CAPACITY: usize = 16 * 1024;

/// The last transactions that only took away, oldest first; at most [`CAPACITY`].
#[derive(Debug, Default)]
pub(crate) struct Departed(Mutex<VecDeque<(Instant, Txn)>>);

/// Whether it may be done again at any time: it takes away, and only what is still the same.
fn only_takes_away(txn: &Txn) -> bool {
    let leaves_only = txn.writes.iter().all(|write| matches!(write, Write::Leave(_)));
    let takes_only = txn.writes.iter().all(|write| !matches!(write, Write::Put { .. }));
    let is_guarded = txn.checks.iter().any(|check| !matches!(check, Check::Absent(_)));
    !txn.writes.is_empty() && takes_only && (leaves_only || is_guarded)
}

impl Departed {
    fn kept(&self) -> MutexGuard<'_, VecDeque<(Instant, Txn)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what the server has confirmed.
    pub(crate) fn note(&self, txn: &Txn) {
        if !only_takes_away(txn) {
            return;
        }
        let (now, mut kept) = (Instant::now(), self.kept());
        while kept.len() >= CAPACITY || kept.front().is_some_and(|(at, _)| now - *at > REMEMBERED_FOR) {
            kept.pop_front();
        }
        kept.push_back((now, txn.clone()));
    }

    /// Takes everything away again that was taken away lately. Ends early if the link breaks: the next one begins anew.
    pub(crate) async fn again(&self, server: &Server) {
        let lately: Vec<Txn> = {
            let now = Instant::now();
            self.kept().iter().filter(|(at, _)| now - *at <= REMEMBERED_FOR).map(|(_, txn)| txn.clone()).collect()
        };
        let count = lately.len();
        for txn in lately {
            match txn::send(server, &txn).await {
                Ok(commit) if commit.applied && !txn.checks.is_empty() => {
                    tracing::warn!(%txn, "it had come back with another server, and was taken away again");
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous) => {
                    tracing::debug!(%error, "the connection was lost before everything was taken away again");
                    return;
                }
                Err(error) => tracing::debug!(%txn, %error, "it cannot be taken away again"),
            }
        }
        tracing::debug!(count, "what was taken away lately is away");
    }
}

#[cfg(test)]
mod tests {
    use quorate_core::{Dir, Key, Revision, Ticket, TicketKind};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_what_can_be_done_twice_is_kept_and_not_for_ever() {
        let line = Dir::new(["lock", "a"]).expect("a good name");
        let ticket = Ticket { line: line.clone(), name: "l-1".into(), kind: TicketKind::Lock };
        let key = Key::new(&line, "k").expect("a good name");
        let leave = Write::Leave(ticket.clone());
        let (delete, put) =
            (Write::Delete(key.clone()), Write::Put { key: key.clone(), value: Default::default(), lease: None });
        let standing = Check::Standing { ticket, token: Revision(1) };
        let txn = |checks: &[&Check], writes: &[&Write]| Txn {
            checks: checks.iter().map(|c| (*c).clone()).collect(),
            writes: writes.iter().map(|w| (*w).clone()).collect(),
        };
        let unchanged = Check::Unchanged { key: key.clone(), modified: Revision(2) };
        let departed = Departed::default();
        for kept in [
            txn(&[], &[&leave]),
            txn(&[&standing], &[&leave]),
            txn(&[&standing], &[&leave, &delete]),
            txn(&[&unchanged], &[&delete]),
        ] {
            departed.note(&kept);
        }
        assert_eq!(departed.kept().len(), 4);
        for not in [
            txn(&[], &[]),
            txn(&[&standing], &[]),
            // Somebody else may have made it anew.
            txn(&[], &[&delete]),
            txn(&[&Check::Absent(key.clone())], &[&delete]),
            txn(&[&unchanged], &[&put]),
        ] {
            departed.note(&not);
        }
        assert_eq!(departed.kept().len(), 4);
        tokio::time::advance(REMEMBERED_FOR + Duration::from_secs(1)).await;
        departed.note(&txn(&[], &[&leave]));
        assert_eq!(departed.kept().len(), 1);
        for _ in 0..2 * CAPACITY {
            departed.note(&txn(&[], &[&leave]));
        }
        assert_eq!(departed.kept().len(), CAPACITY);
    }
}
