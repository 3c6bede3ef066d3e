//! The program as a shell runs it, on every coordinator.

use std::{
    process::{Output, Stdio},
    time::Duration,
};

use quorate_testkit::servers::{
    Consul, ConsulOptions, Etcd, EtcdOptions, Redis, RedisOptions, Server, ZooKeeper, ZooKeeperOptions,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdout, Command},
    time::{Instant, sleep, timeout},
};

const SOON: Duration = Duration::from_secs(20);

async fn servers() -> Vec<Server> {
    vec![
        Etcd::start(EtcdOptions::default()).await.expect("etcd"),
        Redis::start(RedisOptions::default()).await.expect("redis"),
        Consul::start(ConsulOptions::default()).await.expect("consul"),
        ZooKeeper::start(ZooKeeperOptions::default()).await.expect("zookeeper"),
    ]
}

fn quorate(server: &Server, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    command.env("QUORATE_URL", format!("{}/cli?ttl=2s", server.url())).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn ended(mut command: Command) -> Output {
    timeout(SOON, command.output()).await.expect("it ends").expect("it starts")
}

/// Status and output.
async fn run(server: &Server, arguments: &[&str]) -> (i32, String) {
    let output = ended(quorate(server, arguments)).await;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.code().expect("not by a signal"), text)
}

/// A program that goes on, and the lines that it prints.
struct Running {
    child: Child,
    lines: tokio::io::Lines<BufReader<ChildStdout>>,
}

impl Running {
    fn start(server: &Server, arguments: &[&str]) -> Self {
        let mut child = quorate(server, arguments).spawn().expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, lines }
    }

    async fn line(&mut self) -> String {
        timeout(SOON, self.lines.next_line()).await.expect("a line").expect("readable").expect("not the end")
    }

    async fn signal(&self, name: &str) {
        let pid = self.child.id().expect("it runs").to_string();
        assert!(Command::new("kill").args([name, &pid]).status().await.expect("kill runs").success());
    }

    async fn status(mut self) -> i32 {
        timeout(SOON, self.child.wait()).await.expect("it ends").expect("waited for").code().expect("not by a signal")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_under_a_lock_keeps_others_out_and_its_status_is_ours() {
    for server in servers().await {
        let name = server.name().to_owned();
        let mut holder =
            Running::start(&server, &["lock", "jobs/a", "--", "sh", "-c", "echo $QUORATE_TOKEN; read x; exit 7"]);
        // Standard input is empty, so that the command ends by itself only in the last case.
        let token: u64 = holder.line().await.parse().expect("a token");
        assert_eq!(holder.status().await, 7, "{name}");

        let mut holder =
            Running::start(&server, &["lock", "jobs/a", "--", "sh", "-c", "echo $QUORATE_TOKEN; exec sleep 60"]);
        let next: u64 = holder.line().await.parse().expect("a token");
        assert!(next > token, "{name}: the token has grown");
        let (status, _) = run(&server, &["lock", "--now", "jobs/a", "--", "echo", "in"]).await;
        assert_eq!(status, 75, "{name}: it is held");
        let (status, text) = run(&server, &["lock", "--wait", "300ms", "jobs/a", "--", "echo", "in"]).await;
        assert_eq!((status, text.as_str()), (75, ""), "{name}: and not run without it");
        let (status, text) = run(&server, &["status", "jobs/a"]).await;
        assert!(status == 0 && text.starts_with(&format!("held\t0\t{next}\t")), "{name}: {text}");

        holder.signal("-TERM").await;
        let freed = Instant::now();
        assert_eq!(holder.status().await, 128 + 15, "{name}: passed on, and its end is ours");
        let (status, text) = run(&server, &["lock", "--wait", "10s", "jobs/a", "--", "echo", "in"]).await;
        assert_eq!((status, text.as_str()), (0, "in"), "{name}");
        assert!(freed.elapsed() < Duration::from_secs(2), "{name}: released, not left to its TTL");
        assert_eq!(run(&server, &["status", "jobs/a"]).await, (0, "free\t0".to_owned()), "{name}");
        assert_eq!(run(&server, &["lock", "jobs/a", "--", "no-such-command"]).await.0, 127, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_whose_lock_is_lost_is_killed_with_what_it_started() {
    for server in servers().await {
        let name = server.name().to_owned();
        let script = "sleep 60 & echo $!; wait";
        let mut holder = Running::start(&server, &["lock", "jobs/b", "--", "sh", "-c", script]);
        let grandchild = holder.line().await;
        server.pause().expect("it runs");
        let began = Instant::now();
        assert_eq!(holder.status().await, 76, "{name}");
        assert!(began.elapsed() < Duration::from_secs(12), "{name}: {:?}", began.elapsed());
        let stat = format!("/proc/{grandchild}/stat");
        let gone = || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z"));
        let end = Instant::now() + SOON;
        while !gone() {
            assert!(Instant::now() < end, "{name}: {grandchild} lives");
            sleep(Duration::from_millis(20)).await;
        }
        server.resume().expect("it runs");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_follow_each_other_and_are_seen() {
    for server in servers().await {
        let name = server.name().to_owned();
        assert_eq!(run(&server, &["leader", "db"]).await, (1, String::new()), "{name}");
        let lead = |value| ["lead", "db", "--value", value, "--", "sh", "-c", "echo $QUORATE_TOKEN; exec sleep 60"];
        let mut first = Running::start(&server, &lead("10.0.0.1"));
        let term = first.line().await;
        let mut second = Running::start(&server, &lead("10.0.0.2"));
        let (status, text) = run(&server, &["leader", "db"]).await;
        assert!(status == 0 && text.starts_with(&format!("{term}\t10.0.0.1\t")), "{name}: {text}");
        first.signal("-INT").await;
        assert_eq!(first.status().await, 128 + 2, "{name}");
        let later = second.line().await;
        assert!(later.parse::<u64>().expect("a term") > term.parse().expect("a term"), "{name}");
        second.signal("-TERM").await;
        assert_eq!(second.status().await, 128 + 15, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_instances_and_doubts_are_told_a_line_each() {
    for server in servers().await {
        let name = server.name().to_owned();
        let mut watch = Running::start(&server, &["watch", "conf/"]);
        assert_eq!(watch.line().await, "reset\t0", "{name}");
        assert_eq!(run(&server, &["put", "conf/a", "1"]).await.0, 0, "{name}");
        assert!(watch.line().await.starts_with("put\tconf/a\t"), "{name}");
        assert_eq!(run(&server, &["get", "conf/a"]).await, (0, "1".to_owned()), "{name}");
        assert_eq!(run(&server, &["list", "conf/"]).await, (0, "conf/a\t1".to_owned()), "{name}");
        let (status, text) = run(&server, &["--json", "get", "conf/a"]).await;
        assert!(status == 0 && text.contains(r#""value":"1""#), "{name}: {text}");
        assert_eq!(run(&server, &["delete", "conf/a"]).await.0, 0, "{name}");
        assert_eq!(run(&server, &["delete", "conf/a"]).await.0, 1, "{name}: it is not there any more");
        assert_eq!(run(&server, &["get", "conf/a"]).await, (1, String::new()), "{name}");
        watch.signal("-INT").await;
        assert_eq!(watch.status().await, 128 + 2, "{name}");

        let words = ["register", "orders", "10.0.0.7:80", "--tag", "v2", "--", "sh", "-c", "echo in; exec sleep 60"];
        let mut instance = Running::start(&server, &words);
        assert_eq!(instance.line().await, "in", "{name}");
        let (status, text) = run(&server, &["instances", "orders"]).await;
        assert_eq!((status, text.as_str()), (0, "10.0.0.7:80\t10.0.0.7:80\tpassing\t1\t-\tv2"), "{name}");
        instance.signal("-TERM").await;
        assert_eq!(instance.status().await, 128 + 15, "{name}");
        assert_eq!(run(&server, &["instances", "orders"]).await.0, 1, "{name}: it has said good-bye");

        assert_eq!(run(&server, &["in-doubt", "payments"]).await, (1, String::new()), "{name}");
        let unknown = "00000000000000000000000000000001";
        assert_eq!(run(&server, &["resolve", "payments", unknown, "abort"]).await.0, 64, "{name}: it is over");
        let (status, text) = run(&server, &["clock"]).await;
        assert!(status == 0 && text.contains("within"), "{name}: {text}");
    }
}

#[tokio::test]
async fn what_is_wrong_is_told_without_the_url() {
    let mut nobody = Command::new(env!("CARGO_BIN_EXE_quorate"));
    nobody.args(["--url", "redis://app:hunter2@127.0.0.1:1/cli?connect_timeout=200ms", "get", "a"]);
    let output = ended(nobody).await;
    assert_eq!(output.status.code(), Some(69));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("127.0.0.1:1") && !told.contains("hunter2"), "{told}");

    let mut usage = Command::new(env!("CARGO_BIN_EXE_quorate"));
    usage.env("QUORATE_URL", "redis://app:hunter2@h/cli").args(["lock", "a"]);
    let output = ended(usage).await;
    assert_eq!(output.status.code(), Some(64), "a lock without a command");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("hunter2"));
}
