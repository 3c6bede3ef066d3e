//! A process of the bank: makes transfers, or recovers what others left; killed at random by itself and by others.
//!
//! Arguments: `transfer` or `recover`, the group, the chance of death at each step, the URL of the log, and a `NAME=URL`
//! for each participant. It writes one line for everything that happens, with the wall clock in microseconds, and runs
//! until its input ends.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use quorate::{
    Config, Coordinator,
    commit::{Branch, Decision, TransactionsOptions},
};
use quorate_integration_tests::{
    bank::{
        Bank, Part, Told,
        ledger::{self, Ledger},
        watched::{Moment, Note},
    },
    commit::eager,
};
use rustix::process::{Signal, getpid, kill_process};
use tokio::{io::AsyncReadExt as _, time::sleep};

/// Between two transfers.
const PAUSE: Duration = Duration::from_millis(100);

#[tokio::main]
async fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [role, group, chance, log, parts @ ..] = args.as_slice() else { panic!("see the head of this file") };
    let chance: f64 = chance.parse().expect("a chance is a number");
    let log = connect(log).await;
    let (mut opened, mut book) = (Vec::new(), None);
    for part in parts {
        let (name, url) = part.split_once('=').expect("NAME=URL");
        if name == ledger::NAME {
            book = Some(Ledger::new(url).expect("the runner gives a valid URL"));
            continue;
        }
        opened.push(Part::new(name, &connect(url).await));
    }
    let options = TransactionsOptions::default().within(Duration::from_secs(5)).on_step(move |_, _| {
        if rand::random_bool(chance) {
            kill_process(getpid(), Signal::KILL).expect("a process may signal itself");
        }
        Box::pin(std::future::ready(()))
    });
    let bank = Bank::open(&log, group, &opened, book.as_ref(), options, &Note::new(note)).expect("good names");
    let work = async {
        if role == "recover" {
            let _recoverer = bank.all.recover_with(eager());
            std::future::pending::<()>().await;
        }
        bank.work(PAUSE, tell).await;
    };
    let mut input = tokio::io::stdin();
    tokio::select! {
        () = work => {}
        _ = input.read_u8() => {}
    }
}

/// The server may be down at the moment.
async fn connect(url: &str) -> Coordinator {
    let config = Config::parse(url).expect("the runner gives a valid URL");
    for _ in 0..100 {
        if let Ok(coord) = quorate::connect_with(&config).await {
            return coord;
        }
        sleep(Duration::from_millis(200)).await;
    }
    panic!("nobody answers at {:?}", config.endpoints);
}

/// For figures only: one clock for all processes of the machine.
fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros())
}

fn note(branch: &Branch, moment: Moment) {
    let word = match moment {
        Moment::Prepared => "prepared",
        Moment::Ended(Decision::Commit) => "commit",
        Moment::Ended(Decision::Abort) => "abort",
    };
    println!("{word} {} {} {}", branch.id, branch.participant, now_us());
}

fn tell(id: quorate::commit::TxId, told: Told) {
    let word = match told {
        Told::Committed => "committed",
        Told::Aborted => "aborted",
        Told::Unknown => "unknown",
    };
    println!("{word} {id}");
}
