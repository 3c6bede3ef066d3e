//! Passwords, tokens, roles and certificates.

use std::{process::Stdio, sync::Arc, time::Duration};

use quorate_core::{Backend as _, Config, ErrorKind, Secret, Tls};
use quorate_etcd::Etcd;
use quorate_testkit::{
    servers::{self, Credentials, EtcdOptions, Server},
    tls::TlsFiles,
};
use tokio::{io::AsyncWriteExt as _, process::Command, time::sleep};

use super::support::{all, config, follow, join, lease, leave, put, reset, spawn_gone, value, within};

const PASSWORD: &str = "s3cret-of-root";

async fn guarded(extra: &[&str]) -> Server {
    let options = EtcdOptions {
        root: Some(Credentials::new("root", PASSWORD)),
        extra_args: extra.iter().map(|a| (*a).to_owned()).collect(),
        ..EtcdOptions::default()
    };
    servers::Etcd::start(options).await.unwrap()
}

fn as_root(server: &Server) -> Config {
    config([server.addr()]).with_login("root", PASSWORD)
}

#[tokio::test]
async fn the_right_password_opens_everything() {
    let server = guarded(&[]).await;
    let etcd = Etcd::connect(&as_root(&server)).await.unwrap();
    let lease = lease(&etcd).await;
    let place = join(&etcd, "job", &lease).await;
    etcd.renew(&lease).await.unwrap();
    let mut watch = etcd.watch(&all()).await.unwrap();
    assert_eq!(reset(&mut watch).await, 0);
    etcd.commit(&put("a", "1")).await.unwrap();
    assert!(!follow(&mut watch, &[("a", "1")]).await);
    leave(&etcd, &place.ticket).await;
}

#[tokio::test]
async fn wrong_or_missing_credentials_are_denied_and_not_shown() {
    let server = guarded(&[]).await;
    let wrong = [
        config([server.addr()]).with_login("root", "hunter2"),
        config([server.addr()]).with_login("nobody", "hunter2"),
        config([server.addr()]),
    ];
    for config in wrong {
        let error = Etcd::connect(&config).await.expect_err("the server asks for a password");
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    }
    let open = super::support::server().await;
    let error = Etcd::connect(&config([open.addr()]).with_login("root", "hunter2")).await.expect_err("no users there");
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
}

#[tokio::test]
async fn an_expired_token_is_renewed_for_calls_watches_and_waits() {
    let server = guarded(&["--auth-token-ttl=1"]).await;
    let etcd = Arc::new(Etcd::connect(&as_root(&server)).await.unwrap());
    let lease = lease(&etcd).await;
    let (first, second) = (join(&etcd, "job", &lease).await, join(&etcd, "job", &lease).await);
    let mut old = etcd.watch(&all()).await.unwrap();
    assert_eq!(reset(&mut old).await, 0);
    let waiting = spawn_gone(&etcd, &second.ticket);
    // The server forgets a token that was not used for its TTL, at the latest a second after that.
    sleep(Duration::from_millis(3500)).await;
    // No call renews the token first: the stream must see by itself that it is refused.
    let mut new = within("a watch begins", etcd.watch(&all())).await.unwrap();
    assert_eq!(reset(&mut new).await, 0);
    sleep(Duration::from_millis(3500)).await;
    etcd.commit(&put("a", "1")).await.unwrap();
    assert!(!follow(&mut old, &[("a", "1")]).await, "a running watch is not disturbed by the new token");
    assert!(!follow(&mut new, &[("a", "1")]).await);
    sleep(Duration::from_millis(3500)).await;
    let gone = spawn_gone(&etcd, &first.ticket);
    sleep(Duration::from_millis(300)).await;
    leave(&etcd, &first.ticket).await;
    within("a wait that began with an old token ends", gone).await.unwrap().unwrap();
    assert!(!waiting.is_finished(), "a wait under way is not disturbed");
    leave(&etcd, &second.ticket).await;
    within("the old wait ends", waiting).await.unwrap().unwrap();
}

async fn etcdctl(server: &Server, words: &[&str]) {
    let mut command = Command::new("etcdctl");
    let scheme = match server.tls() {
        None => "http",
        Some(files) => {
            command.arg("--cacert").arg(files.ca());
            command.arg("--cert").arg(files.client_cert()).arg("--key").arg(files.client_key());
            "https"
        }
    };
    let output = command
        .env("ETCDCTL_API", "3")
        .env("ETCDCTL_USER", format!("root:{PASSWORD}"))
        .arg(format!("--endpoints={scheme}://{}", server.addr()))
        .args(words)
        .stdin(Stdio::null())
        .output()
        .await
        .expect("etcdctl is installed with the package etcd-client");
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn a_role_for_the_namespace_is_enough_and_reaches_no_further() {
    let server = guarded(&[]).await;
    etcdctl(&server, &["role", "add", "app"]).await;
    etcdctl(&server, &["role", "grant-permission", "app", "--prefix=true", "readwrite", "app/"]).await;
    etcdctl(&server, &["user", "add", "app:app-secret"]).await;
    etcdctl(&server, &["user", "grant-role", "app", "app"]).await;
    let inside = config([server.addr()]).with_login("app", "app-secret");
    let etcd = Etcd::connect(&inside).await.unwrap();
    let lease = lease(&etcd).await;
    let place = join(&etcd, "job", &lease).await;
    etcd.commit(&put("a", "1")).await.unwrap();
    let mut watch = etcd.watch(&all()).await.unwrap();
    assert_eq!(reset(&mut watch).await, 1);
    leave(&etcd, &place.ticket).await;

    let outside = Etcd::connect(&inside.with_namespace("other").unwrap()).await.unwrap();
    let denied = [
        outside.commit(&put("a", "1")).await.map(drop),
        outside.read(&all()).await.map(drop),
        outside.watch(&all()).await.map(drop),
        outside.enqueue(&super::support::entry("job", &lease)).await.map(drop),
        outside.gone(&place.ticket).await,
    ];
    for outcome in denied {
        let error = outcome.expect_err("the role does not reach there");
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
        assert!(error.to_string().contains("readwrite on the prefix"), "the missing right is named: {error}");
    }
    // A refused watch does not take the others along.
    etcd.commit(&put("a", "2")).await.unwrap();
    assert!(!follow(&mut watch, &[("a", "2")]).await);
}

#[tokio::test]
async fn a_password_is_replaced_while_it_is_in_use() {
    let server = guarded(&[]).await;
    etcdctl(&server, &["role", "add", "app"]).await;
    etcdctl(&server, &["role", "grant-permission", "app", "--prefix=true", "readwrite", "app/"]).await;
    etcdctl(&server, &["user", "add", "app:old"]).await;
    etcdctl(&server, &["user", "grant-role", "app", "app"]).await;
    let secret = Secret::new("old");
    let etcd = Arc::new(Etcd::connect(&config([server.addr()]).with_login("app", secret.clone())).await.unwrap());
    let lease = lease(&etcd).await;
    let mut watch = etcd.watch(&all()).await.unwrap();
    assert_eq!(reset(&mut watch).await, 0);
    let (first, second) = (join(&etcd, "job", &lease).await, join(&etcd, "job", &lease).await);
    let gone = spawn_gone(&etcd, &first.ticket);

    // The new one is made known late: the old token is refused by then, and so is a login with the old password.
    etcd_passwd(&server, "app", "new").await;
    let mut refused = 0;
    while let Err(error) = etcd.commit(&put("a", "1")).await {
        refused += 1;
        assert!([ErrorKind::Denied, ErrorKind::Unavailable].contains(&error.kind()), "{error}");
        assert!(refused < 100, "never accepted again: {error}");
        if refused == 5 {
            secret.replace("new");
        }
        sleep(Duration::from_millis(20)).await;
    }
    assert!((5..10).contains(&refused), "refused {refused} times: accepted as soon as the new one is known");
    etcd.renew(&lease).await.unwrap();
    assert!(!follow(&mut watch, &[("a", "1")]).await, "a running watch goes on");
    leave(&etcd, &first.ticket).await;
    within("a wait that began before ends", gone).await.unwrap().unwrap();
    leave(&etcd, &second.ticket).await;
}

/// Over standard input: other users of the machine can read command lines.
async fn etcd_passwd(server: &Server, user: &str, password: &str) {
    let mut command = Command::new("etcdctl");
    command
        .env("ETCDCTL_API", "3")
        .env("ETCDCTL_USER", format!("root:{PASSWORD}"))
        .arg(format!("--endpoints=http://{}", server.addr()))
        .args(["user", "passwd", user, "--interactive=false"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    let mut child = command.spawn().expect("etcdctl is installed with the package etcd-client");
    let mut input = child.stdin.take().expect("piped");
    input.write_all(format!("{password}\n").as_bytes()).await.unwrap();
    drop(input);
    assert!(child.wait().await.unwrap().success());
}

async fn with_tls() -> (TlsFiles, Server) {
    let files = TlsFiles::generate().unwrap();
    let options = EtcdOptions { tls: Some(files.clone()), ..EtcdOptions::default() };
    let server = servers::Etcd::start(options).await.unwrap();
    (files, server)
}

#[tokio::test]
async fn a_client_certificate_is_a_login_of_its_own() {
    let files = TlsFiles::generate().unwrap();
    let options = EtcdOptions {
        root: Some(Credentials::new("root", PASSWORD)),
        tls: Some(files.clone()),
        ..EtcdOptions::default()
    };
    let server = servers::Etcd::start(options).await.unwrap();
    let tls = Tls { ca: Some(files.ca()), cert: Some(files.client_cert()), key: Some(files.client_key()) };
    let nobody = config([server.addr()]).with_tls(tls);
    // Known to the server as the certificate's common name, which has no role yet.
    let etcd = Etcd::connect(&nobody).await.unwrap();
    assert_eq!(etcd.commit(&put("a", "1")).await.expect_err("no role").kind(), ErrorKind::Denied);
    let root = Etcd::connect(&nobody.clone().with_login("root", PASSWORD)).await.unwrap();
    root.commit(&put("a", "1")).await.unwrap();
    etcdctl(&server, &["user", "add", "quorate-client:unused"]).await;
    etcdctl(&server, &["user", "grant-role", "quorate-client", "root"]).await;
    etcd.commit(&put("a", "2")).await.unwrap();
    let mut watch = etcd.watch(&all()).await.unwrap();
    assert_eq!(reset(&mut watch).await, 1);
}

#[tokio::test]
async fn tls_with_a_client_certificate_carries_calls_and_streams() {
    let (files, server) = with_tls().await;
    let url = format!(
        "etcds://{}/app?ca={}&cert={}&key={}",
        server.addr(),
        files.ca().display(),
        files.client_cert().display(),
        files.client_key().display()
    );
    let etcd = Etcd::connect(&Config::parse(&url).unwrap()).await.unwrap();
    let mut watch = etcd.watch(&all()).await.unwrap();
    etcd.commit(&put("a", "1")).await.unwrap();
    follow(&mut watch, &[("a", "1")]).await;
    let lease = lease(&etcd).await;
    etcd.renew(&lease).await.unwrap();
    assert_eq!(value(&etcd, "a").await.as_deref(), Some(&b"1"[..]));
    etcd.clock().await.expect("the HTTP side is asked over TLS, with the same certificate");
}

fn refused(error: &quorate_core::Error) -> bool {
    error.kind() == ErrorKind::Denied && error.to_string().contains("client")
}

#[tokio::test]
async fn tls_that_does_not_fit_is_an_error_and_never_a_panic() {
    let (files, server) = with_tls().await;
    let connect = |tls: Tls| {
        let config = config([server.addr()]).with_tls(tls);
        async move { Etcd::connect(&config).await.expect_err("this TLS does not fit") }
    };
    let (cert, key) = (Some(files.client_cert()), Some(files.client_key()));
    let no_certificate = connect(Tls { ca: Some(files.ca()), ..Tls::default() }).await;
    assert!(refused(&no_certificate), "{no_certificate}");
    let strange = TlsFiles::generate().unwrap();
    let wrong_ca = connect(Tls { ca: Some(strange.ca()), cert: cert.clone(), key: key.clone() }).await;
    assert_eq!(wrong_ca.kind(), ErrorKind::Denied, "{wrong_ca}");
    assert!(wrong_ca.to_string().contains("certificate"), "{wrong_ca}");
    let wrong_client =
        connect(Tls { ca: Some(files.ca()), cert: Some(strange.client_cert()), key: Some(strange.client_key()) }).await;
    assert!(refused(&wrong_client), "{wrong_client}");
    let system_roots = connect(Tls { ca: None, cert: cert.clone(), key: key.clone() }).await;
    assert!(matches!(system_roots.kind(), ErrorKind::Denied | ErrorKind::InvalidInput), "{system_roots}");
    let missing = connect(Tls { ca: Some("/nonexistent/ca.pem".into()), cert, key }).await;
    assert_eq!(missing.kind(), ErrorKind::InvalidInput);
    assert!(missing.to_string().contains("ca.pem"), "{missing}");
    let not_pem = connect(Tls { ca: Some(files.ca()), cert: Some(files.ca()), key: Some(files.ca()) }).await;
    assert_eq!(not_pem.kind(), ErrorKind::InvalidInput, "{not_pem}");
    let plain = Etcd::connect(&config([server.addr()])).await.expect_err("the server speaks TLS only");
    assert_eq!(plain.kind(), ErrorKind::Denied, "{plain}");
}
