//! TLS for the backends that speak HTTP by themselves: whom to trust and how to show who we are.
//!
//! Promise: the crypto provider is given by name (aws-lc), so nothing depends on a process-wide default; an error names
//! the file that is wrong, and never what is in it. [`connect`] says why a connection does not come about, for every backend.

mod explain;
mod own;

use std::{path::Path, sync::Arc};

use quorate_core::{Error, Result, Tls};
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier, client::Resumption, crypto::aws_lc_rs};
use rustls_pki_types::{CertificateDer, pem::PemObject};

pub use explain::connect;

/// The client's TLS configuration; the files are read now, blocking, and the client's certificate and key again at each
/// handshake after they were changed. `backend` is named in errors.
///
/// # Errors
/// `InvalidInput` if a file cannot be read, holds nothing fitting, or certificate and key do not belong together.
pub fn client(tls: &Tls, backend: &'static str) -> Result<ClientConfig> {
    build(tls).map_err(|error| error.on(backend))
}

/// A configuration that trusts nobody, for the connector of a client that never uses TLS.
///
/// # Errors
/// `InvalidInput` if the provider has no safe protocol version.
pub fn unused(backend: &'static str) -> Result<ClientConfig> {
    let builder = builder().map_err(|error| error.on(backend))?;
    Ok(builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

fn bad(message: impl Into<String>) -> Error {
    Error::invalid("connect", message.into())
}

fn build(tls: &Tls) -> Result<ClientConfig> {
    let builder = builder()?.with_root_certificates(roots(tls.ca.as_deref())?);
    match (&tls.cert, &tls.key) {
        (Some(cert), Some(key)) => {
            let mut config = builder.with_client_cert_resolver(Arc::new(own::OwnCertificate::read(cert, key)?));
            // A resumed session shows no certificate, and so not the renewed one.
            config.resumption = Resumption::disabled();
            Ok(config)
        }
        _ => Ok(builder.with_no_client_auth()),
    }
}

fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>> {
    ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| bad("the TLS provider has none of the safe protocol versions").because(e))
}

fn roots(ca: Option<&Path>) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(file) => {
            for certificate in certificates(file)? {
                roots
                    .add(certificate)
                    .map_err(|e| bad(format!("a CA certificate in {} is malformed", file.display())).because(e))?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                return Err(bad("the system has no CA certificates; name one with ca="));
            }
        }
    }
    Ok(roots)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let unreadable = |e| bad(format!("cannot read certificates from {}", file.display())).because(e);
    let found = CertificateDer::pem_file_iter(file)
        .map_err(unreadable)?
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(unreadable)?;
    if found.is_empty() {
        return Err(bad(format!("{} has no certificate in PEM form", file.display())));
    }
    Ok(found)
}
