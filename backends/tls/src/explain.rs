//! Why a connection does not come about, where TLS is the reason.
//!
//! Promise: client libraries drop the reason, give it a name of their own, or try again until the caller's limit. So it
//! is looked for with a handshake beside them: what is sure to fail for as long as nobody changes anything is told at
//! once, as `Denied`, with what to change. Nothing is sent but the handshake, and nothing is trusted because of it.

use std::{io, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use quorate_core::{Config, Error, ErrorKind, Result, Tls};
use rustls::{AlertDescription, CertificateError};
use rustls_pki_types::ServerName;
use tokio::{
    io::AsyncReadExt as _,
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsConnector;

/// Most connections are made by then.
const HEAD_START: Duration = Duration::from_millis(300);
/// How long a server may take to shake hands.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// With TLS 1.3 a server refuses a client's certificate only after the handshake.
const AFTERTHOUGHT: Duration = Duration::from_millis(500);

/// Waits for `connect`. If it takes long or fails, and every endpoint refuses TLS as it is set up, or asks for TLS where none is
/// set up, the answer says so.
///
/// # Errors
/// `Denied`, with what to change; otherwise what `connect` says.
///
/// # Cancel safety
/// Dropping it drops `connect`.
pub async fn connect<T>(
    config: &Config,
    backend: &'static str,
    port: u16,
    mut connect: BoxFuture<'_, Result<T>>,
) -> Result<T> {
    let denied = |why: &Reason| {
        let message = format!("{}: {}", config.endpoints.join(", "), why.what);
        Error::new(ErrorKind::Denied, "connect", message).on(backend).next(&*why.next)
    };
    let began = Instant::now();
    let mut looking = std::pin::pin!(async {
        sleep(HEAD_START).await;
        look(config, port).await
    });
    let mut found = None;
    let error = loop {
        tokio::select! {
            biased;
            outcome = &mut connect => match outcome {
                Ok(connected) => return Ok(connected),
                Err(error) => break error,
            },
            why = &mut looking, if found.is_none() => match why {
                Some(why) if why.sure => return Err(denied(&why)),
                other => found = Some(other),
            },
        }
    };
    let of_the_network = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Backend)
        || (error.kind() == ErrorKind::Denied && config.tls.is_some());
    if !of_the_network {
        return Err(error);
    }
    // The caller's limit is for all of it, and a moment more.
    let left = config.connect_timeout.saturating_sub(began.elapsed()).max(AFTERTHOUGHT);
    let why = match found {
        Some(why) => why,
        None => timeout(left, look(config, port)).await.unwrap_or_default(),
    };
    Err(match why {
        Some(why) if why.sure => denied(&why),
        Some(why) => error.next(why.next),
        None => error,
    })
}

/// What is wrong, and what to change.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reason {
    /// It stays so until somebody changes something.
    sure: bool,
    what: String,
    next: String,
}

impl Reason {
    fn sure(what: impl Into<String>, next: impl Into<String>) -> Self {
        Self { sure: true, what: what.into(), next: next.into() }
    }

    /// A server that is starting or stopping, or a proxy before one, may do the same.
    fn guess(next: impl Into<String>) -> Self {
        Self { sure: false, what: String::new(), next: next.into() }
    }
}

/// The reason of the first endpoint, if all have one.
async fn look(config: &Config, port: u16) -> Option<Reason> {
    let found = config.endpoints.iter().map(|endpoint| judge(config, endpoint, port));
    let found = futures_util::future::join_all(found).await;
    found.into_iter().collect::<Option<Vec<_>>>()?.into_iter().next()
}

/// `None` if nothing is known to be wrong.
async fn judge(config: &Config, endpoint: &str, port: u16) -> Option<Reason> {
    let ours = match config.tls.clone() {
        // Files that cannot be read are told by whoever needs them.
        Some(tls) => tokio::task::spawn_blocking(move || crate::client(&tls, "")).await.ok()?.ok()?,
        None => crate::unused("").ok()?,
    };
    let (host, port) = split(endpoint, port);
    let name = ServerName::try_from(host.to_owned()).ok()?;
    let shaken = timeout(HANDSHAKE, shake(ours, (host, port), name)).await;
    match (&config.tls, shaken) {
        (Some(tls), Ok(Err(error))) => refusal(&error, tls),
        (Some(_), Err(_)) => Some(Reason::guess("it does not answer a handshake: does it speak TLS on this port?")),
        // Trusting nobody, a handshake never succeeds; but only with TLS does it get as far as a certificate.
        (None, Ok(Err(error))) => match rustls_of(&error)? {
            rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_) => {
                let (family, rest) = config.scheme.split_once('+').unwrap_or((&config.scheme, ""));
                let plus = if rest.is_empty() { "" } else { "+" };
                Some(Reason::sure("the server speaks TLS here", format!("use the scheme {family}s{plus}{rest}://")))
            }
            _ => None,
        },
        _ => None,
    }
}

fn split(endpoint: &str, port: u16) -> (&str, u16) {
    let (host, port) = match endpoint.rsplit_once(':').filter(|(host, _)| !host.contains(':') || host.ends_with(']')) {
        Some((host, text)) => (host, text.parse().unwrap_or(port)),
        None => (endpoint, port),
    };
    (host.trim_start_matches('[').trim_end_matches(']'), port)
}

/// What became of a handshake, and of the moment after it.
async fn shake(ours: rustls::ClientConfig, at: (&str, u16), name: ServerName<'static>) -> io::Result<()> {
    let tcp = TcpStream::connect(at).await.map_err(|_| io::ErrorKind::NotConnected)?;
    let mut stream = TlsConnector::from(Arc::new(ours)).connect(name, tcp).await?;
    match timeout(AFTERTHOUGHT, stream.read(&mut [0; 16])).await {
        Ok(Ok(0)) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(Err(error)) => Err(error),
        // It speaks, or waits for us to speak.
        Ok(Ok(_)) | Err(_) => Ok(()),
    }
}

fn rustls_of(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn refusal(error: &io::Error, tls: &Tls) -> Option<Reason> {
    let Some(tls_error) = rustls_of(error) else {
        let closed = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset].contains(&error.kind());
        let wanted = if tls.cert.is_none() { ", and want no client certificate" } else { "" };
        return closed
            .then(|| Reason::guess(format!("it ends the handshake: does it speak TLS on this port{wanted}?")));
    };
    let next = match tls_error {
        rustls::Error::InvalidCertificate(why) => server_certificate(why),
        rustls::Error::AlertReceived(alert) => client_certificate(*alert, tls.cert.is_some())?,
        rustls::Error::InvalidMessage(_) => "the server does not speak TLS on this port: use the scheme without the s",
        _ => return None,
    };
    Some(Reason::sure(tls_error.to_string(), next))
}

fn server_certificate(why: &CertificateError) -> &'static str {
    use CertificateError as E;
    match why {
        E::UnknownIssuer | E::BadSignature => {
            "the server's certificate is not signed by an authority that is trusted: give the right one with ca"
        }
        E::Expired | E::ExpiredContext { .. } => "the server's certificate has expired: renew it",
        E::NotValidYet | E::NotValidYetContext { .. } => {
            "the server's certificate is not valid yet: check the clocks of both machines"
        }
        E::NotValidForName | E::NotValidForNameContext { .. } => {
            "the server's certificate is for another name: connect by one of its names, or issue it for this one"
        }
        E::Revoked => "the server's certificate was revoked: replace it",
        _ => "the server's certificate is not acceptable: replace it",
    }
}

/// Servers differ in what they call it: some say "bad certificate" to everything, also to none.
fn client_certificate(alert: AlertDescription, shown: bool) -> Option<&'static str> {
    use AlertDescription as A;
    match alert {
        A::CertificateExpired => Some("the client's certificate has expired: renew it"),
        A::CertificateRevoked => Some("the client's certificate was revoked: replace it"),
        A::CertificateRequired
        | A::BadCertificate
        | A::UnsupportedCertificate
        | A::CertificateUnknown
        | A::UnknownCA
        | A::AccessDenied
        | A::HandshakeFailure => Some(if shown {
            "the server does not accept the client's certificate: is it signed by an authority that the server trusts, and not \
             expired?"
        } else {
            "the server asks for a client certificate: give cert and key"
        }),
        A::ProtocolVersion => Some("the server speaks older versions of TLS only: TLS 1.2 is needed"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_hosts_with_or_without_a_port() {
        for (endpoint, expected) in [
            ("h", ("h", 7)),
            ("h:1", ("h", 1)),
            ("10.0.0.1:2379", ("10.0.0.1", 2379)),
            ("[::1]", ("::1", 7)),
            ("[::1]:5", ("::1", 5)),
        ] {
            assert_eq!(split(endpoint, 7), expected, "{endpoint}");
        }
    }

    #[test]
    fn an_alert_is_read_by_what_was_shown() {
        let alert =
            |shown| client_certificate(AlertDescription::BadCertificate, shown).expect("it is about certificates");
        assert!(alert(false).contains("give cert and key") && alert(true).contains("does not accept"));
        assert_eq!(client_certificate(AlertDescription::CloseNotify, true), None);
    }
}
