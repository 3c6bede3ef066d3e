//! Atomic commit with real processes: what the actor does in transactions, and what is left behind by whoever dies.
//!
//! Promise: what is looked for is looked for in the store, by somebody else than who wrote it.

pub mod fate;
pub mod kills;
pub mod restarts;

use std::{sync::Arc, time::Duration};

use quorate::{
    Coordinator, Dir, KeyRange, Result,
    commit::{Keys, RecoverOptions, Recoverer, Serving, Transaction, Transactions, TransactionsOptions},
};
use tokio::time::{Instant, sleep};

use fate::{Doomed, Fate};

/// How long a driver must be missing before others take over.
pub const GRACE: Duration = Duration::from_millis(200);
/// The participants: keys of the coordinator, under two names.
pub const NAMES: [&str; 2] = ["left", "right"];

/// Recovery that does not wait where nothing has to be waited for.
pub fn eager() -> RecoverOptions {
    RecoverOptions::default().every(Duration::from_millis(500)).grace(GRACE).remember(Duration::ZERO)
}

/// A group with both participants.
///
/// # Errors
/// `InvalidInput` for a bad name.
pub fn group(coord: &Coordinator, name: &str, options: TransactionsOptions) -> Result<(Transactions, [Keys; 2])> {
    let all = coord.transactions_with(name, options)?;
    let [left, right] = NAMES.map(|name| all.enlist_keys(name, coord));
    Ok((all, [left?, right?]))
}

/// The part of the actor that takes part in transactions.
#[derive(Debug, Default)]
pub struct Acting {
    all: Option<Transactions>,
    tx: Option<Transaction>,
    serving: Option<Serving>,
    recoverer: Option<Recoverer>,
}

impl Acting {
    /// Obeys a command about transactions; `None` if it is none.
    ///
    /// # Errors
    /// What the call says.
    pub async fn obey(&mut self, coord: &Coordinator, words: &[&str]) -> Result<Option<String>> {
        use quorate::commit::KeyWork;
        Ok(Some(match words {
            ["begin", name, left, right, fate @ ..] => {
                let options = TransactionsOptions::default().on_step(Fate::of(fate)?.hook());
                let (all, _) = group(coord, name, options)?;
                let tx = all.begin().branch("left", KeyWork::new().put(left, "new"));
                let tx = tx.branch("right", KeyWork::new().put(right, "new"));
                let answer = format!("begun {}", tx.id());
                (self.all, self.tx) = (Some(all), Some(tx));
                answer
            }
            ["commit"] => match self.tx.take() {
                Some(tx) => tx.commit().await?.decision.to_string(),
                None => "nothing was begun".to_owned(),
            },
            ["recover", name, fate @ ..] => {
                let (all, _) = group(coord, name, TransactionsOptions::default().on_step(Fate::of(fate)?.hook()))?;
                self.recoverer = Some(all.recover_with(eager()));
                "recovering".to_owned()
            }
            ["serve", name, participant, fate @ ..] => {
                let fate = Fate::of(fate)?;
                let all = coord.transactions_with(name, TransactionsOptions::default().on_step(fate.hook()))?;
                let inner = all.enlist_keys(participant, coord)?;
                self.serving = Some(all.serve(participant, Arc::new(Doomed { inner, fate }))?);
                "standing by".to_owned()
            }
            ["serves"] => {
                if let Some(serving) = &self.serving {
                    serving.ready().await?;
                }
                "serving".to_owned()
            }
            _ => return Ok(None),
        }))
    }
}

/// What a group has left in its coordinator and in the keys that take part; marks against late prepares apart.
///
/// # Errors
/// What the backend says.
pub async fn residue(coord: &Coordinator, group: &str, keys: &[&Coordinator]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut places: Vec<_> = ["tx", "txdecision", "txparked"].map(|kind| (coord, vec![kind, group])).into();
    places.extend(NAMES.map(|name| (coord, vec!["txwork", group, name])));
    for keys in keys {
        places.push((keys, vec!["txintent"]));
        places.push((keys, vec!["txbranch", group]));
    }
    for (coord, dir) in places {
        let range = KeyRange::prefix(&Dir::new(dir)?, "")?;
        for entry in coord.backend().read(&range).await?.entries {
            if !String::from_utf8_lossy(&entry.value).contains("\"over\"") {
                found.push(entry.key.to_string());
            }
        }
    }
    Ok(found)
}

/// Waits until nothing is left behind.
///
/// # Panics
/// If something still is after `limit`; says what.
pub async fn until_clean(coord: &Coordinator, group: &str, keys: &[&Coordinator], limit: Duration) {
    let until = Instant::now() + limit;
    loop {
        let left = residue(coord, group, keys).await;
        match left {
            Ok(left) if left.is_empty() => return,
            left => assert!(Instant::now() < until, "{group}: after {limit:?} there is still {left:?}"),
        }
        sleep(Duration::from_millis(50)).await;
    }
}
