//! Loss: a hold that ends by itself, and what is promised about the moments around it.

use std::{
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use quorate_core::{
    Check, ErrorKind, Txn, Write,
    layer::{Chaos, Fault, Op, Rule, Stack, Verb, Wrap},
    session::DRIFT,
};
use tokio::time::{Instant, sleep};

use super::{coord, coord_over, short_coord, until_tickets};
use crate::{
    Clients,
    support::{SOON, cases, client, refused, spawn, within},
};

cases!("loss":
    a_dead_holder_is_followed_after_its_ttl_and_not_before,
    a_renewed_lock_is_held_for_many_ttls,
    the_guard_turns_invalid_before_anybody_else_is_granted,
    late_replies_do_not_stretch_the_deadline,
    a_dead_waiter_is_never_granted_and_its_call_returns,
    a_waiter_whose_lease_was_ended_at_the_server_is_never_granted,
    a_ticket_removed_behind_the_holders_back_is_noticed,
    protected_work_is_dropped_when_the_lock_is_lost,
    a_fenced_write_of_a_former_holder_is_refused,
    without_a_fence_the_same_write_goes_wrong,
    a_lost_hold_is_not_released_by_its_old_guard,
);

async fn a_dead_holder_is_followed_after_its_ttl_and_not_before(clients: Arc<dyn Clients>) {
    let (dead, next) = (short_coord(&clients).await, coord(&clients).await);
    let guard = dead.lock("job").acquire().await.expect("granted");
    let first = guard.token();
    let session = dead.session().await.expect("a session");
    next.session().await.expect("a session");
    session.orphan();
    let (deadline, orphaned) = (guard.deadline(), Instant::now());
    assert!(!guard.is_held(), "an orphaned session is over for its owner");
    let lag = next.profile().expiry_lag;
    let limit = session.ttl() + lag + SOON;
    let after = within(limit, "the hand-over", next.lock("job").acquire()).await.expect("granted");
    assert!(Instant::now() >= deadline, "granted before the dead holder's own deadline");
    let took = orphaned.elapsed();
    assert!(took <= session.ttl() + lag + Duration::from_secs(1), "hand-over took {took:?}");
    assert!(after.token() > first);
}

async fn a_renewed_lock_is_held_for_many_ttls(clients: Arc<dyn Clients>) {
    let (a, b) = (short_coord(&clients).await, coord(&clients).await);
    let guard = a.lock("job").acquire().await.expect("granted");
    let ttl = guard.session().ttl();
    let until = Instant::now() + (ttl * 3).max(Duration::from_secs(1));
    while Instant::now() < until {
        assert!(guard.is_held(), "the session renews itself");
        assert!(b.lock("job").try_acquire().await.expect("trying works").is_none());
        sleep(ttl / 4).await;
    }
    guard.release().await.expect("released");
}

/// The holder's renewals are all lost on the way; a waiter samples the holder's guard at the moment it is granted.
async fn the_guard_turns_invalid_before_anybody_else_is_granted(clients: Arc<dyn Clients>) {
    let refuse = Rule { fault: Fault::Refuse, probability: 1.0, verbs: vec![Verb::Renew, Verb::Revoke] };
    let cut_off = Stack::new(client(&clients).await).with(Chaos::new(1, vec![refuse])).build();
    let (a, b) = (coord_over(cut_off, clients.ttl()), coord(&clients).await);
    let guard = a.lock("job").acquire().await.expect("granted");
    let limit = guard.session().ttl() + b.profile().expiry_lag + SOON;
    let next = within(limit, "the hand-over", b.lock("job").acquire()).await.expect("granted");
    assert!(!guard.is_held(), "two guards of one lock are valid at once");
    assert!(guard.check().is_err_and(|e| e.kind() == ErrorKind::SessionLost));
    within(SOON, "the loss signal", guard.lost()).await;
    assert!(next.token() > guard.token());
    assert!(guard.release().await.is_err_and(|e| e.kind() == ErrorKind::SessionLost));
    assert!(next.is_held());
}

/// Notes when each request that is to confirm the lease leaves, and holds its reply back.
#[derive(Debug, Clone)]
struct LateReplies {
    sent: Arc<Mutex<Vec<Instant>>>,
    by: Duration,
}

impl Wrap for LateReplies {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> quorate_core::Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = quorate_core::Result<T>> + Send + 'a,
    {
        if !matches!(op.verb, Verb::Grant | Verb::Renew) {
            return call().await;
        }
        self.sent.lock().expect("no poison").push(Instant::now());
        let outcome = call().await;
        sleep(self.by).await;
        outcome
    }
}

async fn late_replies_do_not_stretch_the_deadline(clients: Arc<dyn Clients>) {
    let ttl = clients.ttl().max(Duration::from_secs(2));
    let late = LateReplies { sent: Arc::default(), by: ttl / 6 };
    let slow = Stack::new(client(&clients).await).with(late.clone()).build();
    let coord = coord_over(slow, ttl);
    let session = coord.session().await.expect("a session");
    let most = session.ttl().mul_f64(1.0 - DRIFT);
    let until = Instant::now() + session.ttl() * 4;
    while Instant::now() < until {
        // The deadline first: a request that leaves between the two looks only makes the bound wider.
        let deadline = session.deadline();
        let sent = *late.sent.lock().expect("no poison").last().expect("the grant was sent");
        assert!(deadline <= sent + most, "trusted {:?} longer than the request allows", deadline - (sent + most));
        assert!(session.is_live(), "replies that are late by a sixth of the ttl lose nothing");
        sleep(session.ttl() / 50).await;
    }
    let renewals = late.sent.lock().expect("no poison").len() - 1;
    assert!(renewals >= 6, "void: only {renewals} renewals");
}

async fn a_dead_waiter_is_never_granted_and_its_call_returns(clients: Arc<dyn Clients>) {
    let (holder, dead, next) = (coord(&clients).await, short_coord(&clients).await, coord(&clients).await);
    let guard = holder.lock("job").acquire().await.expect("granted");
    let session = dead.session().await.expect("a session");
    let mut doomed = spawn(async move { dead.lock("job").acquire().await });
    until_tickets(&holder, "job", 2).await;
    session.orphan();
    refused(doomed.soon("the waiter's call").await, ErrorKind::SessionLost, "acquire on a dead session");
    let mut waiting = spawn(async move { next.lock("job").acquire().await.expect("granted") });
    // The dead waiter's ticket goes with its lease; the holder's release then wakes the live one.
    guard.release().await.expect("released");
    let limit = session.ttl() + holder.profile().expiry_lag + SOON;
    drop(within(limit, "the live waiter", &mut waiting.0).await.expect("no panic"));
}

async fn a_waiter_whose_lease_was_ended_at_the_server_is_never_granted(clients: Arc<dyn Clients>) {
    let (holder, doomed) = (coord(&clients).await, coord(&clients).await);
    let guard = holder.lock("job").acquire().await.expect("granted");
    let session = doomed.session().await.expect("a session");
    let mut waiting = spawn(async move { doomed.lock("job").acquire().await });
    until_tickets(&holder, "job", 2).await;
    // The waiter does not know: its next renewal is ten seconds away.
    holder.backend().revoke(session.lease()).await.expect("revoked");
    guard.release().await.expect("released");
    refused(waiting.soon("the waiter's call").await, ErrorKind::SessionLost, "acquire on an ended lease");
}

async fn a_ticket_removed_behind_the_holders_back_is_noticed(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let guard = a.lock("job").acquire().await.expect("granted");
    let line = quorate_core::Dir::new(["lock", "job"]).expect("valid");
    let ticket = b.backend().line(&line).await.expect("a look").tickets.remove(0);
    let txn = Txn { checks: Vec::new(), writes: vec![Write::Leave(ticket)] };
    b.backend().commit(&txn).await.expect("removed");
    // Nobody asks: the guard is watched by itself.
    let removed = Instant::now();
    while guard.is_held() {
        assert!(removed.elapsed() < Duration::from_secs(4), "the loss was not noticed");
        sleep(Duration::from_millis(20)).await;
    }
    let newer = b.lock("job").acquire().await.expect("granted");
    assert!(guard.release().await.is_err_and(|e| e.kind() == ErrorKind::SessionLost));
    assert!(newer.is_held());
    newer.release().await.expect("the old guard's release did not touch it");
}

async fn protected_work_is_dropped_when_the_lock_is_lost(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let guard = a.lock("job").acquire().await.expect("granted");
    let alive = Arc::new(());
    let held = alive.clone();
    let mut working = spawn(async move {
        let work = async move {
            let _held = held;
            std::future::pending::<()>().await;
        };
        guard.protect(work).await
    });
    b.lock("job").break_holder().await.expect("breaking works").expect("held");
    refused(working.soon("protect").await, ErrorKind::SessionLost, "protect");
    assert_eq!(Arc::strong_count(&alive), 1, "the work was dropped");
}

async fn a_fenced_write_of_a_former_holder_is_refused(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let old = a.lock("job").acquire().await.expect("granted");
    let fence = old.fence();
    let kv = a.kv();
    kv.put_fenced(&fence, "row", "old").await.expect("the hold stands");
    // A fence survives being sent elsewhere.
    let text = serde_json::to_string(&fence).expect("JSON");
    let fence: quorate_core::Fence = serde_json::from_str(&text).expect("JSON");
    kv.put_fenced(&fence, "row", "old, elsewhere").await.expect("the hold stands");
    b.lock("job").break_holder().await.expect("breaking works").expect("held");
    let new = b.lock("job").acquire().await.expect("granted");
    b.kv().put_fenced(&new.fence(), "row", "new").await.expect("the hold stands");
    refused(kv.put_fenced(&fence, "row", "stale").await, ErrorKind::SessionLost, "a stale fenced write");
    assert_eq!(kv.get("row").await.expect("get").expect("exists").value, "new");
}

/// The control of the case above: it shows that the fence is what refuses.
async fn without_a_fence_the_same_write_goes_wrong(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let _old = a.lock("job").acquire().await.expect("granted");
    b.lock("job").break_holder().await.expect("breaking works").expect("held");
    let new = b.lock("job").acquire().await.expect("granted");
    b.kv().put_fenced(&new.fence(), "row", "new").await.expect("the hold stands");
    a.kv().put("row", "stale").await.expect("nothing stops it");
    assert_eq!(b.kv().get("row").await.expect("get").expect("exists").value, "stale");
}

async fn a_lost_hold_is_not_released_by_its_old_guard(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let old = a.lock("job").acquire().await.expect("granted");
    b.lock("job").break_holder().await.expect("breaking works").expect("held");
    let new = b.lock("job").acquire().await.expect("granted");
    // Dropped, not released: the drop owes a removal, of the old ticket only.
    drop(old);
    sleep(crate::support::QUIET).await;
    let check = Check::Standing {
        ticket: b
            .backend()
            .line(&quorate_core::Dir::new(["lock", "job"]).expect("valid"))
            .await
            .expect("a look")
            .tickets
            .remove(0),
        token: quorate_core::Revision(new.token().get()),
    };
    let still = b.backend().commit(&Txn { checks: vec![check], writes: Vec::new() }).await.expect("answered");
    assert!(still.applied, "the newer ticket still stands");
    new.release().await.expect("released");
}
