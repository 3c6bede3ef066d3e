//! Crashes and pauses of client processes, on a real server.
//!
//! Promise: the process that is killed or stopped is a real one; what it did is judged by what other processes saw.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, timeout},
};

use crate::{
    actor::Actor,
    cases,
    site::{Site, connect_long},
};

cases!("process":
    a_killed_holder_is_followed_in_time_and_not_before_its_deadline,
    a_stopped_holder_wakes_with_an_invalid_guard_and_its_fenced_write_is_refused,
    the_same_write_without_a_fence_goes_wrong,
    a_killed_waiter_does_not_hold_up_the_line,
    processes_exclude_each_other_and_a_clean_exit_frees_at_once,
    four_processes_with_a_hundred_tasks_never_meet_inside,
);

async fn a_killed_holder_is_followed_in_time_and_not_before_its_deadline(site: Arc<Site>) {
    let config = site.config();
    let next = connect_long(&config).await;
    next.session().await.expect("a session");
    let mut holder = Actor::start(&config);
    let first = holder.ask_number("acquire job", "granted").await;
    let lock = next.lock("job");
    let waiting = tokio::spawn(async move { lock.acquire().await });
    // Into its life, so that renewals have moved its deadline.
    sleep(site.ttl()).await;
    let asked = Instant::now();
    let left = Duration::from_millis(holder.ask_number("deadline", "left").await);
    holder.kill().await;
    let killed = Instant::now();
    let limit = site.ttl() + next.profile().expiry_lag + Duration::from_secs(1);
    let guard = timeout(limit * 2, waiting).await.expect("the waiter is granted").expect("no panic").expect("granted");
    let (granted, after) = (Instant::now(), killed.elapsed());
    println!("      {}: granted {after:?} after the kill, ttl {:?}, limit {limit:?}", site.backend, site.ttl());
    assert!(granted >= asked + left, "granted {:?} before the dead holder's deadline", asked + left - granted);
    assert!(after <= limit, "granted {after:?} after the kill, more than {limit:?}");
    assert!(guard.token().get() > first);
}

/// Holder A is stopped for 1.5 TTL and more, B takes over and writes, A goes on. Returns A, still to write.
async fn overtaken(site: &Site) -> (Actor, quorate::Coordinator) {
    let config = site.config();
    let b = connect_long(&config).await;
    b.session().await.expect("a session");
    let mut a = Actor::start(&config);
    a.ask_number("acquire job", "granted").await;
    assert_eq!(a.ask("held").await, "held true");
    a.pause().await;
    sleep(site.ttl().mul_f64(1.5)).await;
    let limit = site.ttl() + b.profile().expiry_lag + Duration::from_secs(5);
    let guard = timeout(limit, b.lock("job").acquire()).await.expect("B is granted").expect("granted");
    b.kv().put_fenced(&guard.fence(), "row", "B").await.expect("B holds the lock");
    // The first thing A finds on waking is the question whether it holds.
    a.send("held").await;
    a.resume().await;
    assert_eq!(a.answer().await, "held false", "a guard is valid after a pause beyond its deadline");
    assert!(guard.is_held());
    guard.release().await.expect("released");
    (a, b)
}

async fn a_stopped_holder_wakes_with_an_invalid_guard_and_its_fenced_write_is_refused(site: Arc<Site>) {
    let (mut a, b) = overtaken(&site).await;
    assert_eq!(a.ask("fenced row A").await, "refused");
    assert_eq!(b.kv().get("row").await.expect("get").expect("exists").value, "B");
}

/// The control of the case above: the nemesis bites.
async fn the_same_write_without_a_fence_goes_wrong(site: Arc<Site>) {
    let (mut a, b) = overtaken(&site).await;
    assert_eq!(a.ask("plain row A").await, "written");
    assert_eq!(b.kv().get("row").await.expect("get").expect("exists").value, "A", "B's write is overwritten");
}

async fn a_killed_waiter_does_not_hold_up_the_line(site: Arc<Site>) {
    let config = site.config();
    let coord = connect_long(&config).await;
    let guard = coord.lock("job").acquire().await.expect("granted");
    let mut doomed = Actor::start(&config);
    doomed.send("acquire job").await;
    while coord.lock("job").status().await.expect("a look").waiting < 1 {
        sleep(Duration::from_millis(20)).await;
    }
    let lock = coord.lock("job");
    let behind = tokio::spawn(async move { lock.acquire().await });
    while coord.lock("job").status().await.expect("a look").waiting < 2 {
        sleep(Duration::from_millis(20)).await;
    }
    doomed.kill().await;
    let killed = Instant::now();
    guard.release().await.expect("released");
    let limit = site.ttl() + coord.profile().expiry_lag + Duration::from_secs(1);
    let granted = timeout(limit, behind).await.expect("granted in time").expect("no panic").expect("granted");
    println!("      {}: the waiter behind a killed one was granted after {:?}", site.backend, killed.elapsed());
    granted.release().await.expect("released");
}

async fn processes_exclude_each_other_and_a_clean_exit_frees_at_once(site: Arc<Site>) {
    let config = site.config();
    let here = connect_long(&config).await;
    here.session().await.expect("a session");
    let mut child = Actor::start(&config);
    child.ask_number("acquire job", "granted").await;
    assert!(here.lock("job").try_acquire().await.expect("trying works").is_none());
    let exited = Instant::now();
    child.exit().await;
    let guard = timeout(Duration::from_secs(5), here.lock("job").acquire()).await.expect("free").expect("granted");
    assert!(exited.elapsed() < site.ttl() + Duration::from_secs(3), "an exit does not wait for the TTL");
    let mut child = Actor::start(&config);
    assert_eq!(child.ask("try job").await, "refused");
    guard.release().await.expect("released");
    child.ask_number("try job", "granted").await;
    assert_eq!(child.ask("release").await, "released");
}

/// Takes note of entries and exits, in the one order that counts: its own.
#[derive(Debug, Default)]
struct Referee {
    inside: Option<u64>,
    tokens: Vec<u64>,
    violations: Vec<String>,
}

impl Referee {
    fn note(&mut self, event: u8, token: u64) {
        match (event, self.inside) {
            (b'+', None) => {
                if self.tokens.last().is_some_and(|last| *last >= token) {
                    self.violations.push(format!("token {token} after {:?}", self.tokens.last()));
                }
                self.tokens.push(token);
                self.inside = Some(token);
            }
            (b'-', Some(inside)) if inside == token => self.inside = None,
            (event, inside) => self.violations.push(format!("{}{token} with {inside:?} inside", char::from(event))),
        }
    }

    async fn listen(this: Arc<Mutex<Self>>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("bound");
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(Self::serve(this.clone(), stream));
            }
        });
        addr
    }

    async fn serve(this: Arc<Mutex<Self>>, mut stream: TcpStream) {
        let mut message = [0; 9];
        while stream.read_exact(&mut message).await.is_ok() {
            let token = u64::from_be_bytes(message[1..].try_into().expect("eight bytes"));
            this.lock().expect("no poison").note(message[0], token);
            if stream.write_all(b"!").await.is_err() {
                return;
            }
        }
    }
}

async fn four_processes_with_a_hundred_tasks_never_meet_inside(site: Arc<Site>) {
    const TURNS: usize = 2;
    let config = site.config().with_session_ttl(Duration::from_secs(15));
    let referee = Arc::new(Mutex::new(Referee::default()));
    let addr = Referee::listen(referee.clone()).await;
    let mut actors: Vec<_> = (0..4).map(|_| Actor::start(&config)).collect();
    for actor in &mut actors {
        actor.send(&format!("contend job 25 {TURNS} {addr}")).await;
    }
    for actor in &mut actors {
        let answer = timeout(Duration::from_secs(60), actor.answer()).await.expect("in time");
        assert_eq!(answer, "done");
    }
    let referee = referee.lock().expect("no poison");
    assert!(referee.violations.is_empty(), "{:?}", referee.violations);
    assert_eq!(referee.tokens.len(), 4 * 25 * TURNS);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_referee_sees_two_inside_and_falling_tokens() {
        let mut referee = Referee::default();
        referee.note(b'+', 5);
        referee.note(b'+', 6);
        referee.note(b'-', 5);
        referee.note(b'+', 4);
        assert_eq!(referee.violations.len(), 2, "{:?}", referee.violations);
    }
}
