//! Leaders, owners of partitions and members that are killed and stopped, and servers that are killed under them.
//!
//! Promise: the process that is killed or stopped is a real one; what it did is judged by what other processes saw.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate::{
    Coordinator, ErrorKind, FencingToken, Result, election::Leadership, group::GroupEvent, partition::Share,
};
use quorate_conformance::Outcome;
use tokio::time::{Instant, sleep, timeout};

use crate::{
    actor::Actor,
    cases,
    site::{Site, connect, connect_long},
};

cases!("leaders":
    a_killed_leader_is_followed_in_time_and_not_before_its_deadline,
    a_stopped_leader_wakes_deposed_and_its_fenced_write_is_refused,
    partitions_of_a_killed_owner_are_taken_over_in_later_terms,
    a_killed_member_is_told_to_have_left_once,
);

/// What the actor leads, owns or takes part in.
#[derive(Debug, Default)]
pub struct Standing {
    leadership: Option<Leadership>,
    owned: Arc<Mutex<BTreeMap<u32, FencingToken>>>,
    membership: Option<quorate::group::Membership>,
}

impl Standing {
    /// Obeys a command about leading and owning; `None` if it is about something else.
    ///
    /// # Errors
    /// What the call ends with.
    ///
    /// # Panics
    /// If nothing is led yet.
    pub async fn obey(&mut self, coord: &Coordinator, words: &[&str]) -> Result<Option<String>> {
        let led = || self.leadership.as_ref().expect("it campaigned");
        Ok(Some(match words {
            ["campaign", name, value] => {
                let leadership = coord.election(name).campaign(*value).await?;
                let answer = format!("leads {}", leadership.term());
                self.leadership = Some(leadership);
                answer
            }
            ["leads"] => format!("leads {}", led().is_leader()),
            ["lead-left"] => {
                format!("left {}", led().deadline().saturating_duration_since(Instant::now()).as_millis())
            }
            ["lead-write", key, value] => match coord.kv().put_fenced(&led().fence(), key, (*value).to_owned()).await {
                Ok(_) => "written".to_owned(),
                Err(error) if error.kind() == ErrorKind::SessionLost => "refused".to_owned(),
                Err(error) => return Err(error),
            },
            ["own", name, count, id] => {
                let share = coord.partitions(name, count.parse().expect("a number")).join(id).await?;
                tokio::spawn(own(share, self.owned.clone()));
                "joined".to_owned()
            }
            ["owned"] => {
                let owned = self.owned.lock().expect("no poison");
                let owned: Vec<_> = owned.iter().map(|(index, token)| format!("{index}:{token}")).collect();
                format!("owned {}", owned.join(" "))
            }
            ["join", group, id] => {
                let membership = coord.group(group).join(id, "")?;
                membership.ready().await?;
                self.membership = Some(membership);
                "joined".to_owned()
            }
            _ => return Ok(None),
        }))
    }
}

/// Takes whatever is offered, until it is asked back.
async fn own(mut share: Share, owned: Arc<Mutex<BTreeMap<u32, FencingToken>>>) {
    loop {
        let partition = share.next().await;
        let owned = owned.clone();
        owned.lock().expect("no poison").insert(partition.index(), partition.token());
        tokio::spawn(async move {
            tokio::select! {
                () = partition.revoked() => {}
                () = partition.lost() => {}
            }
            owned.lock().expect("no poison").remove(&partition.index());
            let _ = partition.release().await;
        });
    }
}

fn limit(site: &Site, coord: &Coordinator) -> Duration {
    site.ttl() + coord.profile().expiry_lag + Duration::from_secs(1)
}

async fn a_killed_leader_is_followed_in_time_and_not_before_its_deadline(site: Arc<Site>) {
    let config = site.config();
    let next = connect_long(&config).await;
    next.session().await.expect("a session");
    let mut observer = next.election("boss").observe().await.expect("an observer");
    let mut leader = Actor::start(&config);
    let first = leader.ask_number("campaign boss one", "leads").await;
    let election = next.election("boss");
    let waiting = tokio::spawn(async move { election.campaign("two").await });
    // Into its life, so that renewals have moved its deadline.
    sleep(site.ttl()).await;
    let asked = Instant::now();
    let left = Duration::from_millis(leader.ask_number("lead-left", "left").await);
    leader.kill().await;
    let (killed, limit) = (Instant::now(), limit(&site, &next));
    let led = timeout(limit * 2, waiting).await.expect("somebody follows").expect("no panic").expect("it leads");
    let (now, after) = (Instant::now(), killed.elapsed());
    println!("      {}: followed {after:?} after the kill, ttl {:?}, limit {limit:?}", site.backend, site.ttl());
    assert!(now >= asked + left, "followed {:?} before the dead leader's deadline", asked + left - now);
    assert!(after <= limit, "followed {after:?} after the kill, more than {limit:?}");
    assert!(led.term().get() > first, "terms rise");
    // The observer may skip leaders, and never goes back.
    let mut last = 0;
    let seen = async {
        while last != led.term().get() {
            if let Some(leader) = observer.next().await.expect("it goes on") {
                assert!(leader.term.get() >= last, "an observer went back");
                last = leader.term.get();
            }
        }
    };
    timeout(limit, seen).await.expect("the observer sees the new leader");
}

async fn a_stopped_leader_wakes_deposed_and_its_fenced_write_is_refused(site: Arc<Site>) {
    let config = site.config();
    let next = connect_long(&config).await;
    next.session().await.expect("a session");
    let mut leader = Actor::start(&config);
    leader.ask_number("campaign boss one", "leads").await;
    assert_eq!(leader.ask("leads").await, "leads true");
    leader.pause().await;
    sleep(site.ttl().mul_f64(1.5)).await;
    let campaign = timeout(limit(&site, &next) + Duration::from_secs(4), next.election("boss").campaign("two")).await;
    let led = campaign.expect("somebody follows").expect("it leads");
    next.kv().put_fenced(&led.fence(), "row", "two").await.expect("it leads");
    // The first thing it finds on waking is the question whether it leads.
    leader.send("leads").await;
    leader.resume().await;
    assert_eq!(leader.answer().await, "leads false", "a leadership is valid after a pause beyond its deadline");
    assert!(led.is_leader());
    assert_eq!(leader.ask("lead-write row one").await, "refused");
    assert_eq!(next.kv().get("row").await.expect("get").expect("exists").value, "two");
}

/// Waits until exactly so many are owned here.
async fn until_owned(owned: &Mutex<BTreeMap<u32, FencingToken>>, count: usize, limit: Duration) -> Duration {
    let started = Instant::now();
    while owned.lock().expect("no poison").len() != count {
        assert!(started.elapsed() < limit, "{:?} after {limit:?}", owned.lock().expect("no poison"));
        sleep(Duration::from_millis(10)).await;
    }
    started.elapsed()
}

async fn partitions_of_a_killed_owner_are_taken_over_in_later_terms(site: Arc<Site>) {
    const COUNT: u32 = 8;
    let config = site.config();
    let here = connect_long(&config).await;
    let mut other = Actor::start(&config);
    assert_eq!(other.ask(&format!("own jobs {COUNT} other")).await, "joined");
    let owned: Arc<Mutex<BTreeMap<u32, FencingToken>>> = Arc::default();
    let share = here.partitions("jobs", COUNT).join("here").await.expect("it may join");
    tokio::spawn(own(share, owned.clone()));
    until_owned(&owned, 4, Duration::from_secs(20)).await;
    let theirs = loop {
        let answer = other.ask("owned").await;
        let pairs = answer.split_whitespace().skip(1).filter_map(|pair| pair.split_once(':'));
        let theirs: BTreeMap<u32, u64> =
            pairs.map(|(index, token)| (index.parse().expect("a number"), token.parse().expect("a number"))).collect();
        if theirs.len() == 4 {
            break theirs;
        }
        sleep(Duration::from_millis(50)).await;
    };
    assert!(theirs.keys().all(|index| !owned.lock().expect("no poison").contains_key(index)), "none has two owners");
    other.kill().await;
    // The membership and the locks end with one lease; the pause after a refused attempt comes on top.
    let took = until_owned(&owned, 8, limit(&site, &here) + Duration::from_secs(3)).await;
    println!("      {}: all taken over {took:?} after the kill, ttl {:?}", site.backend, site.ttl());
    let owned = owned.lock().expect("no poison");
    for (index, token) in theirs {
        assert!(owned[&index].get() > token, "the token of partition {index} does not rise");
    }
}

async fn a_killed_member_is_told_to_have_left_once(site: Arc<Site>) {
    let config = site.config();
    let here = connect_long(&config).await;
    let group = here.group("workers");
    let members = group.follow().await.expect("followed");
    let mut events = members.events();
    let mut doomed = Actor::start(&config);
    let mut stays = Actor::start(&config);
    assert_eq!(doomed.ask("join workers doomed").await, "joined");
    assert_eq!(stays.ask("join workers stays").await, "joined");
    let mut told = Vec::new();
    let mut next = async |limit: Duration| match timeout(limit, events.next()).await {
        Ok(GroupEvent::Joined(member)) => Some(format!("+{}", member.id)),
        Ok(GroupEvent::Left(member)) => Some(format!("-{}", member.id)),
        Ok(_) | Err(_) => None,
    };
    for _ in 0..2 {
        told.extend(next(Duration::from_secs(10)).await);
    }
    told.sort();
    assert_eq!(told, ["+doomed", "+stays"]);
    doomed.kill().await;
    assert_eq!(next(limit(&site, &here)).await.as_deref(), Some("-doomed"), "told in time");
    assert_eq!(next(Duration::from_millis(500)).await, None, "and once; who stays is not mentioned");
}

/// Cases that kill the server.
pub mod outage {
    use super::{
        Arc, AtomicUsize, ControlFlow, Coordinator, Duration, Instant, Mutex, Ordering, Outcome, Share, Site, connect,
        sleep, timeout,
    };

    crate::cases!("leaders_outage":
        work_of_leaders_never_meets_while_the_server_is_killed_and_restarted,
        partitions_have_one_owner_each_while_the_server_is_killed_and_restarted,
    );

    /// What the work of all leaders has seen.
    #[derive(Debug, Default)]
    struct Office {
        inside: AtomicUsize,
        /// Terms in the order in which they began.
        terms: Mutex<Vec<u64>>,
        meetings: AtomicUsize,
    }

    /// Counts itself out, also if its work is dropped.
    struct Inside(Arc<Office>);

    impl Drop for Inside {
        fn drop(&mut self) {
            self.0.inside.fetch_sub(1, Ordering::AcqRel);
        }
    }

    impl Office {
        fn enter(self: &Arc<Self>, term: u64) -> Inside {
            if self.inside.fetch_add(1, Ordering::AcqRel) > 0 {
                self.meetings.fetch_add(1, Ordering::AcqRel);
            }
            self.terms.lock().expect("no poison").push(term);
            Inside(self.clone())
        }

        async fn until_led(&self, terms: usize, limit: Duration) {
            let started = Instant::now();
            while self.inside.load(Ordering::Acquire) != 1 || self.terms.lock().expect("no poison").len() < terms {
                assert!(started.elapsed() < limit, "nobody leads after {limit:?}: {self:?}");
                sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Leads whenever it can, for ever.
    async fn candidate(coord: Coordinator, office: Arc<Office>) {
        loop {
            let office = office.clone();
            let election = coord.election("boss");
            let ended = election.run_while_leader("me", move |leadership| {
                let office = office.clone();
                async move {
                    let _inside = office.enter(leadership.term().get());
                    // For a while, so that there are changes also without the nemesis.
                    sleep(Duration::from_millis(700)).await;
                    ControlFlow::<()>::Break(())
                }
            });
            // An outage ends a campaign; the candidate stands again.
            let _ = ended.await;
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn work_of_leaders_never_meets_while_the_server_is_killed_and_restarted(site: Arc<Site>) -> Outcome {
        const LIMIT: Duration = Duration::from_secs(30);
        let config = site.config();
        let office = Arc::new(Office::default());
        let mut running = tokio::task::JoinSet::new();
        let mut coords = Vec::new();
        for _ in 0..3 {
            let coord = connect(&config).await;
            running.spawn(candidate(coord.clone(), office.clone()));
            coords.push(coord);
        }
        office.until_led(3, LIMIT).await;
        for down in [Duration::ZERO, site.ttl().mul_f64(1.5)] {
            site.server().kill().await.expect("killed");
            sleep(down).await;
            site.server().restart().await.expect("up again");
            let before = office.terms.lock().expect("no poison").len();
            let restarted = Instant::now();
            office.until_led(before + 2, LIMIT).await;
            println!(
                "      {}: led again {:?} after the restart, down for {down:?}",
                site.backend,
                restarted.elapsed()
            );
        }
        running.shutdown().await;
        let limit = Duration::from_secs(5);
        for coord in coords {
            let _ = timeout(limit, coord.close()).await;
        }
        let terms = office.terms.lock().expect("no poison").clone();
        assert!(terms.windows(2).all(|pair| pair[0] < pair[1]), "terms do not rise: {terms:?}");
        let meetings = office.meetings.load(Ordering::Acquire);
        let probe = connect(&site.config()).await;
        match probe.profile().early_end {
            Some(why) if meetings > 0 => Outcome::Refused(format!("leaders met {meetings} times; declared: {why}")),
            _ => {
                assert_eq!(meetings, 0, "two leaders at work at the same time");
                Outcome::Passed
            }
        }
    }

    const PARTITIONS: u32 = 8;
    const MEMBERS: usize = 3;

    /// What the owners of all partitions have seen.
    #[derive(Debug, Default)]
    struct Floor {
        offices: [Arc<Office>; PARTITIONS as usize],
        /// How many each member works on.
        shares: [AtomicUsize; MEMBERS],
    }

    /// One less for that member, also if its work is dropped.
    struct Counted(Arc<Floor>, usize);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.shares[self.1].fetch_sub(1, Ordering::AcqRel);
        }
    }

    impl Floor {
        fn owned(&self) -> usize {
            self.offices.iter().map(|office| office.inside.load(Ordering::Acquire)).sum()
        }

        /// How many owners there have been.
        fn owners(&self) -> usize {
            self.offices.iter().map(|office| office.terms.lock().expect("no poison").len()).sum()
        }

        fn meetings(&self) -> usize {
            self.offices.iter().map(|office| office.meetings.load(Ordering::Acquire)).sum()
        }
    }

    /// Works on whatever it is given, until that is taken back.
    async fn member(mut share: Share, floor: Arc<Floor>, member: usize) {
        loop {
            let partition = share.next().await;
            let floor = floor.clone();
            tokio::spawn(async move {
                let term = partition.token().get();
                let work = async {
                    let _inside = floor.offices[partition.index() as usize].enter(term);
                    floor.shares[member].fetch_add(1, Ordering::AcqRel);
                    let _counted = Counted(floor.clone(), member);
                    std::future::pending::<()>().await;
                };
                let _ = partition.run(work).await;
            });
        }
    }

    /// Ends when every partition is worked on and the numbers that members own differ by at most one.
    async fn until_spread(floor: &Floor) {
        let started = Instant::now();
        loop {
            let mut shares = floor.shares.each_ref().map(|share| share.load(Ordering::Acquire));
            shares.sort_unstable();
            if shares == [2, 3, 3] && floor.owned() == PARTITIONS as usize {
                return;
            }
            assert!(started.elapsed() < Duration::from_secs(40), "{} owned, {shares:?}", floor.owned());
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn partitions_have_one_owner_each_while_the_server_is_killed_and_restarted(site: Arc<Site>) -> Outcome {
        let config = site.config();
        let floor = Arc::new(Floor::default());
        let (mut running, mut coords) = (tokio::task::JoinSet::new(), Vec::new());
        for i in 0..MEMBERS {
            let coord = connect(&config).await;
            let share = coord.partitions("jobs", PARTITIONS).join(&i.to_string()).await.expect("it may join");
            running.spawn(member(share, floor.clone(), i));
            coords.push(coord);
        }
        until_spread(&floor).await;
        for down in [Duration::ZERO, site.ttl().mul_f64(1.5)] {
            let before = floor.owners();
            site.server().kill().await.expect("killed");
            sleep(down).await;
            let begun = Instant::now();
            site.server().restart().await.expect("up again");
            let ready = begun.elapsed();
            until_spread(&floor).await;
            println!(
                "      {}: down for {down:?} and {ready:?}; all owned {:?} after the start, {} by a later owner",
                site.backend,
                begun.elapsed(),
                floor.owners() - before
            );
        }
        running.shutdown().await;
        for coord in coords {
            let _ = timeout(Duration::from_secs(5), coord.close()).await;
        }
        for office in &floor.offices {
            let terms = office.terms.lock().expect("no poison").clone();
            assert!(terms.windows(2).all(|pair| pair[0] < pair[1]), "tokens do not rise: {terms:?}");
        }
        let probe = connect(&site.config()).await;
        match (probe.profile().early_end, floor.meetings()) {
            (_, 0) => Outcome::Passed,
            (Some(why), met) => Outcome::Refused(format!("owners met {met} times; declared: {why}")),
            (None, met) => panic!("{met} times a partition had two owners at work"),
        }
    }
}
