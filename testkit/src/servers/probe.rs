//! Whether a server truly answers, asked in its own protocol over its plain-text side door.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};

use super::port::loopback;
use super::{Credentials, Secret};

/// One question must be answered within this; the caller asks again until its own deadline.
const ASK: Duration = Duration::from_secs(2);

/// How to see that a server is ready, and whether it leads.
#[derive(Debug, Clone)]
pub(crate) enum Probe {
    Etcd { metrics: u16 },
    Redis(RedisProbe),
    Consul { http: u16, token: Option<Secret>, node: String },
    ZooKeeper { client: u16 },
    Postgres { client: u16 },
}

#[derive(Debug, Clone)]
pub(crate) struct RedisProbe {
    pub(crate) door: Door,
    pub(crate) login: Option<Credentials>,
    /// In a Redis Cluster a node is ready when it sees all slots served.
    pub(crate) in_cluster: bool,
}

#[derive(Debug, Clone)]
pub(crate) enum Door {
    Tcp(u16),
    Unix(PathBuf),
}

impl Probe {
    /// `Ok` when ready; otherwise what was seen instead.
    pub(crate) async fn ready(&self) -> Result<(), String> {
        let asked = async {
            match self {
                Self::Etcd { metrics } => etcd_ready(*metrics).await,
                Self::Redis(probe) => probe.ready().await,
                Self::Consul { http, token, node } => consul_ready(*http, token.as_ref(), node).await,
                Self::ZooKeeper { client } => zookeeper_mode(*client).await.map(|_| ()),
                Self::Postgres { client } => postgres_ready(*client).await,
            }
        };
        match tokio::time::timeout(ASK, asked).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", ASK.as_secs())),
        }
    }

    /// Whether this server leads its cluster, or is alone. Asks the server itself.
    pub(crate) async fn leads(&self) -> io::Result<bool> {
        let asked = async {
            match self {
                Self::Etcd { metrics } => {
                    let answer = http(*metrics, "GET", "/metrics", None, "").await?;
                    Ok(answer.body.lines().any(|line| line == "etcd_server_is_leader 1"))
                }
                Self::Redis(probe) => Ok(probe.ask(&["INFO", "replication"]).await?.contains("role:master")),
                Self::Consul { http: port, token, .. } => {
                    let answer = http(*port, "GET", "/v1/agent/self", token.as_ref(), "").await?;
                    let json: serde_json::Value = serde_json::from_str(&answer.body)?;
                    Ok(json["Stats"]["consul"]["leader"] == "true")
                }
                Self::ZooKeeper { client } => {
                    let mode = zookeeper_mode(*client).await?;
                    Ok(mode == "leader" || mode == "standalone")
                }
                Self::Postgres { client } => postgres_ready(*client).await.map(|()| true),
            }
        };
        tokio::time::timeout(ASK, asked).await?
    }
}

async fn etcd_ready(metrics: u16) -> io::Result<()> {
    let answer = http(metrics, "GET", "/health", None, "").await?;
    if answer.body.contains("\"health\":\"true\"") { Ok(()) } else { Err(unexpected("/health", &answer)) }
}

/// A leader alone is not enough: writes fail until it has caught up, and sessions until the agent has
/// registered itself with a passing serfHealth.
async fn consul_ready(port: u16, token: Option<&Secret>, node: &str) -> io::Result<()> {
    let leader = http(port, "GET", "/v1/status/leader", token, "").await?;
    if leader.status != 200 || !leader.body.contains(':') {
        return Err(unexpected("/v1/status/leader", &leader));
    }
    let key = format!("/v1/kv/quorate-testkit/ready-{node}");
    let put = http(port, "PUT", &key, token, "x").await?;
    if put.status != 200 || put.body.trim() != "true" {
        return Err(unexpected("PUT of a key", &put));
    }
    let path = format!("/v1/health/node/{node}");
    let health = http(port, "GET", &path, token, "").await?;
    let checks: serde_json::Value = serde_json::from_str(&health.body).unwrap_or_default();
    let alive = checks.as_array().is_some_and(|checks| {
        checks.iter().any(|check| check["CheckID"] == "serfHealth" && check["Status"] == "passing")
    });
    if !alive {
        return Err(unexpected(&path, &health));
    }
    let delete = http(port, "DELETE", &key, token, "").await?;
    if delete.status == 200 { Ok(()) } else { Err(unexpected("DELETE of a key", &delete)) }
}

/// It answers a start-up message with a question for who it is, or with an error while it recovers.
async fn postgres_ready(port: u16) -> io::Result<()> {
    let mut stream = TcpStream::connect(loopback(port)).await?;
    let mut message = 196_608_u32.to_be_bytes().to_vec();
    message.extend_from_slice(b"user\0quorate\0database\0postgres\0\0");
    let length = u32::try_from(message.len() + 4).expect("a few dozen bytes");
    stream.write_all(&[&length.to_be_bytes()[..], &message].concat()).await?;
    match stream.read_u8().await? {
        b'R' => Ok(()),
        other => Err(io::Error::other(format!("answered {:?} to a start-up message", char::from(other)))),
    }
}

async fn zookeeper_mode(port: u16) -> io::Result<String> {
    let mut stream = TcpStream::connect(loopback(port)).await?;
    stream.write_all(b"srvr").await?;
    let mut answer = String::new();
    stream.take(64 << 10).read_to_string(&mut answer).await?;
    answer
        .lines()
        .find_map(|line| line.strip_prefix("Mode: "))
        .map(str::to_owned)
        .ok_or_else(|| io::Error::other(format!("srvr answered {:?}", shortened(&answer))))
}

impl RedisProbe {
    async fn ready(&self) -> io::Result<()> {
        let pong = self.ask(&["PING"]).await?;
        if pong != "PONG" {
            return Err(io::Error::other(format!("PING answered {pong:?}")));
        }
        if self.in_cluster {
            let info = self.ask(&["CLUSTER", "INFO"]).await?;
            if !info.contains("cluster_state:ok") {
                return Err(io::Error::other("CLUSTER INFO lacks cluster_state:ok"));
            }
        }
        Ok(())
    }

    /// Sends one command. Arrays of the answer are joined by spaces.
    pub(crate) async fn ask(&self, command: &[&str]) -> io::Result<String> {
        match &self.door {
            Door::Tcp(port) => {
                let stream = TcpStream::connect(loopback(*port)).await?;
                self.ask_over(stream, command).await
            }
            Door::Unix(path) => {
                let stream = UnixStream::connect(path).await?;
                self.ask_over(stream, command).await
            }
        }
    }

    async fn ask_over<S>(&self, stream: S, command: &[&str]) -> io::Result<String>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut stream = BufReader::new(stream);
        if let Some(login) = &self.login {
            let auth = ["AUTH", login.user.as_str(), login.password.expose()];
            stream.write_all(&resp_command(&auth)).await?;
            read_resp(&mut stream).await?;
        }
        stream.write_all(&resp_command(command)).await?;
        read_resp(&mut stream).await
    }
}

fn resp_command(words: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len());
    for word in words {
        bytes.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    bytes.into_bytes()
}

async fn read_resp<S: AsyncRead + Unpin>(stream: &mut BufReader<S>) -> io::Result<String> {
    use tokio::io::AsyncBufReadExt;

    let mut parts: Vec<String> = Vec::new();
    let mut left = 1_usize;
    while left > 0 {
        left -= 1;
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        let (mark, rest) = line.split_at(line.len().min(1));
        match mark {
            "-" => return Err(io::Error::other(rest.to_owned())),
            "*" => left += rest.parse::<usize>().unwrap_or(0),
            "$" => {
                if let Ok(length) = rest.parse::<usize>() {
                    let mut bytes = vec![0; length + 2];
                    stream.read_exact(&mut bytes).await?;
                    parts.push(String::from_utf8_lossy(&bytes[..length]).into_owned());
                }
            }
            _ => parts.push(rest.to_owned()),
        }
    }
    Ok(parts.join(" "))
}

struct Answer {
    status: u16,
    body: String,
}

/// One HTTP/1.0 exchange, so that the answer ends with the connection and needs no parser.
async fn http(port: u16, method: &str, path: &str, token: Option<&Secret>, body: &str) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(loopback(port)).await?;
    let token = token.map_or_else(String::new, |token| format!("X-Consul-Token: {}\r\n", token.expose()));
    let request =
        format!("{method} {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n{token}Content-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).await?;
    let mut bytes = Vec::new();
    stream.take(16 << 20).read_to_end(&mut bytes).await?;
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
    let status = head
        .split_whitespace()
        .nth(1)
        .and_then(|status| status.parse().ok())
        .ok_or_else(|| io::Error::other("the answer is not HTTP"))?;
    Ok(Answer { status, body: body.to_owned() })
}

fn unexpected(what: &str, answer: &Answer) -> io::Error {
    io::Error::other(format!("{what} answered {} {:?}", answer.status, shortened(&answer.body)))
}

fn shortened(text: &str) -> String {
    text.trim().chars().take(200).collect()
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Etcd { .. } => "/health says true",
            Self::Redis(_) => "PING answers PONG",
            Self::Consul { .. } => "there is a leader, a key can be written and serfHealth is passing",
            Self::ZooKeeper { .. } => "srvr names a mode",
            Self::Postgres { .. } => "it lets its superuser in",
        })
    }
}
