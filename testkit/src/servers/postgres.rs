use std::ffi::OsString;
use std::path::Path;

use super::port::Port;
use super::probe::Probe;
use super::server::{Home, Launch};
use super::{Error, Kind, Server};
use crate::install::{in_path, postgres_programs};
use crate::tls::TlsFiles;

/// How a PostgreSQL server is set up. Its superuser is `quorate`, its database `postgres`, and it trusts whoever connects.
#[derive(Debug, Clone)]
pub struct PostgresOptions {
    /// `max_prepared_transactions`; with zero the server refuses to prepare, as it does by default.
    pub prepared: u32,
    /// Serves TLS on the client port, to those who ask for it.
    pub tls: Option<TlsFiles>,
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self { prepared: 200, tls: None }
    }
}

/// Starts PostgreSQL.
#[derive(Debug, Clone, Copy)]
pub struct Postgres;

const SCRIPT: &str = include_str!("postgres.sh");

impl Postgres {
    /// One server. Ready when it lets its superuser in.
    ///
    /// # Errors
    ///
    /// [`Error::MissingProgram`] without the server's programs; [`Error::NotReady`] with the end of its log.
    ///
    /// # Cancel safety
    ///
    /// A dropped start leaves no process behind.
    pub async fn start(options: PostgresOptions) -> Result<Server, Error> {
        let shell = in_path(Path::new("sh")).ok_or_else(|| Error::missing("sh", "every system has one"))?;
        let (home, port) = (Home::new("postgres")?, Port::reserve()?);
        let (data, client) = (home.data(), port.number());
        let mut args: Vec<OsString> = vec![
            "-c".into(),
            SCRIPT.into(),
            "postgres.sh".into(),
            postgres_programs()?.into(),
            data.into(),
            client.to_string().into(),
            options.prepared.to_string().into(),
        ];
        if let Some(tls) = &options.tls {
            args.extend([tls.server_cert().into(), tls.server_key().into()]);
        }
        let launch = Launch {
            kind: Kind::Postgres,
            name: "postgres".to_owned(),
            program: shell,
            args,
            seeds: Vec::new(),
            client,
            probe: Probe::Postgres { client },
            credentials: None,
            token: None,
            tls: options.tls,
            wipes_alone: true,
        };
        Server::new(launch, home, vec![port]).started().await
    }
}
