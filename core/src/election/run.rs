//! Work that runs while leading, again and again.

use std::{future::Future, ops::ControlFlow, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::{Candidate, Election, Leadership};
use crate::error::{ErrorKind, Result};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Pauses after losses and errors: they double while trouble lasts.
struct Pauses(Duration);

impl Pauses {
    async fn after(&mut self, trouble: &crate::Error) {
        tracing::warn!(error = %trouble, pause = ?self.0, "campaigning again after a pause");
        sleep(self.0.mul_f64(rand::random_range(0.5..1.5))).await;
        self.0 = (self.0 * 2).min(LONGEST_PAUSE);
    }
}

/// A leadership that ends when this is dropped, whatever the work has kept of it.
struct Office(Arc<Leadership>);

impl Drop for Office {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

pub(super) async fn run<T, F, Fut>(election: &Election, candidate: &Candidate, mut work: F) -> Result<T>
where
    F: FnMut(Arc<Leadership>) -> Fut,
    Fut: Future<Output = ControlFlow<T>>,
{
    let mut pauses = Pauses(FIRST_PAUSE);
    loop {
        let office = match election.stand(candidate).await {
            Ok(leadership) => Office(Arc::new(leadership)),
            Err(error) if election.is_hopeless(error.kind()) => return Err(error),
            Err(error) => {
                pauses.after(&error).await;
                continue;
            }
        };
        let began = Instant::now();
        // Called within, so that not even the part of it before the first await runs unless we lead.
        let ended = office.0.protect(async { work(office.0.clone()).await }).await;
        if began.elapsed() >= LONGEST_PAUSE {
            pauses = Pauses(FIRST_PAUSE);
        }
        match ended {
            Ok(done) => {
                if let Err(error) = office.0.end().await {
                    tracing::debug!(term = %office.0.term(), %error, "resigned, but that is not confirmed");
                }
                if let ControlFlow::Break(value) = done {
                    return Ok(value);
                }
            }
            Err(lost) => {
                // Given up before the pause: if our place is still there, the next in line need not wait.
                drop(office);
                pauses.after(&lost).await;
            }
        }
    }
}

impl Election {
    /// Whether an error will stay for ever.
    fn is_hopeless(&self, kind: ErrorKind) -> bool {
        let gone = self.session.as_ref().is_some_and(|session| !session.is_live()) || self.coord.is_closed();
        gone || matches!(kind, ErrorKind::InvalidInput | ErrorKind::Unsupported)
    }
}
