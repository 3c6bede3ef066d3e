//! Single servers: they start, keep or lose data as told, and die with their starter.

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{Outcome, http, say, say_tls};
use quorate_testkit::servers::{
    Consul, ConsulOptions, Credentials, Error as ServerError, Etcd, EtcdOptions, Persistence, Postgres,
    PostgresOptions, Redis, RedisOptions, Secret, Server, ZooKeeper, ZooKeeperOptions,
};
use quorate_testkit::tls::TlsFiles;

const TOKEN: &str = "11111111-2222-3333-4444-555555555555";

/// etcd speaks JSON beside gRPC: `a2V5` is "key", `dmFsdWU=` is "value".
const ETCD_PUT: (&str, &str) = ("/v3/kv/put", r#"{"key":"a2V5","value":"dmFsdWU="}"#);
const ETCD_GET: (&str, &str) = ("/v3/kv/range", r#"{"key":"a2V5"}"#);

async fn etcd(addr: SocketAddr, (path, body): (&str, &str)) -> std::io::Result<String> {
    say(addr, &http("POST", path, "", body), "").await
}

#[tokio::test]
async fn etcd_keeps_data_over_restart_and_loses_it_when_wiped() -> Outcome {
    let server = Etcd::start(EtcdOptions::default()).await?;
    assert_eq!(server.url(), format!("etcd://{}", server.addr()));
    assert!(server.is_leader().await?);
    etcd(server.addr(), ETCD_PUT).await?;
    for _ in 0..2 {
        server.kill().await?;
        assert!(say(server.addr(), b"", "").await.is_err(), "it is down");
        server.restart().await?;
        let answer = etcd(server.addr(), ETCD_GET).await?;
        assert!(answer.contains("dmFsdWU="), "{answer}");
    }
    server.restart_wiped().await?;
    let answer = etcd(server.addr(), ETCD_GET).await?;
    assert!(answer.contains("revision\":\"1\"") && !answer.contains("dmFsdWU="));
    Ok(())
}

#[tokio::test]
async fn paused_server_answers_only_after_resume_and_can_be_stopped_while_paused() -> Outcome {
    let server = Redis::start(RedisOptions::default()).await?;
    server.pause()?;
    let (addr, soon) = (server.addr(), Duration::from_millis(300));
    let silent = tokio::time::timeout(soon, say(addr, b"PING\r\n", "PONG")).await;
    assert!(silent.is_err(), "a paused server answered: {silent:?}");
    server.resume()?;
    assert!(say(addr, b"PING\r\n", "PONG").await?.contains("PONG"));
    server.pause()?;
    server.stop().await?;
    assert_eq!(server.pid(), None);
    assert!(matches!(server.pause(), Err(ServerError::NotRunning { .. })));
    Ok(())
}

#[tokio::test]
async fn redis_keeps_data_over_kill_only_with_persistence() -> Outcome {
    for (persistence, kept) in
        [(Persistence::None, false), (Persistence::EverySecond, true), (Persistence::Always, true)]
    {
        let options = RedisOptions { persistence, ..RedisOptions::default() };
        let server = Redis::start(options).await?;
        say(server.addr(), b"SET key value\r\n", "OK").await?;
        server.kill().await?;
        server.restart().await?;
        let answer = say(server.addr(), b"GET key\r\n", "\r\n").await?;
        assert_eq!(answer.starts_with("$5"), kept, "{persistence:?}: {answer}");
        server.restart_wiped().await?;
        let answer = say(server.addr(), b"GET key\r\n", "\r\n").await?;
        assert!(answer.starts_with("$-1"), "{persistence:?}: {answer}");
    }
    Ok(())
}

#[tokio::test]
async fn redis_has_no_notifications_unless_asked() -> Outcome {
    let server = Redis::start(RedisOptions::default()).await?;
    let question = b"CONFIG GET notify-keyspace-events\r\n";
    let answer = say(server.addr(), question, "$0\r\n").await?;
    assert!(answer.ends_with("$0\r\n\r\n") || answer.ends_with("$0\r\n"));
    Ok(())
}

#[tokio::test]
async fn redis_refuses_clients_without_the_password() -> Outcome {
    for user in ["default", "alice"] {
        let options = RedisOptions { login: Some(Credentials::new(user, "hush")), ..RedisOptions::default() };
        assert!(!format!("{options:?}").contains("hush"));
        let server = Redis::start(options).await?;
        let answer = say(server.addr(), b"PING\r\n", "\r\n").await?;
        assert!(answer.starts_with("-NOAUTH"), "{answer}");
        let login = format!("AUTH {user} hush\r\nPING\r\n");
        let answer = say(server.addr(), login.as_bytes(), "PONG").await?;
        assert!(answer.contains("PONG"), "{answer}");
        server.restart().await?;
        assert!(!format!("{server:?}").contains("hush"));
    }
    Ok(())
}

/// One message of PostgreSQL's protocol, which tells its own length.
fn framed(kind: &str, body: &str) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).expect("a short message").to_be_bytes();
    [kind.as_bytes(), &length, body.as_bytes()].concat()
}

async fn postgres(addr: SocketAddr, sql: &str) -> std::io::Result<String> {
    let start = framed("", "\0\u{3}\0\0user\0quorate\0database\0postgres\0\0");
    let end = framed("X", "");
    say(addr, &[start, framed("Q", &format!("{sql}\0")), end].concat(), "").await
}

#[tokio::test]
async fn postgres_keeps_data_and_what_is_prepared_over_a_kill_and_loses_it_when_wiped() -> Outcome {
    let server = Postgres::start(PostgresOptions::default()).await?;
    assert_eq!(server.url(), format!("postgresql://{}", server.addr()));
    let answer = postgres(server.addr(), "CREATE TABLE kept AS SELECT 'value' AS it").await?;
    assert!(answer.contains("SELECT 1"), "{answer}");
    let prepare = "BEGIN; CREATE TABLE late (x int); PREPARE TRANSACTION 'half'";
    let answer = postgres(server.addr(), prepare).await?;
    assert!(answer.contains("PREPARE TRANSACTION"), "{answer}");
    for _ in 0..2 {
        server.kill().await?;
        assert!(postgres(server.addr(), "").await.is_err(), "it is down");
        server.restart().await?;
        let answer = postgres(server.addr(), "SELECT it, gid FROM kept, pg_prepared_xacts").await?;
        assert!(answer.contains("value") && answer.contains("half"), "{answer}");
    }
    server.restart_wiped().await?;
    let answer = postgres(server.addr(), "SELECT it FROM kept").await?;
    assert!(answer.contains("42P01"), "{answer}");
    Ok(())
}

#[tokio::test]
async fn postgres_is_stopped_orderly_although_a_client_is_at_work() -> Outcome {
    let server = Postgres::start(PostgresOptions::default()).await?;
    let busy = postgres(server.addr(), "SELECT pg_sleep(60)");
    let stop = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        tokio::time::timeout(Duration::from_secs(8), server.stop()).await
    };
    let (_, stopped) = tokio::join!(busy, stop);
    stopped??;
    assert_eq!(server.pid(), None);
    assert!(server.log_tail().contains("database system is shut down"), "{}", server.log_tail());
    Ok(())
}

#[tokio::test]
async fn consul_keeps_data_over_restart_and_loses_it_when_wiped() -> Outcome {
    let server = Consul::start(ConsulOptions::default()).await?;
    let get = http("GET", "/v1/kv/key?raw", "", "");
    say(server.addr(), &http("PUT", "/v1/kv/key", "", "value"), "").await?;
    server.kill().await?;
    server.restart().await?;
    assert!(say(server.addr(), &get, "").await?.ends_with("value"));
    server.restart_wiped().await?;
    assert!(say(server.addr(), &get, "").await?.contains(" 404 "));
    Ok(())
}

#[tokio::test]
async fn consul_denies_clients_without_the_token() -> Outcome {
    let options = ConsulOptions {
        token: Some(Secret::new(TOKEN)),
        session_ttl_min: Duration::from_secs(1),
        ..ConsulOptions::default()
    };
    assert!(!format!("{options:?}").contains(TOKEN));
    let server = Consul::start(options).await?;
    let session = r#"{"TTL":"1s","Node":"consul"}"#;
    let create = |headers: &str| http("PUT", "/v1/session/create", headers, session);
    let answer = say(server.addr(), &create(""), "").await?;
    assert!(answer.contains(" 403 "), "{answer}");
    let token = format!("X-Consul-Token: {TOKEN}\r\n");
    let answer = say(server.addr(), &create(&token), "").await?;
    assert!(answer.contains(" 200 "), "{answer}");
    Ok(())
}

#[tokio::test]
async fn zookeeper_keeps_data_over_restart_and_loses_it_when_wiped() -> Outcome {
    let server = ZooKeeper::start(ZooKeeperOptions::default()).await?;
    let nodes = async || -> Result<String, Box<dyn Error>> {
        let answer = say(server.addr(), b"srvr", "").await?;
        let line = answer.lines().find(|line| line.starts_with("Node count: "));
        Ok(line.ok_or("srvr has no node count")?.to_owned())
    };
    let empty = nodes().await?;
    say(server.addr(), &zookeeper_create("/key"), "").await.ok();
    let full = nodes().await?;
    assert_ne!(empty, full);
    server.kill().await?;
    server.restart().await?;
    assert_eq!(nodes().await?, full);
    server.restart_wiped().await?;
    assert_eq!(nodes().await?, empty);
    Ok(())
}

/// A new session, then the creation of a persistent node, then the end of the session.
fn zookeeper_create(path: &str) -> Vec<u8> {
    let frame = |body: Vec<u8>| {
        let mut bytes = u32::try_from(body.len()).unwrap_or_default().to_be_bytes().to_vec();
        bytes.extend(body);
        bytes
    };
    let connect = [&[0; 12][..], &4000_u32.to_be_bytes(), &[0; 8], &16_u32.to_be_bytes(), &[0; 16]].concat();
    let length = u32::try_from(path.len()).unwrap_or_default().to_be_bytes();
    let create = [
        &[0, 0, 0, 1, 0, 0, 0, 1][..], // xid 1, create
        &length,
        path.as_bytes(),
        &[0; 4],          // no data
        &[0, 0, 0, 1],    // one entry in the list of permissions
        &[0, 0, 0, 0x1f], // all of them
        &[0, 0, 0, 5],
        b"world",
        &[0, 0, 0, 6],
        b"anyone",
        &[0; 4], // persistent
    ]
    .concat();
    let close = vec![0, 0, 0, 2, 0xff, 0xff, 0xff, 0xf5]; // xid 2, operation -11
    [frame(connect), frame(create), frame(close)].concat()
}

#[tokio::test]
async fn etcd_refuses_clients_without_the_password_also_after_wipe() -> Outcome {
    let options = EtcdOptions { root: Some(Credentials::new("root", "hush")), ..EtcdOptions::default() };
    let server = Etcd::start(options).await?;
    let login = ("/v3/auth/authenticate", r#"{"name":"root","password":"hush"}"#);
    for wiped in [false, true] {
        let answer = etcd(server.addr(), ETCD_PUT).await?;
        assert!(answer.contains("user name is empty"), "{wiped}: {answer}");
        let answer = etcd(server.addr(), login).await?;
        assert!(answer.contains("\"token\""), "{wiped}: {answer}");
        server.restart().await?;
        if !wiped {
            server.restart_wiped().await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn tls_servers_answer_only_clients_with_the_certificate() -> Outcome {
    let tls = TlsFiles::generate()?;
    let some = Some(tls.clone());
    let etcd = Etcd::start(EtcdOptions {
        tls: some.clone(),
        root: Some(Credentials::new("root", "hush")),
        ..EtcdOptions::default()
    });
    let redis = Redis::start(RedisOptions {
        tls: some.clone(),
        login: Some(Credentials::new("default", "hush")),
        ..RedisOptions::default()
    });
    let consul =
        Consul::start(ConsulOptions { tls: some.clone(), token: Some(Secret::new(TOKEN)), ..ConsulOptions::default() });
    let zookeeper = ZooKeeper::start(ZooKeeperOptions { tls: some, ..ZooKeeperOptions::default() });
    let leader = http("GET", "/v1/status/leader", "", "");
    let cases: [(Server, &[u8], &str); 4] = [
        (etcd.await?, b"GET /version HTTP/1.0\r\n\r\n", "etcdserver"),
        (redis.await?, b"AUTH hush\r\nPING\r\n", "PONG"),
        (consul.await?, &leader, "127.0.0.1:"),
        (zookeeper.await?, b"srvr", "Mode: standalone"),
    ];
    for (server, question, expected) in cases {
        let addr = server.addr();
        let answer = say_tls(addr, &tls, true, question, expected).await?;
        assert!(answer.contains(expected), "{}: {answer}", server.name());
        let stranger = say_tls(addr, &tls, false, question, expected).await;
        assert!(
            !stranger.as_ref().is_ok_and(|it| it.contains(expected)),
            "{} answered a client without a certificate: {stranger:?}",
            server.name()
        );
        let plain = say(addr, question, expected).await;
        assert!(!plain.is_ok_and(|it| it.contains(expected)), "plain text");
    }
    Ok(())
}

#[tokio::test]
async fn failed_start_shows_the_end_of_the_log() -> Outcome {
    let options = RedisOptions {
        login: Some(Credentials::new("default", "hush")),
        extra_lines: vec!["no-such-setting hush".to_owned()],
        ..RedisOptions::default()
    };
    let error = Redis::start(options).await.err().ok_or("it started")?;
    let text = error.to_string();
    assert!(text.contains("exit code 1"), "{text}");
    assert!(text.contains("no-such-setting ***"), "{text}");
    Ok(())
}

#[tokio::test]
async fn missing_program_is_named() -> Outcome {
    let options = RedisOptions { program: Some(PathBuf::from("no-such-redis")), ..RedisOptions::default() };
    let error = Redis::start(options).await.err().ok_or("it started")?;
    assert!(matches!(&error, ServerError::MissingProgram { program, .. } if program == "no-such-redis"));
    Ok(())
}

#[tokio::test]
async fn restart_refuses_a_port_that_another_process_took() -> Outcome {
    let server = Redis::start(RedisOptions::default()).await?;
    server.stop().await?;
    let thief = TcpListener::bind(server.addr())?;
    let error = server.restart().await.err().ok_or("it started")?;
    assert!(matches!(error, ServerError::PortInUse { port, .. } if port == server.port()));
    drop(thief);
    server.restart().await?;
    Ok(())
}

#[test]
fn server_outlives_the_runtime_that_started_it_and_dies_with_its_handle() -> Outcome {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    let server = runtime()?.block_on(Redis::start(RedisOptions::default()))?;
    runtime()?.block_on(async { server.restart().await })?;
    let (pid, data) = (server.pid().ok_or("it is down")?, server.data_dir());
    drop(server);
    assert!(!alive(pid) && !data.exists());
    Ok(())
}

#[tokio::test]
async fn sigkill_of_the_starter_kills_the_server_and_deletes_its_data() -> Outcome {
    let mut holder = Command::new(example("holder")?).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(holder.stdout.take().ok_or("no stdout")?).read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let [pid, port, data] = words[..] else {
        return Err(format!("the example said {line:?}").into());
    };
    let (pid, addr) = (pid.parse()?, format!("127.0.0.1:{port}").parse()?);
    assert!(alive(pid) && Path::new(data).is_dir());
    assert!(etcd(addr, ETCD_GET).await?.contains("revision"));
    holder.kill()?; // SIGKILL: it cannot clear up
    holder.wait()?;
    let gone = async {
        while alive(pid) || Path::new(data).exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), gone).await?;
    assert!(say(addr, b"", "").await.is_err());
    Ok(())
}

fn alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Cargo builds the examples before it runs the tests, beside the folder of the test itself.
fn example(name: &str) -> Result<PathBuf, Box<dyn Error>> {
    let test = std::env::current_exe()?;
    let profile = test.ancestors().nth(2).ok_or("no profile folder")?;
    let path = profile.join("examples").join(name);
    path.is_file().then_some(path).ok_or_else(|| "build it with `cargo build --examples` first".into())
}
