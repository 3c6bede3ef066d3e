//! How a service is called.

use std::{fmt, sync::Arc, time::Duration};

use quorate_core::{Error, Result, balance::Balancer, discovery::Instance};
use tonic::{
    metadata::MetadataMap,
    transport::{self, Endpoint},
};

use crate::{BACKEND, DEFAULT_MAX_BODY};

/// How long a connection may take to be made, unless the endpoint says otherwise.
const CONNECT: Duration = Duration::from_secs(3);

type MakeEndpoint = dyn Fn(&Instance) -> Result<Endpoint, transport::Error> + Send + Sync;
type Fill = dyn Fn(&mut MetadataMap) + Send + Sync;

/// How a [`GrpcParticipant`](crate::GrpcParticipant) calls.
#[derive(Clone)]
#[non_exhaustive]
pub struct GrpcOptions {
    /// How long a call may take, with every instance that is tried; the server is told, too (`grpc-timeout`). 10 seconds
    /// by default, a day at most. The limit of the transaction counts beside it.
    pub timeout: Duration,
    /// The largest body of a branch, in bytes; 4 MiB by default. The server has a limit of its own, and the coordinator's
    /// store, where the transaction is written down, usually a lower one.
    pub max_body: usize,
    pub(crate) balancer: Option<Balancer>,
    make: Arc<MakeEndpoint>,
    fill: Option<Arc<Fill>>,
}

impl Default for GrpcOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            max_body: DEFAULT_MAX_BODY,
            balancer: None,
            make: Arc::new(|instance| endpoint(&format!("http://{}", instance.endpoint()))),
            fill: None,
        }
    }
}

impl GrpcOptions {
    /// Sets [`timeout`](Self::timeout).
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// Sets [`max_body`](Self::max_body).
    #[must_use]
    pub fn max_body(mut self, bytes: usize) -> Self {
        self.max_body = bytes;
        self
    }

    /// Picks instances with this balancer, which prefers a zone for example. It is told the instances of the service, and
    /// must not be used for another. Without it: [`Strategy::peak_ewma`](quorate_core::balance::Strategy::peak_ewma), and
    /// instances whose calls fail are ejected for a while.
    #[must_use]
    pub fn balancer(mut self, balancer: Balancer) -> Self {
        self.balancer = Some(balancer);
        self
    }

    /// Says how an instance is connected to: for TLS, time limits, a port that stands in the metadata. The default is
    /// `http://` and the address, with three seconds to connect. TLS needs the feature `tls-aws-lc` of the crate `tonic`
    /// (0.14) in the application's own manifest; `tls-ring` beside another backend with TLS is two providers in one process.
    ///
    /// ```
    /// # use quorate_grpc::GrpcOptions;
    /// use tonic::transport::{ClientTlsConfig, Endpoint};
    /// # let pem = "";
    /// let tls = ClientTlsConfig::new().ca_certificate(tonic::transport::Certificate::from_pem(pem)).domain_name("ledger");
    /// let options = GrpcOptions::default().endpoint(move |instance| {
    ///     Endpoint::from_shared(format!("https://{}", instance.endpoint()))?.tls_config(tls.clone())
    /// });
    /// ```
    #[must_use]
    pub fn endpoint(
        mut self,
        make: impl Fn(&Instance) -> Result<Endpoint, transport::Error> + Send + Sync + 'static,
    ) -> Self {
        self.make = Arc::new(make);
        self
    }

    /// Adds metadata to every call: a token, for example. It is asked each time, and its values are never logged.
    #[must_use]
    pub fn metadata(mut self, fill: impl Fn(&mut MetadataMap) + Send + Sync + 'static) -> Self {
        self.fill = Some(Arc::new(fill));
        self
    }

    pub(crate) fn check(&self, name: &str) -> Result<()> {
        if self.timeout.is_zero() {
            return Err(Error::invalid("connect", "the time limit of calls is zero").key(name).on(BACKEND));
        }
        Ok(())
    }

    pub(crate) fn make(&self, instance: &Instance) -> Result<Endpoint, transport::Error> {
        (self.make)(instance)
    }

    pub(crate) fn fill(&self, metadata: &mut MetadataMap) {
        if let Some(fill) = &self.fill {
            fill(metadata);
        }
    }
}

impl fmt::Debug for GrpcOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrpcOptions")
            .field("timeout", &self.timeout)
            .field("max_body", &self.max_body)
            .field("balancer", &self.balancer)
            .finish_non_exhaustive()
    }
}

/// An endpoint as it is without anybody's word.
pub(crate) fn endpoint(uri: &str) -> Result<Endpoint, transport::Error> {
    Ok(Endpoint::from_shared(uri.to_owned())?.connect_timeout(CONNECT))
}
