//! The same locks as other clients of ZooKeeper: Apache Curator and kazoo, the real ones.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use quorate_core::{Backend, TicketKind, Write};
use quorate_testkit::install::python_venv;
use support::*;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A foreign client that takes orders on its input, one a line, and says on its output when each was carried out.
struct Foreign {
    _child: Child,
    orders: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
}

impl Foreign {
    async fn start(mut command: Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("the interpreter is there");
        let (orders, said) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut foreign = Self { _child: child, orders, said: BufReader::new(said).lines() };
        foreign.hears("ready").await;
        foreign
    }

    async fn kazoo(server: &quorate_testkit::servers::Server) -> Self {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kazoo");
        let python = python_venv(&dir, &["kazoo"]).unwrap_or_else(|e| panic!("{e}"));
        let mut command = Command::from(python.command());
        command.arg(script("kazoo_client.py")).arg(server.addr().to_string());
        Self::start(command).await
    }

    async fn curator(server: &quorate_testkit::servers::Server) -> Self {
        const NEEDED: [&str; 8] = [
            "curator-recipes",
            "curator-framework",
            "curator-client",
            "guava",
            "zookeeper",
            "zookeeper-jute",
            "slf4j-api",
            "slf4j-nop",
        ];
        let jar = |name: &str| Path::new("/usr/share/java").join(format!("{name}.jar"));
        for name in NEEDED {
            let how = "install the Debian packages libcurator-recipes-java and default-jdk-headless";
            assert!(jar(name).is_file(), "{} is missing: {how}", jar(name).display());
        }
        let netty = std::fs::read_dir("/usr/share/java").unwrap().filter_map(|f| Some(f.ok()?.path()));
        let netty = netty.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("netty-")));
        let path: Vec<_> = NEEDED.iter().map(|n| jar(n)).chain(netty).collect();
        let mut command = Command::new("java");
        command.arg("-XX:TieredStopAtLevel=1").arg("-XX:+UseSerialGC").arg("-cp");
        command.arg(std::env::join_paths(path).unwrap()).arg(script("CuratorClient.java"));
        command.arg(server.addr().to_string());
        Self::start(command).await
    }

    async fn order(&mut self, order: &str) {
        self.orders.write_all(format!("{order}\n").as_bytes()).await.unwrap();
    }

    async fn hears(&mut self, expected: &str) {
        let said = timeout(PATIENCE, self.said.next_line()).await.expect("says something in time").unwrap();
        assert_eq!(said.as_deref(), Some(expected));
    }

    /// Asserts that it says nothing for a while.
    async fn is_silent(&mut self) {
        let said = timeout(Duration::from_millis(300), self.said.next_line()).await;
        assert!(said.is_err(), "{said:?}");
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop").join(name)
}

/// We hold, they wait, we wait behind them; then each leaves in turn.
async fn they_and_we_take_turns(server: &quorate_testkit::servers::Server, mut they: Foreign) {
    let backend = client(server).await;
    let lease = keep(&backend, TTL).await;
    let ours = join(&backend, &line("jobs"), &lease.id).await;
    assert_eq!(ours.ahead, []);
    they.order("acquire /tests/lock/jobs").await;
    until("they stand in line", PATIENCE, async || backend.line(&line("jobs")).await.unwrap().tickets.len() == 2).await;
    they.is_silent().await;
    let theirs = backend.line(&line("jobs")).await.unwrap().tickets[1].clone();
    assert_eq!(theirs.kind, TicketKind::Lock);
    let behind = join(&backend, &line("jobs"), &lease.id).await;
    assert_eq!(behind.ahead, std::slice::from_ref(&theirs));

    let release = commit(&backend, [standing(&ours)], [Write::Leave(ours.ticket.clone())]).await.unwrap();
    assert!(release.applied);
    they.hears("acquired").await;
    assert_eq!(backend.look(&behind.ticket, 1).await.unwrap().unwrap().ahead, std::slice::from_ref(&theirs));
    let waiting = tokio::spawn({
        let (backend, theirs) = (backend.clone(), theirs.clone());
        async move { backend.gone(&theirs).await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished(), "they hold it");
    they.order("release /tests/lock/jobs").await;
    they.hears("released").await;
    timeout(PATIENCE, waiting).await.expect("woken by their release").unwrap().unwrap();
    assert_eq!(backend.look(&behind.ticket, 1).await.unwrap().unwrap().ahead, []);
    assert!(behind.token > ours.token);

    they.order("acquire /tests/lock/jobs").await;
    they.is_silent().await;
    // Not released but lost with the lease.
    backend.revoke(&lease.id).await.unwrap();
    they.hears("acquired").await;
    they.order("release /tests/lock/jobs").await;
    they.hears("released").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kazoo_locks_and_ours_exclude_each_other_in_order() {
    let server = server().await;
    let kazoo = Foreign::kazoo(&server).await;
    they_and_we_take_turns(&server, kazoo).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curator_locks_and_ours_exclude_each_other_in_order() {
    let server = server().await;
    let curator = Foreign::curator(&server).await;
    they_and_we_take_turns(&server, curator).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curators_read_write_lock_and_our_tickets_respect_each_other() {
    let server = server().await;
    let mut curator = Foreign::curator(&server).await;
    let backend = client(&server).await;
    let lease = keep(&backend, TTL).await;
    let join_as = async |kind| {
        let entry = quorate_core::Enqueue { kind, depth: usize::MAX, ..entry(&line("rw"), &lease.id) };
        backend.enqueue(&entry).await.unwrap().unwrap()
    };
    let reader = join_as(TicketKind::Read).await;
    curator.order("read /tests/lock/rw").await;
    curator.hears("read").await;
    let tickets = backend.line(&line("rw")).await.unwrap().tickets;
    assert_eq!(tickets.iter().map(|t| t.kind).collect::<Vec<_>>(), [TicketKind::Read, TicketKind::Read]);
    curator.order("unread /tests/lock/rw").await;
    curator.hears("unread").await;

    curator.order("write /tests/lock/rw").await;
    curator.is_silent().await;
    let late = join_as(TicketKind::Read).await;
    assert_eq!(late.ahead.iter().map(|t| t.kind).collect::<Vec<_>>(), [TicketKind::Write, TicketKind::Read]);
    leave(&backend, &reader.ticket).await;
    curator.hears("write").await;
    let ahead = backend.look(&late.ticket, usize::MAX).await.unwrap().unwrap().ahead;
    assert_eq!(ahead.iter().map(|t| t.kind).collect::<Vec<_>>(), [TicketKind::Write]);
    curator.order("unwrite /tests/lock/rw").await;
    curator.hears("unwrite").await;
    leave(&backend, &late.ticket).await;

    let writer = join_as(TicketKind::Write).await;
    curator.order("read /tests/lock/rw").await;
    curator.is_silent().await;
    leave(&backend, &writer.ticket).await;
    curator.hears("read").await;
}

/// Joins and waits until nobody is ahead.
async fn acquire(backend: &quorate_zookeeper::ZooKeeper, place: quorate_core::Place) -> quorate_core::Place {
    let mut place = place;
    while let Some(nearest) = place.ahead.first() {
        backend.gone(nearest).await.unwrap();
        place = backend.look(&place.ticket, 1).await.unwrap().expect("it stands");
    }
    place
}

/// Two of ours, in processes of their own as far as the server can tell, and kazoo. Most of the time the line is empty or
/// nearly so, which is when it is claimed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_count_is_lost_between_kazoo_and_us() {
    let server = server().await;
    let mut kazoo = Foreign::kazoo(&server).await;
    // A place that goes with the server.
    let file = server.data_dir().join("count");
    std::fs::write(&file, "0").unwrap();
    // Made by us, so that it is claimed from the first time on.
    let first = client(&server).await;
    let lease = keep(&first, TTL).await;
    leave(&first, &join(&first, &line("count"), &lease.id).await.ticket).await;
    kazoo.order(&format!("count /tests/lock/count,{}", file.display())).await;
    let ours: Vec<_> = (0..2)
        .map(|us| {
            let (addr, file) = (server.addr(), file.clone());
            tokio::spawn(async move {
                let backend = connect(&config(&[addr])).await;
                let lease = keep(&backend, TTL).await;
                let mut last = quorate_core::Revision(0);
                for round in 0..100_u64 {
                    let place = join(&backend, &line("count"), &lease.id).await;
                    let place = acquire(&backend, place).await;
                    assert!(place.token > last, "tokens rise");
                    last = place.token;
                    let count: u64 = std::fs::read_to_string(&file).unwrap().parse().unwrap();
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    std::fs::write(&file, (count + 1).to_string()).unwrap();
                    leave(&backend, &place.ticket).await;
                    if round % 3 == us {
                        tokio::time::sleep(Duration::from_millis(3)).await;
                    }
                }
            })
        })
        .collect();
    for task in ours {
        task.await.unwrap();
    }
    kazoo.hears("counted").await;
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "300");
}
