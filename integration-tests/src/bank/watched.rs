//! A participant that tells when it is asked what.
//!
//! Promise: it changes nothing of what the participant does.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use quorate::{
    Result,
    commit::{Branch, Decision, Finish, Participant, TxId, Vote},
};

/// What happened to a branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It voted yes: from now on it is in doubt.
    Prepared,
    /// It has confirmed the outcome.
    Ended(Decision),
}

/// Who is told.
#[derive(Clone)]
pub struct Note(Arc<Call>);

type Call = dyn Fn(&Branch, Moment) + Send + Sync;

impl Note {
    /// Calls this.
    pub fn new(note: impl Fn(&Branch, Moment) + Send + Sync + 'static) -> Self {
        Self(Arc::new(note))
    }

    /// Nobody is told.
    pub fn nobody() -> Self {
        Self::new(|_, _| {})
    }
}

impl fmt::Debug for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Note")
    }
}

/// A participant, watched.
#[derive(Debug)]
pub struct Watched {
    /// What does the work.
    pub inner: Arc<dyn Participant>,
    /// Who is told.
    pub note: Note,
}

impl Watched {
    /// A branch that ended otherwise is left in the log for everybody to see.
    fn ended(&self, branch: &Branch, finish: &Finish, decision: Decision) {
        if *finish == Finish::Done {
            (self.note.0)(branch, Moment::Ended(decision));
        }
    }
}

#[async_trait]
impl Participant for Watched {
    async fn prepare(&self, branch: &Branch) -> Result<Vote> {
        let vote = self.inner.prepare(branch).await?;
        if vote == Vote::Yes {
            (self.note.0)(branch, Moment::Prepared);
        }
        Ok(vote)
    }

    async fn commit(&self, branch: &Branch) -> Result<Finish> {
        let finish = self.inner.commit(branch).await?;
        self.ended(branch, &finish, Decision::Commit);
        Ok(finish)
    }

    async fn abort(&self, branch: &Branch) -> Result<Finish> {
        let finish = self.inner.abort(branch).await?;
        self.ended(branch, &finish, Decision::Abort);
        Ok(finish)
    }

    async fn in_doubt(&self, group: &str) -> Result<Vec<TxId>> {
        self.inner.in_doubt(group).await
    }
}
