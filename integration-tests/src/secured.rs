//! Servers as they are run where it matters: TLS on both sides, and a user who has the rights that the docs of the backend ask
//! for, on the namespace `app`, and no others.
//!
//! Promise: nothing but those rights is given, so that what works here works with them.

use std::process::Stdio;

use quorate::Config;
use quorate_testkit::{
    servers::{self, Credentials, Secret, Server},
    tls::TlsFiles,
};
use tokio::process::Command;

const PASSWORD: &str = "a-password-of-the-app";
const ROOT: &str = "a-password-of-root";
/// Consul wants a UUID.
const ROOT_TOKEN: &str = "5e11f9c0-1f2b-4c7e-8a53-0c8d1f1e7b11";

/// What must appear in no output.
pub const SECRETS: [&str; 3] = [PASSWORD, ROOT, ROOT_TOKEN];

/// Starts a server of the backend; returns it with the URL for the user.
///
/// # Errors
/// How to get the server, if it is missing, or what went wrong.
pub async fn start(backend: &str) -> Result<(Server, String), String> {
    let files = TlsFiles::generate().map_err(|e| e.to_string())?;
    match backend {
        "etcd" => etcd(files).await,
        "redis" => redis(files).await,
        "consul" => consul(files).await,
        "zookeeper" => zookeeper(files).await,
        other => Err(format!("{other} has no users")),
    }
}

fn url(server: &Server, scheme: &str, user: &str, options: &str) -> String {
    let files = server.tls().expect("started with TLS");
    let [ca, cert, key] = [files.ca(), files.client_cert(), files.client_key()].map(|file| file.display().to_string());
    format!("{scheme}://{user}{}/app?ca={ca}&cert={cert}&key={key}{options}", server.addr())
}

fn login() -> String {
    format!("app:{PASSWORD}@")
}

async fn run(mut command: Command) -> Result<String, String> {
    let shown = format!("{:?}", command.as_std().get_program());
    let output = command.stdin(Stdio::null()).output().await.map_err(|e| format!("{shown} did not start: {e}"))?;
    if !output.status.success() {
        return Err(format!("{shown}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn etcd(files: TlsFiles) -> Result<(Server, String), String> {
    let root = Some(Credentials::new("root", ROOT));
    let options = servers::EtcdOptions { tls: Some(files.clone()), root, ..Default::default() };
    let server = servers::Etcd::start(options).await.map_err(|e| e.to_string())?;
    let user = format!("app:{PASSWORD}");
    for words in [
        &["role", "add", "app"][..],
        &["role", "grant-permission", "app", "--prefix=true", "readwrite", "app/"],
        &["user", "add", &user],
        &["user", "grant-role", "app", "app"],
    ] {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").env("ETCDCTL_USER", format!("root:{ROOT}"));
        command.arg("--cacert").arg(files.ca()).arg("--cert").arg(files.client_cert());
        command.arg("--key").arg(files.client_key()).arg(format!("--endpoints=https://{}", server.addr())).args(words);
        run(command).await?;
    }
    let url = url(&server, "etcds", &login(), "");
    Ok((server, url))
}

async fn redis(files: TlsFiles) -> Result<(Server, String), String> {
    // As in the docs of the backend, for every namespace below `app`.
    let rules = "~{quorate/app* &{quorate/app* +@connection +evalsha +script|load +subscribe +unsubscribe +publish \
                 +time +hget +hmget +hset +hdel +zadd +zrem +zscore +zrangebyscore +zrangebylex +zrevrangebylex";
    let options = servers::RedisOptions {
        tls: Some(files),
        login: Some(Credentials::new("root", ROOT)),
        persistence: servers::Persistence::Always,
        extra_lines: vec![format!("user app on >{PASSWORD} resetkeys resetchannels nocommands {rules}")],
        ..Default::default()
    };
    let server = servers::Redis::start(options).await.map_err(|e| e.to_string())?;
    let url = url(&server, "rediss", &login(), "");
    Ok((server, url))
}

async fn consul(files: TlsFiles) -> Result<(Server, String), String> {
    // The services of the cases are `service_prefix ""`; reading nodes is for those who follow services.
    let rules = r#"key_prefix "app/" { policy = "write" } session_prefix "" { policy = "write" }
        service_prefix "" { policy = "write" } node_prefix "" { policy = "read" }"#;
    let options = servers::ConsulOptions {
        tls: Some(files.clone()),
        token: Some(Secret::new(ROOT_TOKEN)),
        connections: 2000,
        ..Default::default()
    };
    let server = servers::Consul::start(options).await.map_err(|e| e.to_string())?;
    let consul = |words: &[&str]| {
        let mut command = Command::new("consul");
        command.env("CONSUL_HTTP_ADDR", format!("https://{}", server.addr())).env("CONSUL_HTTP_TOKEN", ROOT_TOKEN);
        command.env("CONSUL_CACERT", files.ca()).env("CONSUL_CLIENT_CERT", files.client_cert());
        command.env("CONSUL_CLIENT_KEY", files.client_key()).args(words);
        run(command)
    };
    consul(&["acl", "policy", "create", "-name", "app", "-rules", rules]).await?;
    let token = consul(&["acl", "token", "create", "-policy-name", "app"]).await?;
    let token = token.lines().find_map(|line| line.strip_prefix("SecretID:")).ok_or("consul named no token")?;
    let url = url(&server, "consuls", "", &format!("&token={}", token.trim()));
    Ok((server, url))
}

async fn zookeeper(files: TlsFiles) -> Result<(Server, String), String> {
    let options = servers::ZooKeeperOptions { tls: Some(files.clone()), ..Default::default() };
    let server = servers::ZooKeeper::start(options).await.map_err(|e| e.to_string())?;
    let url = url(&server, "zookeepers", &login(), "");
    // The namespace becomes the user's, and then the root is closed.
    let config = Config::parse(&url).map_err(|e| e.to_string())?;
    drop(quorate::backend(&config).await.map_err(|e| e.to_string())?);
    let read = |file| std::fs::read_to_string(file).map_err(|e| e.to_string());
    let tls = zookeeper_client::TlsOptions::new().with_pem_ca(&read(files.ca())?).map_err(|e| e.to_string())?;
    let tls = tls.with_pem_identity(&read(files.client_cert())?, &read(files.client_key())?);
    let connector = zookeeper_client::Client::connector().with_tls(tls.map_err(|e| e.to_string())?);
    let admin = connector.secure_connect(&server.addr().to_string()).await.map_err(|e| e.to_string())?;
    admin.auth("digest", format!("root:{ROOT}").as_bytes()).await.map_err(|e| e.to_string())?;
    use zookeeper_client::{Acl, AuthId, Permission};
    let closed = [Acl::new(Permission::ALL, AuthId::authed()), Acl::new(Permission::READ, AuthId::anyone())];
    admin.set_acl("/", &closed, None).await.map_err(|e| e.to_string())?;
    Ok((server, url))
}
