//! `quorate`: locks, elections, services and transactions of a coordinator, from a shell.
//!
//! Promise: a command that runs under a lock or a leadership is killed when that is lost, before anybody else can have
//! it; the exit status says what happened; nothing that is printed repeats the URL, which may hold a password.

mod child;
mod hold;
mod show;

use std::{ffi::OsString, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use quorate::{Config, Coordinator, ErrorKind, commit::Decision};

use show::Out;

/// Of `sysexits.h`, where that has a word for it.
pub(crate) mod exit {
    /// What was asked for is not there.
    pub(crate) const NOTHING: u8 = 1;
    pub(crate) const USAGE: u8 = 64;
    pub(crate) const UNAVAILABLE: u8 = 69;
    pub(crate) const SOFTWARE: u8 = 70;
    /// A write that may have happened.
    pub(crate) const AMBIGUOUS: u8 = 74;
    /// Somebody else has it.
    pub(crate) const TAKEN: u8 = 75;
    /// It was lost, and the command killed.
    pub(crate) const LOST: u8 = 76;
    pub(crate) const DENIED: u8 = 77;
    pub(crate) const NOT_FOUND: u8 = 127;
}

const EXIT: &str = "Exit status: that of the command, if one was run (128 and the signal, if one ended it); otherwise \
0, 1 for nothing there, 64 bad usage, 69 not reachable, 74 a write that may have happened, 75 somebody else has it, \
76 it was lost and the command killed, 77 denied, 127 no such command, 70 anything else.";

/// Locks, elections, services and transactions of etcd, Redis, Consul or ZooKeeper.
#[derive(Parser)]
#[command(name = "quorate", version, about, after_help = EXIT)]
struct Cli {
    /// Such as etcd://10.0.0.1:2379,10.0.0.2:2379/my-app. With a password, better in the environment: others can read
    /// command lines.
    #[arg(long, env = "QUORATE_URL", hide_env_values = true, value_name = "URL")]
    url: String,
    /// How long the coordinator keeps what a dead process holds, such as 10s; it may grant more.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    ttl: Option<Duration>,
    /// One JSON object per line instead of text.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a command while holding a lock. It finds the fencing token in QUORATE_TOKEN.
    Lock(hold::LockArgs),
    /// Run a command while leading, again after each loss. It finds the term in QUORATE_TOKEN.
    Lead(hold::LeadArgs),
    /// Keep an instance of a service registered while a command runs, or until SIGINT or SIGTERM.
    Register(hold::RegisterArgs),
    /// Who holds a lock, and how many wait.
    Status(Name),
    /// Take a lock from its holder, who learns of it within about a second.
    Break(Name),
    /// Who leads.
    Leader(Followed),
    /// The instances of a service.
    Instances(Followed),
    /// The members of a group.
    Members(Name),
    /// Print a value.
    Get(Name),
    /// Write a value; `-` reads it from standard input.
    Put {
        /// The key.
        key: String,
        /// Its value.
        value: OsString,
    },
    /// Delete a key.
    Delete(Name),
    /// All keys under a prefix, with their values.
    List {
        /// By default all.
        #[arg(default_value = "")]
        prefix: String,
    },
    /// Print what changes under a prefix, until it is interrupted.
    Watch {
        /// By default all.
        #[arg(default_value = "")]
        prefix: String,
    },
    /// Transactions that are not over, or ended otherwise than decided.
    InDoubt(Name),
    /// Decide a transaction by hand. To abort is always safe; to commit is not, if a participant has not prepared.
    Resolve {
        /// Of its transactions.
        group: String,
        /// The transaction's id.
        id: String,
        /// Which way it ends.
        decision: Way,
    },
    /// Take an outcome that an operator has seen from the list.
    Acknowledge {
        /// Of its transactions.
        group: String,
        /// The transaction's id.
        id: String,
    },
    /// How far the coordinator's clock is ahead of this machine's.
    Clock,
}

#[derive(Args)]
struct Name {
    /// Of the lock, key, group or service.
    name: String,
}

#[derive(Args)]
struct Followed {
    /// Of the election or service.
    name: String,
    /// Go on printing when it changes, until it is interrupted.
    #[arg(long)]
    follow: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Way {
    Commit,
    Abort,
}

impl From<Way> for Decision {
    fn from(way: Way) -> Self {
        match way {
            Way::Commit => Self::Commit,
            Way::Abort => Self::Abort,
        }
    }
}

/// Why a command of ours failed.
pub(crate) struct Failure {
    pub(crate) status: u8,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn new(status: u8, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }
}

impl From<quorate::Error> for Failure {
    fn from(error: quorate::Error) -> Self {
        let status = match error.kind() {
            ErrorKind::InvalidInput | ErrorKind::Unsupported => exit::USAGE,
            ErrorKind::Unavailable => exit::UNAVAILABLE,
            ErrorKind::Ambiguous => exit::AMBIGUOUS,
            ErrorKind::Denied => exit::DENIED,
            ErrorKind::SessionLost => exit::LOST,
            _ => exit::SOFTWARE,
        };
        Self::new(status, error.to_string())
    }
}

pub(crate) type Outcome = Result<u8, Failure>;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let status = if error.use_stderr() { exit::USAGE } else { 0 };
            // Nothing can be done about a closed terminal.
            error.print().ok();
            return status.into();
        }
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("quorate: {error}");
            return exit::SOFTWARE.into();
        }
    };
    let outcome = runtime.block_on(run(cli));
    // Somebody who interrupts us may never end our standard input.
    runtime.shutdown_background();
    match outcome {
        Ok(status) => status.into(),
        Err(failure) => {
            eprintln!("quorate: {}", failure.text);
            failure.status.into()
        }
    }
}

async fn run(cli: Cli) -> Outcome {
    let mut config = Config::parse(&cli.url)?;
    if let Some(ttl) = cli.ttl {
        config = config.with_session_ttl(ttl);
    }
    let signals = child::Signals::listen()?;
    let coord = quorate::connect_with(&config).await?;
    let outcome = work(&coord, cli.command, Out::new(cli.json), signals).await;
    // What is still held is given up now and not after its TTL, if the coordinator can be reached.
    let closed = tokio::time::timeout(hold::GIVE_UP, coord.close()).await;
    let status = outcome?;
    match closed {
        Ok(closed) => closed.map(|()| status).map_err(Failure::from),
        Err(_) => {
            eprintln!("quorate: the coordinator does not answer; what was held is free after the TTL");
            Ok(status)
        }
    }
}

async fn work(coord: &Coordinator, command: Command, out: Out, mut signals: child::Signals) -> Outcome {
    let shown = match command {
        Command::Lock(args) => return hold::lock(coord, args, signals).await,
        Command::Lead(args) => return hold::lead(coord, args, signals).await,
        Command::Register(args) => return hold::register(coord, args, signals).await,
        command => show(coord, command, out),
    };
    // What only looks, and what writes once, may be dropped.
    tokio::select! {
        shown = shown => shown,
        signal = signals.next() => Ok(child::ended_by(signal)),
    }
}

async fn show(coord: &Coordinator, command: Command, out: Out) -> Outcome {
    match command {
        Command::Status(Name { name }) => show::status(coord, out, &name).await,
        Command::Break(Name { name }) => show::break_lock(coord, out, &name).await,
        Command::Leader(Followed { name, follow }) => show::leader(coord, out, &name, follow).await,
        Command::Instances(Followed { name, follow }) => show::instances(coord, out, &name, follow).await,
        Command::Members(Name { name }) => show::members(coord, out, &name).await,
        Command::Get(Name { name }) => show::get(coord, out, &name).await,
        Command::Put { key, value } => show::put(coord, out, &key, &value).await,
        Command::Delete(Name { name }) => show::delete(coord, &name).await,
        Command::List { prefix } => show::list(coord, out, &prefix).await,
        Command::Watch { prefix } => show::watch(coord, out, &prefix).await,
        Command::InDoubt(Name { name }) => show::in_doubt(coord, out, &name).await,
        Command::Resolve { group, id, decision } => show::resolve(coord, out, &group, &id, decision.into()).await,
        Command::Acknowledge { group, id } => show::acknowledge(coord, &group, &id).await,
        Command::Clock => show::clock(coord, out).await,
        Command::Lock(_) | Command::Lead(_) | Command::Register(_) => Ok(exit::SOFTWARE),
    }
}
