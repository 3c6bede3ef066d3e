//! Campaigning: from wish to leadership.

use std::{collections::HashSet, future::Future, pin::pin, sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{
    Candidate, Election, Leadership,
    announce::Announcer,
    record::{Entry, Places},
};
use crate::{
    backend::{Check, Txn, Write},
    error::{ErrorKind, Result},
    key::Key,
    line::{Claim, Traces, Wish, join, wait_turn},
    session::{Session, SessionCore},
};

pub(super) async fn campaign(election: &Election, candidate: &Candidate) -> Result<Leadership> {
    let places = election.places()?;
    super::check_value("campaign", &candidate.value)?;
    let session = election.session().await?;
    let mut elders = Elders::default();
    loop {
        let value = Entry::new(session.owner(), candidate).encode();
        let wish = Wish { line: &places.line, value, operation: "campaign", what: "leadership" };
        let Some(claim) = join(&wish, &session, false).await? else { continue };
        if claim.place().ahead.is_empty() {
            return lead(places, candidate, session, claim, None).await;
        }
        let own = places.entry(&claim.place().ticket)?;
        let Some(claim) = wait_visibly(&session, claim, &own, &wish).await? else {
            // We lost our place, not our wish.
            tracing::warn!(line = %places.line, "our ticket was removed by somebody else; joining the line again");
            continue;
        };
        if let Some(priority) = candidate.priority
            && elders.waits(session.core(), places, priority).await?
        {
            tracing::debug!(line = %places.line, priority, "letting a candidate of higher priority go first");
            if let Err(error) = claim.give_up().await {
                tracing::debug!(%error, "the place is given up in the background");
            }
            continue;
        }
        return lead(places, candidate, session, claim, Some(own)).await;
    }
}

/// Waits for the turn, and meanwhile makes the candidate known to who asks for the candidates.
async fn wait_visibly(session: &Session, mut claim: Claim, own: &Key, wish: &Wish<'_>) -> Result<Option<Claim>> {
    let core = session.core().clone();
    claim.leave_with(Write::Delete(own.clone()));
    let place = claim.place();
    // Under the condition that the ticket stands: a request that is late finds it gone, and leaves nothing.
    let check = Check::Standing { ticket: place.ticket.clone(), token: place.token };
    let put = Write::Put { key: own.clone(), value: wish.value.clone(), lease: Some(core.lease.clone()) };
    let txn = Txn { checks: vec![check], writes: vec![put] };
    let mut listing = pin!(list(&core, &txn));
    let mut turn = pin!(wait_turn(claim));
    let mut listed = false;
    loop {
        tokio::select! {
            biased;
            turn = &mut turn => return turn,
            () = &mut listing, if !listed => listed = true,
        }
    }
}

/// Writes the candidate's own key. That it stands under its ticket makes it harmless to repeat.
async fn list(core: &SessionCore, txn: &Txn) {
    let mut pause = Duration::from_millis(20);
    while let Err(error) = core.backend.commit(txn).await {
        if matches!(error.kind(), ErrorKind::SessionLost | ErrorKind::InvalidInput | ErrorKind::Unsupported) {
            return;
        }
        tracing::debug!(%error, "a waiting candidate is not listed yet");
        sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

/// Those whom a candidate has let go first.
#[derive(Default)]
struct Elders {
    /// Their tickets, as far as they still stand. Each is let go first once, so that candidates cannot yield to each
    /// other for ever over the key of somebody who does not come.
    met: HashSet<String>,
}

impl Elders {
    /// Whether somebody of higher priority waits who was not met yet. When that cannot be told, nobody does:
    /// an election without a leader would be worse.
    async fn waits(&mut self, core: &SessionCore, places: &Places, priority: i32) -> Result<bool> {
        let range = places.entries()?;
        let read = tokio::select! {
            biased;
            () = core.over() => return Err(core.lost_error("campaign")),
            read = core.backend.read(&range) => read,
        };
        let entries = match read {
            Ok(now) => now.entries,
            Err(error) => {
                tracing::warn!(%error, "priorities could not be read, so they are passed over");
                return Ok(false);
            }
        };
        let higher =
            |value: &[u8]| Entry::decode(value).and_then(|e| e.priority).is_some_and(|theirs| theirs > priority);
        let elders: HashSet<String> =
            entries.iter().filter(|e| higher(&e.value)).map(|e| e.key.encoded().to_owned()).collect();
        let strangers = !elders.is_subset(&self.met);
        self.met = elders;
        Ok(strangers)
    }
}

async fn lead(
    places: &Places,
    candidate: &Candidate,
    session: Session,
    claim: Claim,
    own: Option<Key>,
) -> Result<Leadership> {
    let core = session.core().clone();
    // In front already, but in doubt: nobody else leads while the place is kept.
    let suspicions = if candidate.cautious { Some(core.unsuspected().await) } else { None };
    let mut held = claim.granted(session)?;
    held.leaves(Traces { record: places.record.clone(), own });
    let value: Arc<str> = candidate.value.as_str().into();
    let announcer = Announcer::start(&core, held.hold(), places.record.clone(), value);
    tracing::info!(line = %places.line, term = %held.token(), "leading");
    Ok(Leadership::new(held, announcer, suspicions))
}

/// Boxed, so that what callers keep across a campaign is small.
pub(super) fn boxed<'a>(
    election: &'a Election,
    candidate: &'a Candidate,
) -> impl Future<Output = Result<Leadership>> + Send + 'a {
    Box::pin(campaign(election, candidate))
}
