//! A throw-away certificate authority for servers of the harness.
//!
//! The files live in a temporary directory for as long as a clone of [`TlsFiles`] lives. Everything is
//! valid for 127.0.0.1 and localhost only, and the keys are of this run only: never use them elsewhere.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use tempfile::TempDir;

/// PEM files: one authority, one server certificate, one client certificate.
///
/// A server started with them accepts only clients that show the client certificate.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    dir: Arc<TempDir>,
}

impl TlsFiles {
    /// Makes a new authority and its two certificates.
    ///
    /// # Errors
    ///
    /// When a key cannot be made, or the temporary directory cannot be written.
    pub fn generate() -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("quorate-testkit-tls-").tempdir()?;
        let files = Self { dir: Arc::new(dir) };
        let mut params = params("quorate testkit CA", Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let ca = CertifiedIssuer::self_signed(params, key).map_err(io::Error::other)?;
        fs::write(files.ca(), ca.pem())?;

        // A server certificate is a client certificate too: etcd's own gateway dials its listener with it.
        let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        files.issue(&ca, "server", &params_for("localhost", names, &both)?)?;
        let client = [ExtendedKeyUsagePurpose::ClientAuth];
        files.issue(&ca, "client", &params_for("quorate-client", Vec::new(), &client)?)?;
        Ok(files)
    }

    /// The authority's certificate, which both sides trust.
    pub fn ca(&self) -> PathBuf {
        self.path("ca.pem")
    }

    /// The server's certificate, for 127.0.0.1 and localhost.
    pub fn server_cert(&self) -> PathBuf {
        self.path("server.pem")
    }

    /// The server's private key, PKCS#8.
    pub fn server_key(&self) -> PathBuf {
        self.path("server-key.pem")
    }

    /// The client's certificate, common name `quorate-client`.
    pub fn client_cert(&self) -> PathBuf {
        self.path("client.pem")
    }

    /// The client's private key, PKCS#8.
    pub fn client_key(&self) -> PathBuf {
        self.path("client-key.pem")
    }

    /// The server's key and certificate in one file, as ZooKeeper wants its key store.
    pub fn server_key_store(&self) -> PathBuf {
        self.path("server-store.pem")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn issue(&self, ca: &CertifiedIssuer<'_, KeyPair>, name: &str, params: &CertificateParams) -> io::Result<()> {
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let cert = params.signed_by(&key, ca).map_err(io::Error::other)?;
        let (key, cert) = (key.serialize_pem(), cert.pem());
        write_secret(&self.path(&format!("{name}-key.pem")), &key)?;
        write_secret(&self.path(&format!("{name}-store.pem")), &(key + &cert))?;
        fs::write(self.path(&format!("{name}.pem")), cert)
    }
}

fn params(common_name: &str, names: Vec<String>) -> io::Result<CertificateParams> {
    let mut params = CertificateParams::new(names).map_err(io::Error::other)?;
    params.distinguished_name.push(DnType::CommonName, common_name);
    Ok(params)
}

fn params_for(
    common_name: &str,
    names: Vec<String>,
    usages: &[ExtendedKeyUsagePurpose],
) -> io::Result<CertificateParams> {
    let mut params = params(common_name, names)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = usages.to_vec();
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?.write_all(text.as_bytes())
}
