//! The coordinator: what an application holds in its hands.
//!
//! Promise: everything made from one coordinator shares one connection and, unless said otherwise, one session,
//! opened when first needed. A lost session does not silently become a new one: what stood on it is lost and
//! says so; only later calls get a new session.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};

use crate::{
    backend::{Backend, Profile},
    clock::CoordinatorClock,
    election::Election,
    error::{Error, ErrorKind, Result},
    heartbeat::HeartbeatGroup,
    key::Dir,
    kv::Kv,
    lock::{Lock, MultiLock},
    presence::Claims,
    session::{Session, SessionOptions},
};

/// A connected coordinator. Cheap to clone; all clones share the connection and the session.
#[derive(Debug, Clone)]
pub struct Coordinator {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    backend: Arc<dyn Backend>,
    options: SessionOptions,
    session: Mutex<Option<Session>>,
    /// The attempt to open a session that is under way: all callers share its outcome, errors included.
    opening: Mutex<Option<Shared<BoxFuture<'static, Result<Session>>>>>,
    closed: std::sync::atomic::AtomicBool,
    claims: Claims,
    clock: CoordinatorClock,
}

impl Coordinator {
    /// A coordinator over a backend, usually one with [layers](crate::layer) around it.
    pub fn new(backend: Arc<dyn Backend>, options: SessionOptions) -> Self {
        let inner = Inner {
            clock: CoordinatorClock::new(backend.clone()),
            backend,
            options,
            session: Mutex::default(),
            opening: Mutex::default(),
            closed: std::sync::atomic::AtomicBool::new(false),
            claims: Claims::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// A lock by name. Any name from 1 to [`MAX_NAME`](crate::MAX_NAME) bytes; others are refused at the first use.
    pub fn lock(&self, name: &str) -> Lock {
        Lock::new(self.clone(), Dir::new(["lock", name]))
    }

    /// The lock that clients of another library keep at this path below the namespace, `/` separating its
    /// parts: for example `etcdctl lock <namespace>/<path>`, or a Curator or kazoo lock at that path.
    pub fn lock_at(&self, path: &str) -> Lock {
        Lock::new(self.clone(), Dir::from_path(path))
    }

    /// Several locks as one. Names may come in any order; each counts once.
    pub fn lock_all<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> MultiLock {
        let names: std::collections::BTreeSet<&str> = names.into_iter().collect();
        MultiLock::new(names.into_iter().map(|name| self.lock(name)).collect())
    }

    /// A group of peers that watch over each other by heartbeats. A bad name is refused at the first use.
    pub fn heartbeat(&self, group: &str) -> HeartbeatGroup {
        HeartbeatGroup::new(self.clone(), group)
    }

    /// An election by name. Any name from 1 to [`MAX_NAME`](crate::MAX_NAME) bytes; others are refused at the first use.
    pub fn election(&self, name: &str) -> Election {
        Election::new(self.clone(), name)
    }

    /// The coordinator's wall clock against ours, for people to look at.
    pub fn clock(&self) -> CoordinatorClock {
        self.inner.clock.clone()
    }

    /// Keys and values.
    pub fn kv(&self) -> Kv {
        Kv::new(self.inner.backend.clone())
    }

    /// The coordinator's own session, opened if there is none or the last one was lost.
    ///
    /// # Errors
    /// `Unavailable` after [`close`](Self::close), or what the backend's `grant` says.
    ///
    /// # Cancel safety
    /// A session that is being opened when the call is dropped is kept for the next one.
    pub async fn session(&self) -> Result<Session> {
        if let Some(session) = self.current() {
            return Ok(session);
        }
        self.opening().await
    }

    fn opening(&self) -> Shared<BoxFuture<'static, Result<Session>>> {
        let mut opening = self.inner.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(attempt) = opening.as_ref().filter(|attempt| attempt.peek().is_none()) {
            return attempt.clone();
        }
        // A task of its own, so that a caller who gives up leaves no lease that nobody knows.
        let this = self.clone();
        let task = tokio::spawn(async move {
            let outcome = this.open_shared().await;
            // The outcome keeps a handle of the session; it is for those who wait for it now.
            this.inner.opening.lock().unwrap_or_else(PoisonError::into_inner).take();
            outcome
        });
        let backend = self.profile().backend;
        let attempt = async move {
            task.await.unwrap_or_else(|stopped| {
                let message = "the task that opened the session did not end; a lease may have been granted";
                Err(Error::new(ErrorKind::Ambiguous, "grant", message).on(backend).because(stopped))
            })
        };
        let attempt = attempt.boxed().shared();
        *opening = Some(attempt.clone());
        attempt
    }

    pub(crate) fn current(&self) -> Option<Session> {
        let session = self.inner.session.lock().unwrap_or_else(PoisonError::into_inner).clone();
        session.filter(Session::is_live).filter(|_| !self.is_closed())
    }

    async fn open_shared(&self) -> Result<Session> {
        let session = self.open_session(&self.inner.options).await?;
        *self.inner.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(session.clone());
        // A close that came while the lease was being granted did not see this session.
        if self.is_closed() {
            let _ = session.close().await;
            return Err(self.error("grant", "the coordinator was closed"));
        }
        Ok(session)
    }

    /// Opens another session, with its own lease.
    ///
    /// # Errors
    /// As for [`session`](Self::session).
    ///
    /// # Cancel safety
    /// As for [`Session::open`].
    pub async fn open_session(&self, options: &SessionOptions) -> Result<Session> {
        if self.is_closed() {
            return Err(self.error("grant", "the coordinator was closed"));
        }
        Session::open(self.inner.backend.clone(), options).await
    }

    /// What the backend guarantees and where its limits are.
    pub fn profile(&self) -> &Profile {
        self.inner.backend.profile()
    }

    /// The waist, with the layers around it: for recipes of your own.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.inner.backend
    }

    /// Closes the coordinator's own session: every lock on it is given up at once. Later calls that need a
    /// session fail.
    ///
    /// # Errors
    /// If the server could not be told; it ends the lease by itself after its TTL.
    ///
    /// # Cancel safety
    /// The first poll closes; the background finishes.
    pub async fn close(&self) -> Result<()> {
        self.inner.closed.store(true, std::sync::atomic::Ordering::Release);
        let session = self.inner.session.lock().unwrap_or_else(PoisonError::into_inner).take();
        match session {
            Some(session) => session.close().await,
            None => Ok(()),
        }
    }

    pub(crate) fn claims(&self) -> &Claims {
        &self.inner.claims
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.inner.closed.load(std::sync::atomic::Ordering::Acquire)
    }

    fn error(&self, operation: &'static str, message: &str) -> Error {
        Error::new(ErrorKind::Unavailable, operation, message).on(self.profile().backend).next("connect again")
    }

    /// The TTL that the coordinator's own session asks for.
    pub fn session_ttl(&self) -> Duration {
        self.inner.options.ttl
    }
}
