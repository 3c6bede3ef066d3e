//! A pool that brings TLS.

use std::sync::Arc;

use quorate_core::commit::{Branch, Finish, Participant, Vote};
use quorate_postgres::{
    Postgres, Work, async_trait,
    deadpool_postgres::{Manager, Pool},
    tokio_postgres,
};
use quorate_testkit::{
    servers::{Postgres as Launcher, PostgresOptions},
    tls::TlsFiles,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use tokio_postgres::Client;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::support::{branch, url};

/// Votes as the server sees its connection.
#[derive(Debug)]
struct Encrypted;

#[async_trait]
impl Work for Encrypted {
    async fn run(&self, db: &Client, _: &Branch) -> Result<Vote, tokio_postgres::Error> {
        let row = db.query_one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &[]).await?;
        Ok(if row.get(0) { Vote::Yes } else { Vote::No("in the open".to_owned()) })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_with_tls_is_a_participant_and_a_foreign_certificate_is_refused() {
    let files = TlsFiles::generate().expect("certificates");
    let foreign = TlsFiles::generate().expect("certificates");
    let options = PostgresOptions { tls: Some(files.clone()), ..PostgresOptions::default() };
    let server = Launcher::start(options).await.expect("PostgreSQL starts");
    let ledger = |trusted: &TlsFiles| {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(trusted.ca()).expect("a certificate")).expect("a good one");
        let tls = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let config = format!("{}?sslmode=require", url(&server)).parse().expect("a URL");
        let pool = Pool::builder(Manager::new(config, MakeRustlsConnect::new(tls))).max_size(2).build();
        Postgres::new("ledger", pool.expect("a pool"), Arc::new(Encrypted))
    };
    let error = ledger(&foreign).install().await.expect_err("not its authority").to_string();
    assert!(error.contains("TLS"), "{error}");
    let ledger = ledger(&files);
    ledger.install().await.expect("the table is there");
    let branch = branch("");
    assert_eq!(ledger.prepare(&branch).await.expect("a vote"), Vote::Yes);
    assert_eq!(ledger.commit(&branch).await.expect("confirmed"), Finish::Done);
    let plain = Postgres::connect("ledger", &url(&server), Arc::new(Encrypted)).expect("a URL");
    let vote = plain.prepare(&crate::support::branch("")).await.expect("a vote");
    assert_eq!(vote, Vote::No("in the open".to_owned()), "the server told them apart");
}
