//! Commands that run while something is held.

use std::{
    ffi::OsString,
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clap::Args;
use quorate::{Coordinator, discovery::Instance};
use tokio::time::timeout;

use crate::{
    Failure, Outcome,
    child::{self, Signals},
    exit,
};

/// How long giving up may take at the end; what was not given up by then is when the session ends.
pub(crate) const GIVE_UP: Duration = Duration::from_secs(5);

/// Options of `quorate lock`.
#[derive(Args)]
pub(crate) struct LockArgs {
    /// The lock's name, such as jobs/nightly.
    name: String,
    /// How long to wait for it, such as 30s; by default for ever.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "now")]
    wait: Option<Duration>,
    /// Do not wait.
    #[arg(long)]
    now: bool,
    /// The command, after `--`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Options of `quorate lead`.
#[derive(Args)]
pub(crate) struct LeadArgs {
    /// The election's name.
    name: String,
    /// What others shall know of the leader, often an address.
    #[arg(long, default_value = "")]
    value: String,
    /// The command, after `--`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Options of `quorate register`.
#[derive(Args)]
pub(crate) struct RegisterArgs {
    /// The service's name.
    service: String,
    /// Host and port, such as 10.0.0.7:8080.
    address: String,
    /// The instance's name within the service; by default its address.
    #[arg(long)]
    id: Option<String>,
    /// May be given more than once.
    #[arg(long, value_name = "WORD")]
    tag: Vec<String>,
    /// May be given more than once.
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_and_value)]
    meta: Vec<(String, String)>,
    /// Where it runs.
    #[arg(long)]
    zone: Option<String>,
    /// Its share of the requests.
    #[arg(long)]
    weight: Option<u32>,
    /// The command, after `--`.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

fn name_and_value(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it looks like name=value")?;
    Ok((name.to_owned(), value.to_owned()))
}

pub(crate) async fn lock(coord: &Coordinator, args: LockArgs, mut signals: Signals) -> Outcome {
    let lock = coord.lock(&args.name);
    let acquire = async {
        match args.wait {
            _ if args.now => lock.try_acquire().await,
            Some(limit) => lock.acquire_within(limit).await,
            None => lock.acquire().await.map(Some),
        }
    };
    let guard = tokio::select! {
        guard = acquire => guard?,
        // The place in the line is given up with the future.
        signal = signals.next() => return Ok(child::ended_by(signal)),
    };
    let Some(guard) = guard else {
        return Err(Failure::new(exit::TAKEN, format!("{} is held by somebody else", args.name)));
    };
    let environment = [("QUORATE_TOKEN", guard.token().to_string())];
    let ran = guard.protect(child::run(&args.command, &environment)).await;
    let Ok(status) = ran else {
        return Err(Failure::new(exit::LOST, format!("{} was lost, and the command killed", args.name)));
    };
    // Whatever happens to the release, the command has run; what was not released ends with the session.
    match timeout(GIVE_UP, guard.release()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => eprintln!("quorate: {error}"),
        Err(_) => eprintln!("quorate: {} was not released within {GIVE_UP:?}; it is free after the TTL", args.name),
    }
    status
}

pub(crate) async fn lead(coord: &Coordinator, args: LeadArgs, mut signals: Signals) -> Outcome {
    let (command, leads) = (Arc::new(args.command), Arc::new(AtomicBool::new(false)));
    let election = coord.election(&args.name);
    let led = election.run_while_leader(args.value.as_str(), |leadership| {
        let (command, leads) = (command.clone(), Leads::now(&leads));
        async move {
            let environment = [("QUORATE_TOKEN", leadership.term().to_string())];
            let ended = child::run(&command, &environment).await;
            drop(leads);
            ControlFlow::Break(ended)
        }
    });
    tokio::pin!(led);
    loop {
        tokio::select! {
            led = &mut led => return led?,
            // While the command runs, it is told by itself, and its end is ours.
            signal = signals.next() => if !leads.load(Ordering::Acquire) {
                return Ok(child::ended_by(signal));
            }
        }
    }
}

/// Says that a command runs, until it is dropped: also with the command, when the leadership is lost.
struct Leads(Arc<AtomicBool>);

impl Leads {
    fn now(leads: &Arc<AtomicBool>) -> Self {
        leads.store(true, Ordering::Release);
        Self(leads.clone())
    }
}

impl Drop for Leads {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

pub(crate) async fn register(coord: &Coordinator, args: RegisterArgs, mut signals: Signals) -> Outcome {
    let mut instance = Instance::new(args.service, args.address);
    instance = args.tag.into_iter().fold(instance, Instance::tag);
    instance = args.meta.into_iter().fold(instance, |instance, (name, value)| instance.meta(name, value));
    if let Some(id) = args.id {
        instance = instance.id(id);
    }
    if let Some(zone) = args.zone {
        instance = instance.zone(zone);
    }
    if let Some(weight) = args.weight {
        instance = instance.weight(weight);
    }
    let registration = coord.register(instance)?;
    tokio::select! {
        ready = registration.ready() => ready?,
        signal = signals.next() => return Ok(child::ended_by(signal)),
    }
    let status = if args.command.is_empty() {
        signals.next().await;
        Ok(0)
    } else {
        child::run(&args.command, &[]).await
    };
    match timeout(GIVE_UP, registration.close()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => eprintln!("quorate: {error}"),
        Err(_) => eprintln!("quorate: the registration was not taken back within {GIVE_UP:?}; it goes after the TTL"),
    }
    status
}
