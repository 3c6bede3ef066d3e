//! Discovery: how soon an instance that registers is seen, and how soon one that dies is gone.

use std::time::Duration;

use quorate::{
    Coordinator,
    discovery::{Instance, Service},
};
use quorate_testkit::servers::{Kind, Server};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{Round, coordinator};
use crate::{
    Outcome,
    report::{Figure, Row, Target},
    samples::{Samples, Spread},
};

const BLOCK: usize = 10;
const SETTLE: Duration = Duration::from_millis(2);
/// How many die.
const DEATHS: usize = 20;
/// Nothing takes so long.
const LIMIT: Duration = Duration::from_secs(60);

pub(super) async fn measure(server: &Server, raw: &mut dyn Round, limit: Duration) -> Outcome<Vec<Row>> {
    let (here, there) = (coordinator(server).await?, coordinator(server).await?);
    let service = there.discover("bench").await.map_err(|e| e.to_string())?;
    let mut rows = seen(raw, &here, &service, limit).await?;
    rows.extend(gone(server, &service).await?);
    Ok(rows)
}

async fn until(service: &Service, id: &str, there: bool) -> Outcome {
    let seen = service.until(|now| now.get(id).is_some() == there);
    timeout(LIMIT, seen).await.map(drop).map_err(|_| format!("{id} was not seen to come or go within {LIMIT:?}"))
}

async fn registered(here: &Coordinator, service: &Service, number: &mut usize) -> Outcome<Samples> {
    let mut samples = Samples::new();
    for _ in 0..BLOCK {
        *number += 1;
        let id = format!("instance-{number}");
        sleep(SETTLE).await;
        let started = Instant::now();
        let instance = Instance::new("bench", "10.0.0.7:8080").id(&*id);
        let registration = here.register(instance).map_err(|e| e.to_string())?;
        until(service, &id, true).await?;
        samples.add(started.elapsed());
        registration.close().await.map_err(|e| e.to_string())?;
        until(service, &id, false).await?;
    }
    Ok(samples)
}

async fn rounds(raw: &mut dyn Round) -> Outcome<Samples> {
    let mut samples = Samples::new();
    for _ in 0..BLOCK {
        samples.add(raw.round(SETTLE).await?);
    }
    Ok(samples)
}

async fn seen(raw: &mut dyn Round, here: &Coordinator, service: &Service, limit: Duration) -> Outcome<Vec<Row>> {
    let (mut theirs, mut ours, mut ratios) = (Samples::new(), Samples::new(), Spread::default());
    let mut number = 0;
    // The session is made once.
    registered(here, service, &mut number).await?;
    let began = Instant::now();
    while began.elapsed() < limit {
        let (a, b) = (rounds(raw).await?, registered(here, service, &mut number).await?);
        ratios.add(b.p50().as_secs_f64() / a.p50().as_secs_f64());
        theirs.merge(&a);
        ours.merge(&b);
    }
    let row = |quantile: &str, raw: Duration, ours: Duration, spread| Row {
        what: format!("register → seen by another, {quantile}"),
        raw: Some(Figure::Time(raw)),
        ours: Figure::Time(ours),
        ratio: Some((ours.as_secs_f64() / raw.as_secs_f64(), spread)),
        target: Target::None,
    };
    let spread = Some((ratios.at(0.25), ratios.at(0.75)));
    Ok(vec![row("p50", theirs.p50(), ours.p50(), spread), row("p99", theirs.p99(), ours.p99(), None)])
}

/// Many processes' worth of sessions, each with an instance, that stop renewing at a random moment, as a crash would.
async fn gone(server: &Server, service: &Service) -> Outcome<Vec<Row>> {
    let ttl = Duration::from_secs(if server.kind() == Kind::Redis { 1 } else { 2 });
    let mut dying = JoinSet::new();
    for number in 0..DEATHS {
        let url = format!("{}/bench?ttl={}ms", server.url(), ttl.as_millis());
        let coord = Box::pin(quorate::connect(&url)).await.map_err(|e| e.to_string())?;
        let service = service.clone();
        dying.spawn(async move {
            let id = format!("mortal-{number}");
            let instance = Instance::new("bench", "10.0.0.8:8080").id(&*id);
            let registration = coord.register(instance).map_err(|e| e.to_string())?;
            until(&service, &id, true).await?;
            sleep(ttl.mul_f64(rand::random_range(0.5..1.5))).await;
            let session = coord.session().await.map_err(|e| e.to_string())?;
            let died = Instant::now();
            session.orphan();
            // Nothing is sent: the session is over here, and left to the server.
            coord.close().await.map_err(|e| e.to_string())?;
            until(&service, &id, false).await?;
            drop(registration);
            Ok::<_, String>(died.elapsed())
        });
    }
    let mut samples = Samples::new();
    while let Some(time) = dying.join_next().await {
        samples.add(time.map_err(|e| e.to_string())??);
    }
    let row = |quantile: &str, time: Duration| Row {
        what: format!("death → gone, ttl {ttl:?}, {quantile} of {DEATHS}"),
        raw: None,
        ours: Figure::Time(time),
        ratio: None,
        target: Target::None,
    };
    Ok(vec![row("p50", samples.p50()), row("p99", samples.p99())])
}
