//! A run of the bank: processes that make transfers, processes that recover, a judge who reads, and somebody who kills
//! them all and the servers, too.
//!
//! Promise: the total is right at every consistent read; at the end, with nobody left but recoverers, every transfer is
//! found on both sides or on none, no participant saw a mixed outcome, and the log is empty.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use quorate::{
    ErrorKind,
    commit::{Decision, TransactionsOptions, TxId},
};
use quorate_testkit::servers::{Postgres, PostgresOptions};
use tokio::time::{Instant, sleep, timeout};

use super::{
    Bank, Part, TOTAL, Told,
    keeper::{Keeper, Program},
    ledger::{self, Ledger},
    watched::Note,
};
use crate::{
    server::Server,
    site::{Site, connect_long},
};

/// How the error of a run begins that was right in everything and shows nothing.
pub const VOID: &str = "too little happened to show anything";

const GROUP: &str = "bank";
/// Processes that make transfers, each with its own connections.
const TELLERS: usize = 8;
const RECOVERERS: usize = 2;
/// The chance of death at each step of a transaction, of which there are some fifteen.
const CHANCE: f64 = 0.0008;
/// Recoverers come to few steps.
const CHANCE_OF_RECOVERERS: f64 = 0.02;
/// How long it may take until all is quiet.
const RECOVERY: Duration = Duration::from_secs(60);

/// What is run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The backends that hold accounts. The log is on the first.
    pub backends: Vec<&'static str>,
    /// Whether there is a book in PostgreSQL as well.
    pub book: bool,
    /// How long transfers are made.
    pub length: Duration,
    /// The teller's binary.
    pub program: PathBuf,
}

/// What the processes wrote.
#[derive(Debug, Default)]
pub struct Record {
    told: HashMap<TxId, Told>,
    branches: HashMap<(TxId, String), Span>,
    /// Processes that others killed.
    pub kills: usize,
    /// Processes that died at a step.
    pub deaths: usize,
    /// Processes that were stopped and went on.
    pub stops: usize,
    /// What must not be.
    pub wrong: Vec<String>,
}

/// A branch, by the wall clock in microseconds.
#[derive(Debug, Default)]
struct Span {
    prepared: Option<u64>,
    ended: Option<(Decision, u64)>,
}

impl Record {
    /// Takes note of a line of a teller.
    pub fn note(&mut self, line: &str) {
        if self.read(line).is_none() {
            self.wrong.push(format!("a line that nobody understands: {line}"));
        }
    }

    fn read(&mut self, line: &str) -> Option<()> {
        let words: Vec<_> = line.split(' ').collect();
        let [word, id, ref rest @ ..] = words[..] else { return None };
        let id: TxId = id.parse().ok()?;
        let told = match word {
            "committed" => Some(Told::Committed),
            "aborted" => Some(Told::Aborted),
            "unknown" => Some(Told::Unknown),
            _ => None,
        };
        if let Some(told) = told {
            return self.told.insert(id, told).is_none().then_some(());
        }
        let [participant, at] = rest[..] else { return None };
        let at: u64 = at.parse().ok()?;
        let span = self.branches.entry((id, participant.to_owned())).or_default();
        let decision = match word {
            "prepared" => {
                span.prepared.get_or_insert(at);
                return Some(());
            }
            "commit" => Decision::Commit,
            "abort" => Decision::Abort,
            _ => return None,
        };
        // It may be told again by somebody else; what counts is when it was first.
        let (ended, first) = span.ended.get_or_insert((decision, at));
        *first = at.min(*first);
        if *ended != decision {
            self.wrong.push(format!("{id}: {participant} was told both"));
        }
        Some(())
    }

    /// Mixed outcomes. (That nothing is in doubt any more is looked up at the participants: a reader may have ended a branch
    /// and written no line.)
    fn judge(&mut self) {
        let mut sides: HashMap<TxId, Decision> = HashMap::new();
        for ((id, _), span) in &self.branches {
            let Some((decision, _)) = span.ended else { continue };
            if *sides.entry(*id).or_insert(decision) != decision {
                self.wrong.push(format!("{id}: a mixed outcome"));
            }
        }
    }

    /// What can be said from what the processes wrote.
    fn figures(&self) -> Figures {
        let mut figures = Figures { transfers: self.told.len(), in_doubt: self.in_doubt(), ..Figures::default() };
        (figures.kills, figures.deaths, figures.stops) = (self.kills, self.deaths, self.stops);
        for told in self.told.values() {
            let word = match told {
                Told::Committed => "committed",
                Told::Aborted => "aborted",
                Told::Unknown => "not known",
            };
            *figures.told.entry(word).or_default() += 1;
        }
        figures
    }

    /// How long branches were in doubt, sorted.
    fn in_doubt(&self) -> Vec<Duration> {
        let spans = self.branches.values();
        let mut times: Vec<_> = spans
            .filter_map(|span| Some(Duration::from_micros(span.ended?.1.saturating_sub(span.prepared?))))
            .collect();
        times.sort();
        times
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let book = self.book.then_some("PostgreSQL");
        f.write_str(&self.backends.iter().copied().chain(book).collect::<Vec<_>>().join(", "))
    }
}

/// What a run has shown.
#[derive(Debug, Default)]
pub struct Figures {
    backends: String,
    seconds: f64,
    transfers: usize,
    told: BTreeMap<&'static str, usize>,
    effective: usize,
    reads: usize,
    kills: usize,
    deaths: usize,
    stops: usize,
    restarts: usize,
    quiet_after: Duration,
    in_doubt: Vec<Duration>,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told: Vec<_> = self.told.iter().map(|(word, count)| format!("{count} {word}")).collect();
        writeln!(
            f,
            "      bank over {}: {:.1} s, {} transfers were told of:",
            self.backends, self.seconds, self.transfers
        )?;
        writeln!(f, "        {}; {} took effect", told.join(", "), self.effective)?;
        writeln!(
            f,
            "        processes: {} killed, {} killed at a step, {} stopped for a while; servers: {} killed and restarted",
            self.kills, self.deaths, self.stops, self.restarts
        )?;
        writeln!(
            f,
            "        {} consistent reads, all {TOTAL}; quiet {:.1?} after the end",
            self.reads, self.quiet_after
        )?;
        let at = |part: f64| self.in_doubt.get(((self.in_doubt.len() as f64 - 1.0) * part) as usize).copied();
        let [median, most, longest] = [0.5, 0.99, 1.0].map(|part| at(part).unwrap_or_default());
        write!(
            f,
            "        in doubt, {} branches: p50 {median:.1?}, p99 {most:.1?}, longest {longest:.1?}",
            self.in_doubt.len()
        )
    }
}

impl Figures {
    /// A run in which nothing broke, or nothing was done, has shown nothing.
    fn is_void(&self) -> bool {
        let committed = self.told.get("committed").copied().unwrap_or_default();
        committed < 50 || self.reads < 3 || self.kills + self.deaths < 8 || self.restarts < 1
    }
}

/// Runs the bank.
///
/// # Errors
/// What was wrong, or why it could not be run.
///
/// # Panics
/// If the total is not right at some moment.
pub async fn run(plan: &Plan) -> Result<Figures, String> {
    let starts = plan.backends.iter().map(|backend| Site::start(backend));
    let sites = futures_util::future::join_all(starts).await.into_iter().collect::<Result<Vec<_>, _>>()?;
    let configs: Vec<_> = sites.iter().map(Site::config).collect();
    let coords = futures_util::future::join_all(configs.iter().map(connect_long)).await;
    let parts: Vec<_> = plan.backends.iter().zip(&coords).map(|(name, coord)| Part::new(name, coord)).collect();
    let options = TransactionsOptions::default();
    let book = match plan.book {
        true => Some(Postgres::start(PostgresOptions::default()).await.map_err(|e| e.to_string())?),
        false => None,
    };
    let book_url = book.as_ref().map(|server| format!("postgresql://quorate@{}/postgres", server.addr()));
    let postgres = book.map(|server| Server::Process(Box::new(server)));
    let ledger = book_url.as_deref().map(Ledger::new).transpose().map_err(|e| e.to_string())?;
    let bank =
        Bank::open(&coords[0], GROUP, &parts, ledger.as_ref(), options, &Note::nobody()).map_err(|e| e.to_string())?;
    bank.fill().await.map_err(|e| e.to_string())?;
    let record: Arc<Mutex<Record>> = Arc::default();
    let start = |role: &str, chance: f64| {
        let mut args = vec![role.to_owned(), GROUP.to_owned(), chance.to_string(), Site::url_of(&configs[0])];
        args.extend(
            plan.backends.iter().zip(&configs).map(|(name, config)| format!("{name}={}", Site::url_of(config))),
        );
        args.extend(book_url.iter().map(|url| format!("{}={url}", ledger::NAME)));
        Keeper::start(Program { path: plan.program.clone(), args }, record.clone())
    };
    let tellers: Vec<_> = (0..TELLERS).map(|_| start("transfer", CHANCE)).collect();
    let recoverers: Vec<_> = (0..RECOVERERS).map(|_| start("recover", CHANCE_OF_RECOVERERS)).collect();

    let began = Instant::now();
    let victims: Vec<_> = sites.iter().map(Site::server).chain(&postgres).collect();
    let breaking = harm(&victims, &tellers, &recoverers, began + plan.length);
    let mut reads = 0;
    let restarts = tokio::select! {
        restarts = breaking => restarts?,
        never = watch_total(&bank, &mut reads) => match never {},
    };
    let seconds = began.elapsed().as_secs_f64();
    for teller in tellers {
        teller.end().await;
    }
    let ended = Instant::now();
    bank.settled(&coords[0], RECOVERY).await;
    let quiet_after = ended.elapsed();
    assert_eq!(bank.total().await.map_err(|e| e.to_string())?, TOTAL, "at the end");
    // Alive until here: what the dead tellers left was theirs to finish.
    for recoverer in recoverers {
        recoverer.end().await;
    }
    let mut record = std::mem::take(&mut *record.lock().expect("no poison"));
    record.judge();
    let (wrong, effective) = bank.audit(&record.told).await.map_err(|e| e.to_string())?;
    record.wrong.extend(wrong);
    if !record.wrong.is_empty() {
        return Err(record.wrong.join("\n"));
    }
    let mut figures = record.figures();
    figures.backends = plan.to_string();
    (figures.seconds, figures.effective, figures.reads) = (seconds, effective, reads);
    (figures.restarts, figures.quiet_after) = (restarts, quiet_after);
    if figures.is_void() { Err(format!("{VOID}:\n{figures}")) } else { Ok(figures) }
}

/// Kills somebody every now and then, and breaks a server less often, one after the other.
async fn harm(servers: &[&Server], tellers: &[Keeper], recoverers: &[Keeper], until: Instant) -> Result<usize, String> {
    let any = |keepers: &[Keeper]| {
        let keeper = &keepers[rand::random_range(0..keepers.len())];
        match rand::random_range(0..4) {
            // Mostly longer than its session lives: others have taken over when it goes on.
            0 => keeper.stop(Duration::from_millis(rand::random_range(1000..8000))),
            _ => keeper.kill(),
        }
    };
    let mut restarts = 0;
    let mut calm = 0;
    while Instant::now() < until {
        sleep(Duration::from_millis(rand::random_range(300..1200))).await;
        calm += 1;
        match rand::random_range(0..10) {
            // None is spared by chance.
            _ if calm >= 5 => calm = 0,
            0..7 => {
                any(tellers);
                continue;
            }
            7..9 => {
                any(recoverers);
                continue;
            }
            _ => calm = 0,
        }
        let server = servers[restarts % servers.len()];
        restarts += 1;
        server.kill().await?;
        // Every now and then longer than anybody waits for an answer.
        let down = if rand::random_bool(0.2) { 5000..7000 } else { 0..800 };
        sleep(Duration::from_millis(rand::random_range(down))).await;
        server.restart().await?;
        // And one that hangs for a while, which is not the same as one that is gone.
        if rand::random_bool(0.3) {
            sleep(Duration::from_millis(500)).await;
            server.pause().await?;
            sleep(Duration::from_millis(rand::random_range(200..3000))).await;
            server.resume().await?;
        }
    }
    Ok(restarts)
}

/// Reads the total for as long as the future lives.
async fn watch_total(bank: &Bank, reads: &mut usize) -> Infallible {
    loop {
        match timeout(Duration::from_secs(60), bank.total()).await.expect("a read ends") {
            Ok(total) => {
                assert_eq!(total, TOTAL, "at a consistent read");
                *reads += 1;
            }
            // Written all the time is an answer, too; so is a server that is down.
            Err(error) => assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Ambiguous), "{error}"),
        }
        sleep(Duration::from_millis(50)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_sees_mixed_outcomes() {
        let (mixed, open, fine) = (TxId::random(), TxId::random(), TxId::random());
        let mut record = Record::default();
        let lines = [
            format!("prepared {mixed} etcd 10"),
            format!("commit {mixed} etcd 20"),
            format!("abort {mixed} redis 20"),
            format!("prepared {open} etcd 10"),
            format!("prepared {fine} etcd 10"),
            format!("commit {fine} etcd 40"),
            format!("commit {fine} etcd 30"),
            format!("committed {fine}"),
        ];
        lines.iter().for_each(|line| record.note(line));
        assert_eq!(record.wrong, Vec::<String>::new());
        assert_eq!(record.in_doubt(), [Duration::from_micros(10), Duration::from_micros(20)]);
        record.judge();
        assert_eq!(record.wrong.len(), 1, "{:?}", record.wrong);
        record.note(&format!("abort {fine} etcd 50"));
        record.note("prepared nonsense etcd 10");
        assert_eq!(record.wrong.len(), 3, "{:?}", record.wrong);
    }
}
