//! The client's certificate, as it is in its files now.
//!
//! Promise: a renewed certificate is shown at the first handshake after its files were replaced; while they cannot be read, or do not
//! fit, the one before is shown.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use quorate_core::Result;
use rustls::{SignatureScheme, client::ResolvesClientCert, crypto::aws_lc_rs, sign::CertifiedKey};
use rustls_pki_types::{PrivateKeyDer, pem::PemObject};

use crate::{bad, certificates};

#[derive(Debug)]
pub(crate) struct OwnCertificate {
    cert: PathBuf,
    key: PathBuf,
    shown: Mutex<Shown>,
}

#[derive(Debug, Clone)]
struct Shown {
    certified: Arc<CertifiedKey>,
    /// When the files were last changed, as far as is known.
    changed: [Option<SystemTime>; 2],
}

impl OwnCertificate {
    /// Reads the files.
    pub(crate) fn read(cert: &Path, key: &Path) -> Result<Self> {
        let shown = Mutex::new(load(cert, key)?);
        Ok(Self { cert: cert.to_owned(), key: key.to_owned(), shown })
    }
}

fn changed(file: &Path) -> Option<SystemTime> {
    std::fs::metadata(file).and_then(|found| found.modified()).ok()
}

fn load(cert: &Path, key: &Path) -> Result<Shown> {
    // Before they are read: what is changed meanwhile is read again.
    let changed = [changed(cert), changed(key)];
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|e| bad(format!("cannot read a private key from {}", key.display())).because(e))?;
    let certified = CertifiedKey::from_der(certificates(cert)?, key, &aws_lc_rs::default_provider())
        .map_err(|e| bad("the client's certificate and key do not fit").because(e))?;
    Ok(Shown { certified: Arc::new(certified), changed })
}

impl ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        // Two looks at files of a few kilobytes, once for each connection.
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let now = [changed(&self.cert), changed(&self.key)];
        if now != shown.changed {
            match load(&self.cert, &self.key) {
                Ok(renewed) => *shown = renewed,
                // Perhaps only one of the two was replaced so far.
                Err(error) => tracing::warn!(%error, "the client's certificate was changed and is not usable"),
            }
        }
        let usable = shown.certified.key.choose_scheme(schemes).is_some();
        usable.then(|| shown.certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
