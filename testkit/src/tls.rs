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
    KeyUsagePurpose, date_time_ymd,
};
use tempfile::TempDir;

/// What certificates are made, and what a server started with them asks for.
#[derive(Debug, Clone)]
pub struct TlsOptions {
    /// The names and addresses that the server's certificate is for.
    pub server_names: Vec<String>,
    /// The server's certificate ended in 2020.
    pub server_expired: bool,
    /// The client's certificate ended in 2020.
    pub client_expired: bool,
    /// The server takes only clients that show a certificate of the authority.
    pub asks_clients: bool,
}

impl Default for TlsOptions {
    /// For 127.0.0.1 and localhost, valid, and clients have to show theirs.
    fn default() -> Self {
        let server_names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        Self { server_names, server_expired: false, client_expired: false, asks_clients: true }
    }
}

/// PEM files: one authority, one server certificate, one client certificate.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    dir: Arc<TempDir>,
    asks_clients: bool,
}

impl TlsFiles {
    /// Makes a new authority and its two certificates. A server started with them accepts only clients that show
    /// the client certificate.
    ///
    /// # Errors
    ///
    /// When a key cannot be made, or the temporary directory cannot be written.
    pub fn generate() -> io::Result<Self> {
        Self::generate_with(&TlsOptions::default())
    }

    /// Makes a new authority and two certificates as the options say.
    ///
    /// # Errors
    ///
    /// As [`TlsFiles::generate`].
    pub fn generate_with(options: &TlsOptions) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("quorate-testkit-tls-").tempdir()?;
        let files = Self { dir: Arc::new(dir), asks_clients: options.asks_clients };
        // A name of its own: authorities of one name are told apart by their signatures only.
        let mut params = params(&format!("quorate testkit CA {:08x}", rand::random::<u32>()), Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let ca = CertifiedIssuer::self_signed(params, key).map_err(io::Error::other)?;
        fs::write(files.ca(), ca.pem())?;

        // A server certificate is a client certificate too: etcd's own gateway dials its listener with it.
        let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let mut server = params_for("localhost", options.server_names.clone(), &both)?;
        let mut client = params_for("quorate-client", Vec::new(), &[ExtendedKeyUsagePurpose::ClientAuth])?;
        for (params, expired) in [(&mut server, options.server_expired), (&mut client, options.client_expired)] {
            if expired {
                params.not_before = date_time_ymd(2019, 1, 1);
                params.not_after = date_time_ymd(2020, 1, 1);
            }
        }
        files.issue(&ca, "server", &server)?;
        files.issue(&ca, "client", &client)?;
        Ok(files)
    }

    /// Whether a server started with these files takes only clients that show a certificate.
    pub fn asks_clients(&self) -> bool {
        self.asks_clients
    }

    /// The same files in another place, to be replaced without the server's being touched.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or written.
    pub fn copy(&self) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("quorate-testkit-tls-").tempdir()?;
        for file in fs::read_dir(self.dir.path())? {
            let file = file?;
            fs::copy(file.path(), dir.path().join(file.file_name()))?;
        }
        Ok(Self { dir: Arc::new(dir), asks_clients: self.asks_clients })
    }

    /// Puts the client's certificate and key of other files in the place of these, as whoever renews certificates does.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn replace_client_by(&self, other: &Self) -> io::Result<()> {
        for (from, to) in [(other.client_key(), self.client_key()), (other.client_cert(), self.client_cert())] {
            // By renaming: nobody reads half a file.
            let new = to.with_extension("new");
            fs::copy(from, &new)?;
            fs::rename(new, to)?;
        }
        Ok(())
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
