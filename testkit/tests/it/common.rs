//! The smallest clients that can tell whether a server keeps what it was given.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quorate_testkit::tls::TlsFiles;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

pub(crate) type Outcome = Result<(), Box<dyn std::error::Error>>;

pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Says `bytes` to a fresh connection and reads until `until` was answered, the end, or 5 s.
pub(crate) async fn say(addr: SocketAddr, bytes: &[u8], until: &str) -> std::io::Result<String> {
    exchange(TcpStream::connect(addr).await?, bytes, until).await
}

async fn exchange(mut stream: impl Stream, bytes: &[u8], until: &str) -> std::io::Result<String> {
    stream.write_all(bytes).await?;
    let mut answer = Vec::new();
    let read = async {
        loop {
            let mut chunk = [0; 4096];
            let count = stream.read(&mut chunk).await?;
            answer.extend_from_slice(&chunk[..count]);
            let text = String::from_utf8_lossy(&answer);
            if count == 0 || (!until.is_empty() && text.contains(until)) {
                return Ok(text.into_owned());
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), read).await?
}

/// The same over TLS, with the client certificate or without.
pub(crate) async fn say_tls(
    addr: SocketAddr,
    files: &TlsFiles,
    with_certificate: bool,
    bytes: &[u8],
    until: &str,
) -> std::io::Result<String> {
    let other = std::io::Error::other::<Box<dyn std::error::Error + Send + Sync>>;
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(files.ca()).map_err(|e| other(e.into()))?;
    roots.add(ca).map_err(|e| other(e.into()))?;
    let config = ClientConfig::builder().with_root_certificates(roots);
    let config = if with_certificate {
        let cert = CertificateDer::from_pem_file(files.client_cert()).map_err(|e| other(e.into()))?;
        let key = PrivateKeyDer::from_pem_file(files.client_key()).map_err(|e| other(e.into()))?;
        config.with_client_auth_cert(vec![cert], key).map_err(|e| other(e.into()))?
    } else {
        config.with_no_client_auth()
    };
    let name = ServerName::try_from("127.0.0.1").map_err(|e| other(e.into()))?;
    let stream = TcpStream::connect(addr).await?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    exchange(stream, bytes, until).await
}

pub(crate) fn http(method: &str, path: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.0\r\nHost: localhost\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())
        .into_bytes()
}
