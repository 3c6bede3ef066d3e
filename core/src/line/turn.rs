//! Waiting for one's turn.

use std::time::Duration;

use super::{Claim, passing};
use crate::{error::Result, session::SessionCore};

/// Waits until nobody is ahead; `None` if the ticket itself is gone.
pub(crate) async fn wait_turn(mut claim: Claim) -> Result<Option<Claim>> {
    let core = claim.core.clone();
    let core = &*core;
    let mut idle = Idle::default();
    loop {
        let place = claim.place();
        let Some(nearest) = place.ahead.first() else { return Ok(Some(claim)) };
        let waited = tokio::select! {
            biased;
            () = core.over() => return Err(core.lost_error(claim.operation)),
            waited = core.backend.gone(nearest) => waited,
        };
        let looked = tokio::select! {
            biased;
            () = core.over() => return Err(core.lost_error(claim.operation)),
            looked = core.backend.look(&place.ticket, 1) => looked,
        };
        match (waited, looked) {
            (_, Ok(None)) => {
                claim.forget();
                return Ok(None);
            }
            (waited, Ok(Some(now))) => {
                let moved = now.ahead.first() != place.ahead.first();
                claim.moved(now);
                if moved {
                    idle = Idle::default();
                } else {
                    idle.pause(core, waited.err()).await;
                }
            }
            (_, Err(error)) if passing(error.kind()) => idle.pause(core, Some(error)).await,
            (_, Err(error)) => return Err(error),
        }
    }
}

/// Pauses after looks that brought nothing, so that an early or failing wait never becomes a tight loop.
#[derive(Default)]
struct Idle(u32);

impl Idle {
    async fn pause(&mut self, core: &SessionCore, error: Option<crate::Error>) {
        if let Some(error) = error {
            tracing::debug!(%error, "waiting in line goes on");
        }
        // A single early return is normal (the deadline of a lease that was renewed) and costs no pause.
        if self.0 > 0 {
            let pause = Duration::from_millis(5 << self.0.min(8)).mul_f64(rand::random_range(0.5..1.5));
            tokio::select! {
                () = core.over() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        self.0 += 1;
    }
}
