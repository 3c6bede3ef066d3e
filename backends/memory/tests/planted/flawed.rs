//! A backend that breaks one promise, chosen by [`Flaw`], and keeps all others.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use quorate_core::{
    Backend, Check, Commit, Dir, Enqueue, Error, ErrorKind, Front, Key, KeyRange, Lease, LeaseId, Line, Nonce, Place,
    Profile, Result, Revision, ServerClock, Snapshot, Ticket, TicketKind, Txn, Watch, WatchEvent, Write,
    watch::channel,
};
use quorate_memory::Memory;
use tokio::{sync::Notify, time::sleep};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    LastComeFirstServed,
    FarthestAheadFirst,
    NobodyIsEverAhead,
    TokensFall,
    TokensRestartWithEachLine,
    WakeUpLostBetweenLookAndWait,
    WaitReturnsAtOnce,
    WaitEndsOnlyByTimer,
    WaitIgnoresEndOfLease,
    WritesApplyOneByOne,
    ChecksAreIgnored,
    CulpritIsAlwaysTheFirst,
    AnyRevisionWillDo,
    StandingIsNotChecked,
    TokenIsNotChecked,
    WatchKeepsTheLastChange,
    WatchTellsOldVersionsAgain,
    WatchTellsTwice,
    WatchStartsWithoutReset,
    WatchLosesWhatIsTooMuch,
    WatchTellsOfNeighbours,
    WatchMissesDeletions,
    ClockIsMinutesOff,
    ClockRunsBack,
    ClockIsCoarserThanSaid,
    LeasesEndEarly,
    LeasesEndLate,
    LeasesNeverEnd,
    TtlIsNotPassedOn,
    RenewalDoesNothing,
    DeadLeasesAreRenewed,
    DeadLeasesTakeKeys,
    RevokeDoesNothing,
    FirstLeaseKeepsTheKey,
    NonceIsIgnored,
    TryJoinsAsFirst,
    TryLeavesItsTicket,
    LeavingTakesTheFront,
    GoneTicketsStandFirst,
    KindsAreForgotten,
    NamesFoldCase,
    PrefixesEndAtASlash,
    ReadsAreOld,
    ReadsAreUnordered,
    ReadsStopAtAHundred,
    RevisionsCountPerKey,
    LargeValuesAreCut,
    LargeIsTheServersError,
    DuplicatesAreTaken,
    DeletedKeysReadAsEmpty,
    EmptyLinesKeepAFront,
    FrontsHaveNoValue,
    LeasesShareAName,
    LinesFoldCase,
    RevokingTwiceFails,
    ProfileDeclaresLess,
}

use Flaw::*;

/// What flawed clients of one store have in common.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    left: Notify,
    leases: Mutex<HashMap<Key, LeaseId>>,
    versions: Mutex<HashMap<Key, Vec<u64>>>,
    old: Mutex<HashMap<KeyRange, Snapshot>>,
    tokens: Mutex<HashMap<Dir, Vec<u64>>>,
    granted: Mutex<Option<Lease>>,
    clock: Mutex<Duration>,
}

#[derive(Debug)]
pub(crate) struct Flawed {
    pub(crate) inner: Arc<Memory>,
    pub(crate) flaw: Option<Flaw>,
    pub(crate) shared: Arc<Shared>,
}

impl Flawed {
    fn is(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    /// What the place looks like through the flaw.
    async fn bend(&self, mut place: Place, depth: usize) -> Result<Place> {
        match self.flaw {
            Some(LastComeFirstServed) => {
                let tickets = self.inner.line(&place.ticket.line).await?.tickets;
                place.ahead =
                    tickets.into_iter().skip_while(|t| *t != place.ticket).skip(1).take(depth.max(1)).collect();
            }
            Some(FarthestAheadFirst) => {
                let tickets = self.inner.line(&place.ticket.line).await?.tickets;
                place.ahead = tickets.into_iter().take_while(|t| *t != place.ticket).take(depth.max(1)).collect();
            }
            Some(NobodyIsEverAhead) => place.ahead.clear(),
            Some(KindsAreForgotten) => {
                for ticket in place.ahead.iter_mut().chain([&mut place.ticket]) {
                    ticket.kind = TicketKind::Lock;
                }
            }
            _ => {}
        }
        place.token = self.token_out(&place.ticket.line, place.token);
        Ok(place)
    }

    fn token_out(&self, line: &Dir, token: Revision) -> Revision {
        match self.flaw {
            Some(TokensFall) => Revision(u64::MAX / 2 - token.0),
            Some(TokensRestartWithEachLine) => {
                let mut tokens = self.shared.tokens.lock().unwrap();
                let known = tokens.entry(line.clone()).or_default();
                let at = known.iter().position(|t| *t == token.0).unwrap_or_else(|| {
                    known.push(token.0);
                    known.len() - 1
                });
                Revision(at as u64 + 1)
            }
            _ => token,
        }
    }

    fn token_in(&self, line: &Dir, token: Revision) -> Revision {
        match self.flaw {
            Some(TokensFall) => Revision((u64::MAX / 2).wrapping_sub(token.0)),
            Some(TokensRestartWithEachLine) => {
                let tokens = self.shared.tokens.lock().unwrap();
                let at =
                    token.0.checked_sub(1).and_then(|at| tokens.get(line)?.get(usize::try_from(at).ok()?).copied());
                Revision(at.unwrap_or(0))
            }
            _ => token,
        }
    }

    fn check(&self, check: &Check) -> Option<Check> {
        match (self.flaw, check) {
            (Some(ChecksAreIgnored), _) | (Some(StandingIsNotChecked), Check::Standing { .. }) => None,
            (Some(TokenIsNotChecked), Check::Standing { ticket, .. }) => {
                // In memory a ticket's name is its token.
                let token = Revision(ticket.name.parse().unwrap());
                Some(Check::Standing { ticket: ticket.clone(), token })
            }
            (_, Check::Standing { ticket, token }) => {
                Some(Check::Standing { ticket: ticket.clone(), token: self.token_in(&ticket.line, *token) })
            }
            _ => Some(check.clone()),
        }
    }

    fn write(&self, write: &Write) -> Write {
        let mut write = write.clone();
        if let Write::Put { key, value, lease } = &mut write {
            match self.flaw {
                Some(NamesFoldCase) => *key = self.key(key),
                Some(LargeValuesAreCut) => value.truncate((1 << 20) - 1),
                Some(FirstLeaseKeepsTheKey) => {
                    if let Some(lease) = lease {
                        *lease = self.shared.leases.lock().unwrap().entry(key.clone()).or_insert(lease.clone()).clone();
                    }
                }
                _ => {}
            }
        }
        match &mut write {
            Write::Delete(key) if self.is(DeletedKeysReadAsEmpty) => {
                write = Write::Put { key: key.clone(), value: Default::default(), lease: None };
            }
            Write::Delete(key) => *key = self.key(key),
            _ => {}
        }
        write
    }

    fn key(&self, key: &Key) -> Key {
        if self.is(NamesFoldCase) {
            Key::from_encoded(key.dir(), key.encoded().to_ascii_lowercase())
        } else {
            key.clone()
        }
    }

    fn range(&self, range: &KeyRange) -> KeyRange {
        match range {
            KeyRange::One(key) => KeyRange::One(self.key(key)),
            KeyRange::Prefix { dir, prefix } if self.is(PrefixesEndAtASlash) => {
                let end = prefix.rfind('/').map_or(0, |slash| slash + 1);
                KeyRange::Prefix { dir: dir.clone(), prefix: prefix[..end].into() }
            }
            KeyRange::Prefix { .. } => range.clone(),
        }
    }

    /// The per-key version, where that is the flaw.
    fn version(&self, key: &Key, modified: Revision) -> Revision {
        let mut versions = self.shared.versions.lock().unwrap();
        let known = versions.entry(key.clone()).or_default();
        if !known.contains(&modified.0) {
            known.push(modified.0);
        }
        Revision(known.iter().position(|v| *v == modified.0).unwrap_or(0) as u64 + 1)
    }

    async fn commit_bent(&self, txn: &Txn) -> Result<Commit> {
        let checks: Vec<_> = txn.checks.iter().filter_map(|check| self.check(check)).collect();
        let writes: Vec<_> = txn.writes.iter().map(|write| self.write(write)).collect();
        match self.flaw {
            Some(AnyRevisionWillDo) => {
                let mut checks = checks;
                for check in &mut checks {
                    if let Check::Unchanged { key, modified } = check {
                        let now = self.inner.read(&KeyRange::One(key.clone())).await?.entries.pop();
                        *modified = now.map_or(Revision(0), |entry| entry.modified);
                    }
                }
                self.inner.commit(&Txn { checks, writes }).await
            }
            Some(WritesApplyOneByOne) => {
                let mut answer = self.inner.commit(&Txn { checks, writes: vec![] }).await?;
                for write in if answer.applied { writes } else { vec![] } {
                    tokio::task::yield_now().await;
                    answer = self.inner.commit(&Txn { checks: vec![], writes: vec![write] }).await?;
                }
                Ok(answer)
            }
            Some(DeadLeasesTakeKeys) => {
                let txn = Txn { checks, writes };
                match self.inner.commit(&txn).await {
                    Err(e) if e.kind() == ErrorKind::SessionLost => {
                        let mut free = txn;
                        for write in &mut free.writes {
                            if let Write::Put { lease, .. } = write {
                                *lease = None;
                            }
                        }
                        self.inner.commit(&free).await
                    }
                    answer => answer,
                }
            }
            Some(DuplicatesAreTaken) => match self.inner.commit(&Txn { checks, writes }).await {
                Err(e) if e.to_string().contains("second time") => self.inner.commit(&Txn::default()).await,
                answer => answer,
            },
            _ => self.inner.commit(&Txn { checks, writes }).await,
        }
    }
}

#[async_trait]
impl Backend for Flawed {
    fn profile(&self) -> &Profile {
        static LESS: std::sync::OnceLock<Profile> = std::sync::OnceLock::new();
        if self.is(ProfileDeclaresLess) {
            return LESS.get_or_init(|| Profile { max_txn: 1, ..self.inner.profile().clone() });
        }
        self.inner.profile()
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease> {
        if self.is(LeasesShareAName) {
            let lease = self.inner.grant(ttl).await?;
            return Ok(self.shared.granted.lock().unwrap().get_or_insert(lease).clone());
        }
        if self.is(LeasesNeverEnd) {
            let lease = self.inner.grant(ttl).await?;
            let (inner, id, pause) = (self.inner.clone(), lease.id.clone(), lease.ttl / 3);
            tokio::spawn(async move {
                while inner.renew(&id).await.is_ok() {
                    sleep(pause).await;
                }
            });
            return Ok(lease);
        }
        let real = match self.flaw {
            Some(LeasesEndEarly) => ttl - ttl / 10,
            Some(LeasesEndLate) => ttl * 3 + Duration::from_secs(2),
            Some(TtlIsNotPassedOn) => return self.inner.grant(Duration::from_secs(60)).await,
            _ => return self.inner.grant(ttl).await,
        };
        let lease = self.inner.grant(real).await?;
        let profile = self.profile();
        Ok(Lease { ttl: ttl.clamp(profile.min_ttl, profile.max_ttl), ..lease })
    }

    async fn renew(&self, lease: &LeaseId) -> Result<Duration> {
        if self.is(RenewalDoesNothing) {
            return Ok(Duration::from_millis(600));
        }
        match (self.flaw, self.inner.renew(lease).await) {
            (Some(DeadLeasesAreRenewed), Err(_)) => Ok(Duration::from_secs(1)),
            (_, answer) => answer,
        }
    }

    async fn revoke(&self, lease: &LeaseId) -> Result<()> {
        if self.is(RevokeDoesNothing) {
            return Ok(());
        }
        if self.is(RevokingTwiceFails) {
            self.inner.renew(lease).await?;
        }
        self.inner.revoke(lease).await
    }

    async fn read(&self, range: &KeyRange) -> Result<Snapshot> {
        let mut snapshot = self.inner.read(&self.range(range)).await?;
        match self.flaw {
            Some(ReadsAreOld) => {
                let old = self.shared.old.lock().unwrap().insert(range.clone(), snapshot.clone());
                return Ok(old.unwrap_or_default());
            }
            Some(ReadsAreUnordered) => snapshot.entries.reverse(),
            Some(ReadsStopAtAHundred) => snapshot.entries.truncate(100),
            Some(RevisionsCountPerKey) => {
                for entry in &mut snapshot.entries {
                    entry.created = self.version(&entry.key, entry.created);
                    entry.modified = self.version(&entry.key, entry.modified);
                }
            }
            _ => {}
        }
        Ok(snapshot)
    }

    async fn commit(&self, txn: &Txn) -> Result<Commit> {
        let leaves: Vec<_> = txn.writes.iter().filter(|w| matches!(w, Write::Leave(_))).collect();
        if let (Some(LeavingTakesTheFront), [Write::Leave(ticket)]) = (self.flaw, &leaves[..]) {
            let front = self.inner.line(&ticket.line).await?.tickets.into_iter().next();
            let writes = vec![Write::Leave(front.unwrap_or(ticket.clone()))];
            return self.inner.commit(&Txn { checks: txn.checks.clone(), writes }).await;
        }
        if let Some(LargeIsTheServersError) = self.flaw {
            return self.inner.commit(txn).await.map_err(|e| e.with_kind(ErrorKind::Backend));
        }
        let mut answer = self.commit_bent(txn).await?;
        if !leaves.is_empty() && answer.applied {
            self.shared.left.notify_waiters();
        }
        match (self.flaw, txn.writes.first()) {
            (Some(CulpritIsAlwaysTheFirst), _) => answer.culprit = answer.culprit.map(|_| 0),
            (Some(RevisionsCountPerKey), Some(Write::Put { key, .. })) if answer.applied => {
                answer.revision = self.version(key, answer.revision);
            }
            (Some(RevisionsCountPerKey), Some(Write::Delete(key))) if answer.applied => {
                self.shared.versions.lock().unwrap().remove(key);
            }
            _ => {}
        }
        Ok(answer)
    }

    async fn watch(&self, range: &KeyRange) -> Result<Watch> {
        let wide = match (self.flaw, range) {
            (Some(WatchTellsOfNeighbours), KeyRange::One(key)) => {
                KeyRange::Prefix { dir: key.dir().clone(), prefix: key.encoded().into() }
            }
            _ => range.clone(),
        };
        let watch = self.inner.watch(&wide).await?;
        Ok(match self.flaw {
            Some(flaw) => forward(watch, flaw),
            None => watch,
        })
    }

    async fn enqueue(&self, entry: &Enqueue) -> Result<Option<Place>> {
        let mut entry = entry.clone();
        let wanted_free = entry.when_free;
        match self.flaw {
            Some(NonceIsIgnored) => entry.nonce = Nonce::random(),
            Some(TryJoinsAsFirst | TryLeavesItsTicket) => entry.when_free = false,
            Some(LargeValuesAreCut) => entry.value.truncate(1 << 20),
            Some(LinesFoldCase) => {
                entry.line = Dir::from_encoded(&entry.line.as_str().to_lowercase()).unwrap_or(entry.line);
            }
            _ => {}
        }
        let Some(mut place) = self.inner.enqueue(&entry).await? else { return Ok(None) };
        match self.flaw {
            // The counter is part of what an empty line forgets.
            Some(TokensRestartWithEachLine) if place.ahead.is_empty() => {
                self.shared.tokens.lock().unwrap().remove(&entry.line);
            }
            Some(TryJoinsAsFirst) if wanted_free => place.ahead.clear(),
            Some(TryLeavesItsTicket) if wanted_free && !place.ahead.is_empty() => return Ok(None),
            _ => {}
        }
        Ok(Some(self.bend(place, entry.depth).await?))
    }

    async fn look(&self, ticket: &Ticket, depth: usize) -> Result<Option<Place>> {
        match self.inner.look(ticket, depth).await? {
            Some(place) => Ok(Some(self.bend(place, depth).await?)),
            None if self.is(GoneTicketsStandFirst) => {
                Ok(Some(Place { ticket: ticket.clone(), token: Revision(1), ahead: vec![] }))
            }
            None => Ok(None),
        }
    }

    async fn line(&self, line: &Dir) -> Result<Line> {
        let mut listed = self.inner.line(line).await?;
        match self.flaw {
            Some(EmptyLinesKeepAFront) if listed.front.is_none() => {
                listed.front = Some(Front { token: Revision(1), value: Default::default() });
            }
            Some(FrontsHaveNoValue) => listed.front.iter_mut().for_each(|front| front.value.clear()),
            Some(LastComeFirstServed) => listed.tickets.reverse(),
            Some(KindsAreForgotten) => listed.tickets.iter_mut().for_each(|t| t.kind = TicketKind::Lock),
            _ => {}
        }
        if let Some(front) = &mut listed.front {
            front.token = self.token_out(line, front.token);
        }
        Ok(listed)
    }

    async fn gone(&self, ticket: &Ticket) -> Result<()> {
        match self.flaw {
            Some(WaitReturnsAtOnce) => Ok(()),
            Some(WaitEndsOnlyByTimer) => {
                sleep(Duration::from_secs(20)).await;
                Ok(())
            }
            Some(WakeUpLostBetweenLookAndWait) => {
                while self.inner.look(ticket, 1).await?.is_some() {
                    sleep(Duration::from_millis(1)).await;
                    self.shared.left.notified().await;
                }
                Ok(())
            }
            Some(WaitIgnoresEndOfLease) => {
                let left = self.shared.left.notified();
                if self.inner.look(ticket, 1).await?.is_some() {
                    left.await;
                }
                Ok(())
            }
            _ => self.inner.gone(ticket).await,
        }
    }
    async fn clock(&self) -> Result<ServerClock> {
        let clock = self.inner.clock().await?;
        let shifted = |by: Duration| ServerClock { earliest: clock.earliest - by, latest: clock.latest - by };
        Ok(match self.flaw {
            Some(ClockIsMinutesOff) => shifted(Duration::from_secs(120)),
            // Every answer is a second older than the one before.
            Some(ClockRunsBack) => {
                let mut asked = self.shared.clock.lock().unwrap();
                *asked += Duration::from_secs(1);
                shifted(*asked)
            }
            Some(ClockIsCoarserThanSaid) => ServerClock { latest: clock.latest + Duration::from_millis(1), ..clock },
            _ => clock,
        })
    }

    fn registry(&self) -> quorate_core::discovery::Registry {
        self.inner.registry()
    }
}

/// Passes a watch on, through the flaw.
fn forward(mut watch: Watch, flaw: Flaw) -> Watch {
    let (sender, reader) = channel(1 << 16);
    tokio::spawn(async move {
        let mut kept = None;
        let mut last: HashMap<Key, WatchEvent> = HashMap::new();
        let mut count = 0;
        loop {
            let event = tokio::select! {
                event = watch.next() => event,
                () = sender.closed() => return,
            };
            let Some(event) = event else { return };
            count += 1;
            let again = match (&event, flaw) {
                (WatchEvent::Put(entry), WatchTellsOldVersionsAgain) => {
                    last.insert(entry.key.clone(), WatchEvent::Put(entry.clone()))
                }
                (WatchEvent::Put(entry), WatchTellsTwice) => Some(WatchEvent::Put(entry.clone())),
                _ => None,
            };
            let event = match (event, flaw) {
                (WatchEvent::Reset(_), WatchStartsWithoutReset) if count == 1 => continue,
                (WatchEvent::Delete { .. }, WatchMissesDeletions) => continue,
                (WatchEvent::Reset(_), WatchLosesWhatIsTooMuch) if count > 1 => continue,
                (event @ (WatchEvent::Put(_) | WatchEvent::Delete { .. }), WatchKeepsTheLastChange) => {
                    match kept.replace(event) {
                        Some(event) => event,
                        None => continue,
                    }
                }
                (event, _) => event,
            };
            for event in [Some(event), again].into_iter().flatten() {
                if sender.send(event).is_err() {
                    sender.fail(Error::invalid("watch", "the planted watch has no room for this"));
                    return;
                }
            }
        }
    });
    reader
}
