//! The task that keeps subscriptions in step with the watches there are, and looks again by the clock.
//!
//! Promise: a message that never came delays nobody for longer than the backstop, and the end of a dead
//! client's lease is noticed when it ends, not when somebody happens to call. Whatever many waits and
//! watches there are, one client asks at most a few times a second, and not at all if it waits for nothing.

use std::{collections::HashSet, sync::Arc, time::Duration};

use quorate_core::{Dir, Result};
use redis::{RedisResult, Value};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::{
    error::{Effect, Verdict, classify, unexpected},
    hub::{Due, Hub, Live},
    link::{Link, Server, State},
    script::{Call, Parts, WAIT},
};

/// How many tickets and directories one question is about at the most.
const TICKETS: usize = 256;
const DIRS: usize = 64;
/// A server that is alive answers this question sooner.
const ANSWER: Duration = Duration::from_secs(2);
/// Rest after a refusal.
const PAUSE: Duration = Duration::from_millis(250);

/// Runs until the backend is dropped.
pub(crate) async fn sweep(server: Arc<Server>) {
    let hub = server.connector.hub.clone();
    let mut state = server.subscribe();
    let mut subscribed = HashSet::new();
    let mut on = 0;
    loop {
        let link = match &*state.borrow_and_update() {
            State::Up(link) if !link.broken.is_set() => Some(link.clone()),
            State::Closed => return,
            _ => None,
        };
        let Some(link) = link else {
            if state.changed().await.is_err() {
                return;
            }
            continue;
        };
        if on != link.number {
            on = link.number;
            subscribed.clear();
        }
        reconcile(&server, &hub, &link, &mut subscribed).await;
        check(&server, &hub, &link).await;
        if link.broken.is_set() {
            continue;
        }
        drop(link);
        let until = hub.sleep_until();
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            () = hub.wake.notified() => {}
            () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {}
        }
    }
}

/// Subscribes to what is watched and was not, and the other way round.
async fn reconcile(server: &Server, hub: &Hub, link: &Link, subscribed: &mut HashSet<Dir>) {
    let watched: HashSet<Dir> = hub.watched().into_iter().collect();
    let keys = &server.connector.keys;
    let mut conn = link.signal.clone();
    let gone: Vec<Dir> = subscribed.difference(&watched).cloned().collect();
    for dir in gone {
        if conn.unsubscribe(keys.dir_channel(dir.as_str())).await.is_err() {
            return link.broken.set();
        }
        subscribed.remove(&dir);
    }
    for dir in watched {
        if !subscribed.contains(&dir) {
            if let Err(e) = conn.subscribe(keys.dir_channel(dir.as_str())).await {
                let (failure, verdict) = classify(&e, Effect::Reads);
                if verdict == Verdict::Leave {
                    return link.broken.set();
                }
                hub.set_live(&dir, Live::Refused(link.number, failure));
                continue;
            }
            subscribed.insert(dir.clone());
        }
        // Said again each time: the feed may be a new one for a directory that was never left.
        hub.set_live(&dir, Live::On(link.number));
    }
}

/// Asks the server about everything that is due.
async fn check(server: &Server, hub: &Hub, link: &Link) {
    loop {
        let due = hub.due(TICKETS, DIRS);
        if due.tickets.is_empty() && due.dirs.is_empty() {
            return;
        }
        match timeout(ANSWER, ask(server, link, &due.tickets, &due.dirs)).await {
            Ok(Ok(answer)) => spread(hub, &due, &answer),
            Ok(Err(e)) => {
                tracing::debug!(error = %e, "cannot look after waits and watches");
                return sleep(PAUSE).await;
            }
            Err(_) => return link.broken.set(),
        }
    }
}

fn spread(hub: &Hub, due: &Due, answer: &Answer) {
    for (field, left) in due.tickets.iter().zip(&answer.tickets) {
        match left {
            Some(left) => hub.stands(field, *left),
            None => hub.gone(field),
        }
    }
    for (dir, mark) in due.dirs.iter().zip(&answer.marks) {
        hub.checked(dir, *mark, answer.first);
    }
}

/// What the server says of tickets and directories.
pub(crate) struct Answer {
    /// How long the ticket's lease has to go; `None` if the ticket is gone.
    pub(crate) tickets: Vec<Option<Duration>>,
    marks: Vec<u64>,
    /// How long until the first lease of the namespace ends.
    first: Duration,
}

/// Asks to be told of these tickets and directories, and how they are now.
pub(crate) async fn ask(server: &Server, link: &Link, tickets: &[Arc<str>], dirs: &[Dir]) -> Result<Answer> {
    let connector = &server.connector;
    let mut call = Call::new(&WAIT, &connector.keys).arg(connector.hub.client()).arg(tickets.len().to_string());
    for field in tickets {
        call.push(&**field);
    }
    for dir in dirs {
        call.push(dir.as_str());
    }
    let value = server.signal(link, "gone", &call).await?;
    answer(value).map_err(|e| unexpected("gone", &e))
}

fn answer(value: Value) -> RedisResult<Answer> {
    let mut parts = Parts::of(value)?;
    let (mut tickets, mut marks) = (parts.parts()?, parts.parts()?);
    Ok(Answer {
        tickets: (0..tickets.len()).map(|_| Ok(micros(tickets.int()?))).collect::<RedisResult<_>>()?,
        marks: (0..marks.len()).map(|_| marks.number()).collect::<RedisResult<_>>()?,
        first: micros(parts.int()?).unwrap_or(Duration::MAX),
    })
}

/// Microseconds as the scripts tell them: negative is never.
pub(crate) fn micros(n: i64) -> Option<Duration> {
    u64::try_from(n).ok().map(Duration::from_micros)
}
