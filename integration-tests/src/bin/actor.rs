//! A process that holds locks, or beats and watches, on command, to be killed and stopped by the tests.
//!
//! Promise: one line in, one line out, in order; a line `bye` after the input has ended. Commands:
//! `acquire NAME`, `try NAME`, `deadline`, `held`, `fenced KEY VALUE`, `plain KEY VALUE`, `release`, `beat GROUP PEER`,
//! `observe GROUP SECONDS`, which watches for so long and answers with the peers that it was told dead, and
//! `contend NAME TASKS TURNS REFEREE`, which takes the lock TURNS times from each of TASKS tasks and reports
//! every entry and exit to the referee's address. In transactions, with a fate such as `decided 1 kill`:
//! `campaign NAME VALUE`, `leads`, `lead-left`, `lead-write KEY VALUE`, `own NAME COUNT ID`, `owned`, `join GROUP ID`;
//! `begin GROUP KEY KEY FATE`, `commit`, `recover GROUP FATE`, `serve GROUP NAME FATE`, `serves`.

use std::{process::ExitCode, time::Duration};

use quorate::{
    Config, Coordinator, LockGuard, Result,
    heartbeat::{PeerEvent, Publisher},
};
use quorate_integration_tests::{commit::Acting, heartbeats, leaders::Standing};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::Instant,
};

#[tokio::main]
async fn main() -> ExitCode {
    let url = std::env::args().nth(1).expect("the first argument is a URL");
    let config = Config::parse(&url).expect("the tests give a valid URL");
    let coord = match quorate::connect_with(&config).await {
        Ok(coord) => coord,
        Err(error) => {
            say(&format!("error {error}")).await;
            return ExitCode::FAILURE;
        }
    };
    let mut guard = None;
    let mut publisher = None;
    let mut acting = Acting::default();
    let mut standing = Standing::default();
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await.expect("stdin is readable") {
        let words: Vec<_> = line.split(' ').collect();
        let asked = match standing.obey(&coord, &words).await {
            Ok(None) => acting.obey(&coord, &words).await,
            answer => answer,
        };
        let obeyed = match asked {
            Ok(None) => obey(&coord, &mut guard, &mut publisher, &words).await.map(Some),
            answer => answer,
        };
        let answer = match obeyed {
            Ok(answer) => answer.unwrap_or_default(),
            Err(error) => format!("error {} {error}", error.kind()),
        };
        say(&answer).await;
    }
    let _ = coord.close().await;
    say("bye").await;
    ExitCode::SUCCESS
}

async fn say(line: &str) {
    let mut out = tokio::io::stdout();
    out.write_all(format!("{line}\n").as_bytes()).await.expect("stdout is open");
    out.flush().await.expect("stdout is open");
}

async fn obey(
    coord: &Coordinator,
    guard: &mut Option<LockGuard>,
    publisher: &mut Option<Publisher>,
    words: &[&str],
) -> Result<String> {
    Ok(match (words, guard.as_ref()) {
        (["acquire", name], _) => {
            let held = guard.insert(coord.lock(name).acquire().await?);
            format!("granted {}", held.token())
        }
        (["try", name], _) => {
            *guard = coord.lock(name).try_acquire().await?;
            guard.as_ref().map_or_else(|| "refused".to_owned(), |held| format!("granted {}", held.token()))
        }
        (["deadline"], Some(held)) => {
            format!("left {}", held.deadline().saturating_duration_since(Instant::now()).as_millis())
        }
        (["held"], Some(held)) => format!("held {}", held.is_held()),
        (["fenced", key, value], Some(held)) => {
            match coord.kv().put_fenced(&held.fence(), key, (*value).to_owned()).await {
                Ok(_) => "written".to_owned(),
                Err(error) if error.kind() == quorate::ErrorKind::SessionLost => "refused".to_owned(),
                Err(error) => return Err(error),
            }
        }
        (["plain", key, value], _) => {
            coord.kv().put(key, (*value).to_owned()).await?;
            "written".to_owned()
        }
        (["release"], Some(_)) => {
            guard.take().expect("just seen").release().await?;
            "released".to_owned()
        }
        (["beat", group, peer], _) => {
            let beating = publisher.insert(coord.heartbeat(group).beat(peer, heartbeats::EVERY)?);
            format!("beating {}", beating.beating().await?)
        }
        (["observe", group, seconds], _) => {
            let time = Duration::from_secs(seconds.parse().expect("a number"));
            observe(coord, group, time).await?
        }
        (["contend", name, tasks, turns, referee], _) => {
            let (tasks, turns) = (tasks.parse().expect("a number"), turns.parse().expect("a number"));
            contend(coord, name, tasks, turns, referee).await?;
            "done".to_owned()
        }
        _ => format!("error unknown command {words:?}"),
    })
}

async fn observe(coord: &Coordinator, group: &str, time: Duration) -> Result<String> {
    let mut monitor = coord.heartbeat(group).monitor(heartbeats::options())?;
    let mut answer = "dead".to_owned();
    let _ = tokio::time::timeout(time, async {
        while let Some(event) = monitor.next().await {
            if let PeerEvent::Dead { peer, .. } = event {
                answer.push(' ');
                answer.push_str(&peer);
            }
        }
    })
    .await;
    Ok(answer)
}

async fn contend(coord: &Coordinator, name: &str, tasks: usize, turns: usize, referee: &str) -> Result<()> {
    let mut running = Vec::new();
    for _ in 0..tasks {
        let (lock, referee) = (coord.lock(name), referee.to_owned());
        running.push(tokio::spawn(async move {
            let mut referee = TcpStream::connect(referee).await.expect("the referee listens");
            for _ in 0..turns {
                let guard = lock.acquire().await?;
                report(&mut referee, b'+', guard.token().get()).await;
                tokio::time::sleep(Duration::from_micros(200)).await;
                report(&mut referee, b'-', guard.token().get()).await;
                guard.release().await?;
            }
            Ok(())
        }));
    }
    for task in running {
        task.await.expect("the task does not panic")?;
    }
    Ok(())
}

/// Tells the referee and waits until it has taken note, so that its order of events is the real one.
async fn report(referee: &mut TcpStream, event: u8, token: u64) {
    let mut message = [event; 9];
    message[1..].copy_from_slice(&token.to_be_bytes());
    referee.write_all(&message).await.expect("the referee reads");
    assert_eq!(referee.read_u8().await.expect("the referee answers"), b'!');
}
