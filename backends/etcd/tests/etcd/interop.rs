//! etcd's own clients and ours, on the same lock and in the same election.

use std::{net::SocketAddr, process::Stdio, sync::Arc};

use quorate_core::{Backend as _, Coordinator, SessionOptions, TicketKind};
use tokio::{
    io::AsyncReadExt as _,
    process::{Child, Command},
};

use super::support::{connect, join, lease, leave, line, received, server, spawn_gone, until, within};

/// `etcdctl lock`, which holds the lock while a command runs, or without one until a signal comes.
fn etcdctl_lock(addr: SocketAddr, name: &str, command: &[&str]) -> Child {
    etcdctl(addr, &[&["lock", name], command].concat())
}

fn etcdctl(addr: SocketAddr, words: &[&str]) -> Child {
    Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .arg(format!("--endpoints=http://{addr}"))
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("etcdctl is installed with the package etcd-client")
}

#[tokio::test]
async fn a_lock_held_by_etcdctl_keeps_us_waiting_until_it_ends() {
    let server = server().await;
    let etcd = Arc::new(connect(server.addr()).await);
    let lease = lease(&etcd).await;
    let mut theirs = etcdctl_lock(server.addr(), "app/lock/job", &[]);
    until("etcdctl is in the line", || async { etcd.line(&line("job")).await.unwrap().tickets.len() == 1 }).await;

    let place = join(&etcd, "job", &lease).await;
    let [ahead] = place.ahead.as_slice() else { panic!("etcdctl is ahead: {place:?}") };
    assert_eq!(ahead.kind, TicketKind::Lock);
    assert!(!ahead.name.contains('-'), "its key is the lease alone: {ahead}");
    let entry = quorate_core::Enqueue { when_free: true, ..super::support::entry("job", &lease) };
    assert_eq!(etcd.enqueue(&entry).await.unwrap(), None, "a try sees it too");

    let gone = spawn_gone(&etcd, ahead);
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(!gone.is_finished());
    let id = theirs.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
    within("the wait ends when etcdctl does", gone).await.unwrap().unwrap();
    assert_eq!(etcd.look(&place.ticket, 1).await.unwrap().unwrap().ahead, []);
    within("etcdctl ends", theirs.wait()).await.unwrap();
}

#[tokio::test]
async fn a_lock_that_we_hold_keeps_etcdctl_waiting_until_we_leave() {
    let server = server().await;
    let etcd = connect(server.addr()).await;
    let lease = lease(&etcd).await;
    let ours = join(&etcd, "job", &lease).await;
    assert_eq!(ours.ahead, []);
    let mut theirs = etcdctl_lock(server.addr(), "app/lock/job", &["echo", "got it"]);
    until("etcdctl is in the line", || async { etcd.line(&line("job")).await.unwrap().tickets.len() == 2 }).await;
    // It has read the line and watches the ticket ahead of its own.
    until("etcdctl waits", || async { received(server.addr()).await.get("Watch").is_some_and(|n| *n > 0) }).await;
    assert!(theirs.try_wait().unwrap().is_none(), "it must not run while we hold the lock");
    // And we stand behind it.
    let behind = join(&etcd, "job", &lease).await;
    assert!(!behind.ahead[0].name.contains('-'), "{behind:?}");

    leave(&etcd, &ours.ticket).await;
    let output = within("etcdctl gets the lock", theirs.wait_with_output()).await.unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "got it");
    until("etcdctl has left", || async { etcd.look(&behind.ticket, 1).await.unwrap().unwrap().ahead.is_empty() }).await;
}

#[tokio::test]
async fn we_and_etcdctl_stand_in_the_same_election() {
    let server = server().await;
    let coord = Coordinator::new(Arc::new(connect(server.addr()).await), SessionOptions::default());
    let election = coord.election("job");
    let mut theirs = etcdctl(server.addr(), &["elect", "app/election/job", "their proposal"]);
    until("etcdctl leads", || async { election.leader().await.unwrap().is_some() }).await;
    let leader = election.leader().await.unwrap().unwrap();
    assert_eq!((&*leader.value, leader.owner), ("their proposal", None));

    let ours = tokio::spawn({
        let election = election.clone();
        async move { election.campaign("our proposal").await.unwrap() }
    });
    until("we wait", || async { election.candidates().await.unwrap().len() == 2 }).await;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(!ours.is_finished());
    let id = theirs.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
    within("etcdctl ends", theirs.wait()).await.unwrap();
    let ours = within("we lead", ours).await.unwrap();
    assert!(ours.term() > leader.term);

    // Its observer sees us, with what our ticket says; its candidate waits for us.
    let mut seen = String::new();
    let mut listening = etcdctl(server.addr(), &["elect", "-l", "app/election/job"]);
    let mut output = listening.stdout.take().unwrap();
    let reading = async {
        while !seen.contains("our proposal") {
            let mut some = [0; 512];
            let count = output.read(&mut some).await.unwrap();
            assert!(count > 0, "etcdctl has ended");
            seen.push_str(&String::from_utf8_lossy(&some[..count]));
        }
    };
    within("etcdctl sees our proposal", reading).await;
    let mut waiting = etcdctl(server.addr(), &["elect", "app/election/job", "again"]);
    until("etcdctl waits", || async { election.candidates().await.unwrap().len() == 2 }).await;
    assert_eq!(election.leader().await.unwrap().unwrap().value, "our proposal");
    ours.resign().await.unwrap();
    until("etcdctl leads", || async { election.leader().await.unwrap().is_some_and(|l| l.value == "again") }).await;
    for child in [&mut waiting, &mut listening] {
        child.kill().await.unwrap();
    }
}
