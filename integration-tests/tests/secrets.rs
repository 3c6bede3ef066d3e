//! Everything that is written while secrets are in use, searched for them: logs of this library and of the libraries below it at the
//! most talkative level, errors, debug forms, metrics.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fmt::Write as _,
    io,
    sync::{Arc, Mutex},
};

use quorate::{Config, discovery::Instance};
use quorate_conformance::{limit, recipe_cases, run_case, waist_cases};
use quorate_integration_tests::{
    secured,
    site::{Site, SiteClients},
};
use tracing_subscriber::fmt::MakeWriter;

/// A guess that is refused is a secret, too: it may be the password of another server.
const GUESS: &str = "a-guess-that-is-wrong";
/// In the form that Consul's tokens have.
const TOKEN_GUESS: &str = "0e11f9c0-1f2b-4c7e-8a53-0c8d1f1e7b99";

#[derive(Debug, Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// The line around the first place where a secret is, with the secret blotted out.
fn leak(text: &str, secret: &str) -> Option<String> {
    let at = text.find(secret)?;
    let begin = text[..at].rfind('\n').map_or(0, |i| i + 1);
    let end = text[at..].find('\n').map_or(text.len(), |i| at + i);
    let line = text[begin..end].replace(secret, "<SECRET>");
    Some(line.chars().take(600).collect())
}

fn base64(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    // What is left over at the end looks different with what follows.
    for three in text.as_bytes().chunks_exact(3) {
        let bits = three.iter().fold(0_usize, |bits, byte| bits << 8 | usize::from(*byte));
        out.extend([18, 12, 6, 0].map(|shift| char::from(DIGITS[bits >> shift & 63])));
    }
    out
}

/// What a program does in its day, and what it prints of it.
async fn work(config: &Config, shown: &mut String) {
    let coord = quorate::connect_with(config).await.unwrap();
    let guard = coord.lock("job").acquire().await.unwrap();
    let registration = coord.register(Instance::new("orders", "h:1")).unwrap();
    registration.ready().await.unwrap();
    let service = coord.discover("orders").await.unwrap();
    writeln!(shown, "{config:?} {coord:?} {guard:?} {registration:?} {service:?}").unwrap();
    writeln!(shown, "{:?} {:?}", coord.session().await.unwrap(), coord.backend()).unwrap();
    let _ = coord.clock().sample().await;
    // What was wrong once is shown again and again.
    let taken = coord.kv().create("k", "1").await;
    let again = coord.kv().get(&"x".repeat(4000)).await;
    writeln!(shown, "{taken:?} {again:?}").unwrap();
    guard.release().await.unwrap();
    coord.close().await.unwrap();
    for wrong in [config.clone().with_login("app", GUESS), config.clone().with_token(TOKEN_GUESS)] {
        let mut wrong = wrong;
        if config.token.is_some() == wrong.user.is_some() {
            continue;
        }
        wrong.namespace = "elsewhere".to_owned();
        let refused = quorate::connect_with(&wrong).await.map(|_| ());
        writeln!(shown, "{wrong:?}: {refused:?}").unwrap();
        if let Err(error) = refused {
            writeln!(shown, "{error}").unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_is_written_holds_a_secret() {
    let output = Output::default();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false);
    // Also what is told to the crate `log`.
    subscriber.with_writer(output.clone()).init();
    let recorder = metrics_util::debugging::DebuggingRecorder::new();
    let metrics = recorder.snapshotter();
    recorder.install().unwrap();
    let mut secrets: Vec<String> =
        secured::SECRETS.iter().chain(&[GUESS, TOKEN_GUESS]).map(|s| (*s).to_owned()).collect();
    let mut shown = String::new();
    for backend in ["etcd", "redis", "consul", "zookeeper"] {
        let site = Site::start_secured(backend).await.unwrap_or_else(|e| panic!("{e}"));
        let config = site.config();
        secrets.extend(config.token.as_ref().map(|token| token.expose().to_string()));
        work(&config, &mut shown).await;
        for case in waist_cases().into_iter().chain(recipe_cases()).step_by(40) {
            let clients = SiteClients::new(&site);
            let limit = limit(&*clients).await.unwrap();
            // Whether it passes is asked elsewhere: this machine writes a lot just now.
            if let Err(why) = run_case(case, clients, limit).await {
                writeln!(shown, "{why}").unwrap();
            }
        }
        writeln!(shown, "{site:?} {}", site.server().log_tail()).unwrap();
    }
    for (key, ..) in metrics.snapshot().into_vec() {
        writeln!(shown, "{key:?}").unwrap();
    }
    let logged = output.text();
    for (what, word) in [("our own trace", "quorate{"), ("that of a library", "TRACE"), ("the shown", "***")] {
        assert!(logged.contains(word) || shown.contains(word), "void: {what} was not captured");
    }
    let logins = secrets.iter().map(|secret| base64(&format!("app:{secret}"))).collect::<Vec<_>>();
    for secret in secrets.iter().chain(&logins) {
        for (what, text) in [("the log", &logged), ("what was shown", &shown)] {
            if let Some(line) = leak(text, secret) {
                panic!("{what} holds a secret: {line}");
            }
        }
    }
    println!("searched {} kB of log and {} kB of what was shown", logged.len() / 1000, shown.len() / 1000);
}
